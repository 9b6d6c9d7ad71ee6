// SPDX-License-Identifier: Apache-2.0
//
// The selective scan's decode step. A vector holds the states of one channel, as memory does (16 states fill one
// AVX-512 register); what is per channel (softplus, gate, skip) is done for a vector of channels at once.
#include "cpu/kernel.hpp"
#include "rom/state_update.h"

namespace {
#include "cpu/simd.hpp"

constexpr int64_t kChannels = 128;  // per task: a multiple of every vector's lanes

// One channel, one step: returns sum_n C state.
template <class T>
ROM_INLINE T one_channel(T* state, const T* A, const T* B, const T* C, int64_t states, T delta, T u) {
  const T rate = delta * (T)1.44269504088896340736, input = delta * u;  // exp(delta A) = 2^(rate A)
  Vec<T> y = broadcast((T)0);
  auto block = [&](int64_t n, auto part) {
    const Vec<T> h = fma(exp2(get(A + n, part) * rate), get(state + n, part), get(B + n, part) * input);
    put(state + n, h, part);
    y = fma(h, get(C + n, part), y);
  };
  each_vector<T>(0, states, block);
  return sum<T>(y);
}

template <class X>
const X* at(const rom_tensor& t, int64_t b, int64_t step) {
  return (const X*)t.data + b * t.stride[0] + step * t.stride[1];
}

// Channels c ... c + count - 1 (one vector) of one step.
template <class X, class Part>
ROM_INLINE void channels(const rom_state_update_args& a, int64_t b, int64_t slot, int64_t step, int64_t c, Part part) {
  using T = Compute<X>;
  const int64_t states = a.A.size[1];
  Vec<T> delta = get(at<X>(a.delta, b, step) + c, part);
  if (a.delta_bias.data) delta += get((const T*)a.delta_bias.data + c, part);
  if (a.delta_softplus) delta = softplus(delta).value;
  const Vec<T> u = get(at<X>(a.u, b, step) + c, part);
  T* state = (T*)a.state.data + slot * a.state.stride[0] + c * a.state.stride[1];
  const T *A = (const T*)a.A.data + c * states, *B = at<T>(a.B, b, step), *C = at<T>(a.C, b, step);
  const int64_t per_B = a.u.size[2] / a.B.size[2], per_C = a.u.size[2] / a.C.size[2];
  T sums[lanes<T>] = {};
  for (int i = 0; i < count_of(part, lanes<T>); ++i)
    sums[i] = one_channel<T>(state + i * a.state.stride[1], A + i * states, B + (c + i) / per_B * a.B.stride[2],
                             C + (c + i) / per_C * a.C.stride[2], states, delta[i], u[i]);
  Vec<T> y = load(sums);
  if (a.D.data) y = fma(get((const T*)a.D.data + c, part), u, y);
  if (a.z.data) {
    const Vec<T> z = get(at<X>(a.z, b, step) + c, part);
    y *= z * sigmoid(z);
  }
  put((X*)at<X>(a.out, b, step) + c, y, part);
}

template <class X>
void update(const rom_state_update_args& a) {
  using T = Compute<X>;
  const int64_t batch = a.u.size[0], steps = a.u.size[1], dim = a.u.size[2];
  const int64_t blocks = (dim + kChannels - 1) / kChannels;
  const int64_t useful = 1 + batch * steps * dim * a.A.size[1] / 32768;  // about 15 us of work, what a wake-up costs
  const int32_t* slots = (const int32_t*)a.state_indices.data;
  parallel_for(batch * blocks, a.launch.threads < useful ? a.launch.threads : useful, [&](int64_t task, int64_t) {
    FlushSubnormals flush;
    const int64_t b = task / blocks, begin = task % blocks * kChannels, slot = slots ? slots[b] : b;
    const int64_t end = begin + kChannels < dim ? begin + kChannels : dim;
    for (int64_t step = 0; step < steps; ++step) {
      if (slot < 0) {
        __builtin_memset((X*)at<X>(a.out, b, step) + begin, 0, (size_t)(end - begin) * sizeof(X));
        continue;
      }
      each_vector<T>(begin, end, [&](int64_t c, auto part) { channels<X>(a, b, slot, step, c, part); });
    }
  });
}

}  // namespace

ROM_CPU_KERNEL(rom_state_update, rom_state_update_args) {
  const bool known = with_storage_type(a.u.dtype, [&]<class X>(Type<X>) { update<X>(a); });
  return known ? ROM_OK : rom_fail(ROM_UNSUPPORTED, "dtype %d of u is not supported", a.u.dtype);
}
