// SPDX-License-Identifier: Apache-2.0
//
// The convolution's decode step. A block of channels has its window transposed into registers, one vector per tap.
#include "cpu/kernel.hpp"
#include "rom/conv.h"

namespace {
#include "cpu/simd.hpp"

constexpr int64_t kChannels = 512;  // per task

// Reads and writes `count` channels' values at place k of a (channel, place) matrix.
template <class S, class T>
ROM_INLINE Vec<T> gather(const S* from, int64_t stride, int count) {
  T values[lanes<T>] = {};
  for (int lane = 0; lane < count; ++lane) values[lane] = widen(from[lane * stride]);
  return load(values);
}
template <class S, class T>
ROM_INLINE void scatter(S* to, int64_t stride, Vec<T> v, int count) {
  for (int lane = 0; lane < count; ++lane) to[lane * stride] = narrow<S>(v[lane]);
}

// All steps of channels c ... c + count - 1; across and along are the state's strides.
template <class X, class S, int W>
ROM_INLINE void channels(const rom_conv_update_args& a, int64_t b, int64_t slot, int64_t c, int count, int64_t across,
                         int64_t along) {
  using T = Compute<X>;
  Vec<T> w[W], window[W];
  S* state = (S*)a.conv_state.data + slot * a.conv_state.stride[0] + c * across;
  ROM_UNROLL
  for (int k = 0; k < W; ++k) {
    w[k] = gather<T, T>((const T*)a.weight.data + c * W + k, W, count);
    window[k] = gather<S, T>(state + k * along, across, count);
  }
  const bool whole = count == lanes<T>;
  auto get = [&](auto* p) { return whole ? load(p) : load_partial(p, count); };
  const Vec<T> bias = a.bias.data ? get((const T*)a.bias.data + c) : broadcast((T)0);
  const int64_t steps = a.x.size[1];
  for (int64_t t = 0; t < steps; ++t) {
    ROM_UNROLL
    for (int k = 0; k + 1 < W; ++k) window[k] = window[k + 1];
    window[W - 1] = get((const X*)a.x.data + b * a.x.stride[0] + t * a.x.stride[1] + c);
    Vec<T> pre = bias;
    ROM_UNROLL
    for (int k = 0; k < W; ++k) pre = fma(w[k], window[k], pre);
    if (a.silu) pre *= sigmoid(pre);
    X* out = (X*)a.out.data + b * a.out.stride[0] + t * a.out.stride[1] + c;
    whole ? store(out, pre) : store_partial(out, pre, count);
  }
  ROM_UNROLL
  for (int k = 0; k < W; ++k) scatter<S, T>(state + k * along, across, window[k], count);
}

template <class X, class S, int W>
void update(const rom_conv_update_args& a) {
  using T = Compute<X>;
  const int64_t batch = a.x.size[0], steps = a.x.size[1], dim = a.x.size[2];
  const int64_t blocks = (dim + kChannels - 1) / kChannels, useful = 1 + batch * steps * dim / 16384;
  const int64_t across = a.conv_state.stride[1], along = a.conv_state.stride[2];
  const int32_t* slots = (const int32_t*)a.state_indices.data;
  parallel_for(batch * blocks, a.launch.threads < useful ? a.launch.threads : useful, [&](int64_t task, int64_t) {
    FlushSubnormals flush;
    const int64_t b = task / blocks, begin = task % blocks * kChannels, slot = slots ? slots[b] : b;
    const int64_t end = begin + kChannels < dim ? begin + kChannels : dim;
    if (slot < 0) {
      for (int64_t t = 0; t < steps; ++t)
        __builtin_memset((X*)a.out.data + b * a.out.stride[0] + t * a.out.stride[1] + begin, 0,
                         (size_t)(end - begin) * sizeof(X));
      return;
    }
    int64_t c = begin;
    if (across == W && along == 1)  // the layout of a fresh state: constant strides let the compiler shuffle
      for (; c + lanes<T> <= end; c += lanes<T>) channels<X, S, W>(a, b, slot, c, lanes<T>, W, 1);
    for (; c < end; c += lanes<T>)
      channels<X, S, W>(a, b, slot, c, end - c < lanes<T> ? (int)(end - c) : lanes<T>, across, along);
  });
}

template <class X, class S>
bool with_width(const rom_conv_update_args& a) {
  switch (a.weight.size[1]) {
    case 2: update<X, S, 2>(a); return true;
    case 3: update<X, S, 3>(a); return true;
    case 4: update<X, S, 4>(a); return true;
    default: return false;
  }
}

}  // namespace

ROM_CPU_KERNEL(rom_conv_update, rom_conv_update_args) {
  bool known = false;
  with_storage_type(a.x.dtype, [&]<class X>(Type<X>) {
    if (a.conv_state.dtype == a.x.dtype)
      known = with_width<X, X>(a);
    else if (a.conv_state.dtype == ROM_FLOAT32 && a.x.dtype != ROM_FLOAT64)
      known = with_width<X, Compute<X>>(a);
  });
  return known ? ROM_OK
               : rom_fail(ROM_UNSUPPORTED, "width %lld (2, 3 and 4 are), or dtypes %d (x) and %d (conv_state) together",
                          (long long)a.weight.size[1], a.x.dtype, a.conv_state.dtype);
}
