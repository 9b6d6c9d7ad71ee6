// SPDX-License-Identifier: Apache-2.0
//
// The convolution's decode step: a thread has a channel, its weights and its window in registers. A state as the
// operator makes it (channel, place) is one load of a whole window; one with neighbouring channels, as causal_conv1d
// keeps it, is read tap by tap, and coalesced as well.
#include "rom/conv.h"

#include "cuda/decode.cuh"
#include "cuda/math.cuh"

namespace {

// f(k) for every tap.
template <int W, class F>
__device__ __forceinline__ void each_tap(F f) {
#pragma unroll
  for (int k = 0; k < W; ++k) f(k);
}

// X: storage of x and out; S: of the state. `whole`: windows and weights start where a pack of W may start.
template <class X, class S, int W>
__global__ void __launch_bounds__(kThreads) conv_update(rom_conv_update_args a, bool whole) {
  using T = Compute<X>;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, along = a.conv_state.stride[2];
  if (c >= a.x.size[2]) return;
  T weight[W];
  if (whole)
    load_parameter<X>(a.weight, c * W, weight);
  else
    each_tap<W>([&](int k) { weight[k] = parameter<X>(a.weight, c * W + k); });
  const T bias = parameter<X>(a.bias, c);
  const int batch = static_cast<int>(a.x.size[0]);
#pragma unroll 1
  for (int b = static_cast<int>(blockIdx.y); b < batch; b += static_cast<int>(gridDim.y)) {
    const int slot = slot_of(a.state_indices, b);
    if (!is_slot(a.conv_state, slot)) {
      write_without_slot<X>(a.out, b, slot, c);
      continue;
    }
    S* state = static_cast<S*>(a.conv_state.data) + slot * a.conv_state.stride[0] + c * a.conv_state.stride[1];
    T window[W];
    if (whole)
      load_pack(state, window);
    else
      each_tap<W>([&](int k) { window[k] = read(state[k * along]); });
#pragma unroll 1
    for (int64_t step = 0; step < a.x.size[1]; ++step) {
      each_tap<W - 1>([&](int k) { window[k] = window[k + 1]; });
      window[W - 1] = read(*element<X>(a.x, b, step, c));
      T sum = bias;
      each_tap<W>([&](int k) { sum = fma(weight[k], window[k], sum); });
      *element<X>(a.out, b, step, c) = rounded<X>(a.silu ? silu(sum) : sum);
    }
    if (whole)
      store_pack(state, window);
    else
      each_tap<W>([&](int k) { state[k * along] = rounded<S>(window[k]); });
  }
}

template <class X, class S, int W>
void launch(const rom_conv_update_args& a) {
  const int64_t columns = (a.x.size[2] + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(columns), rows_side_by_side(a.x.size[0], columns));
  constexpr int kAligned = W == 3 ? 1 : W;
  const bool whole =
      a.conv_state.stride[2] == 1 && rows_aligned(a.conv_state, kAligned) && rows_aligned(a.weight, kAligned);
  ROM_LAUNCH((conv_update<X, S, W>), grid, kThreads, 0, a.launch.stream, a, whole);
}

template <class X, class S>
bool with_width(const rom_conv_update_args& a) {
  switch (a.weight.size[1]) {
    case 2: launch<X, S, 2>(a); return true;
    case 3: launch<X, S, 3>(a); return true;
    case 4: launch<X, S, 4>(a); return true;
    default: return false;
  }
}

}  // namespace

extern "C" rom_status rom_conv_update_cuda(const rom_conv_update_args* args) {
  const rom_conv_update_args& a = *args;
  if (a.x.size[0] == 0 || a.x.size[1] == 0 || a.x.size[2] == 0) return ROM_OK;
  bool known = false;
  with_storage_type(a.x.dtype, [&]<class X>(Type<X>) {
    if (a.conv_state.dtype == a.x.dtype)
      known = with_width<X, X>(a);
    else if (a.conv_state.dtype == ROM_FLOAT32 && a.x.dtype != ROM_FLOAT64)
      known = with_width<X, Compute<X>>(a);
  });
  return known ? launch_status("conv_update")
               : rom_fail(ROM_UNSUPPORTED, "width %lld (2, 3 and 4 are), or dtypes %d (x) and %d (conv_state) together",
                          (long long)a.weight.size[1], a.x.dtype, a.conv_state.dtype);
}
