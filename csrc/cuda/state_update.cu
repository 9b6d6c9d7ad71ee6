// SPDX-License-Identifier: Apache-2.0
//
// The selective scan's decode step. Memory-bound: at 16 states 128 of its 136 bytes per channel and sequence are the
// state, read and written once. A lane has two packs of 16 bytes of a channel's state, 2^k neighbouring lanes have all
// of it: every access is of whole 32-byte sectors, and what is done once per lane (softplus, gate) is done for 8
// states. Shuffles add up the lanes' shares. A thread keeps its part of A for several sequences: reading it again would
// cost L2 half as many bytes as the state does.
#include "rom/state_update.h"

#include "cuda/decode.cuh"
#include "cuda/math.cuh"

namespace {

constexpr int kMostStates = 256;

// How a launch lays out states over lanes and channels over groups of B and C.
struct Layout {
  int log2_lanes;         // of the lanes per channel
  unsigned per_B, per_C;  // channels per group
};

// X: storage of u, delta, z and out; S: of B and C. A thread has P packs of V states of a channel.
template <class X, class S, int V, int P>
struct Channel {
  using T = Compute<X>;
  const rom_state_update_args& a;
  int lanes, first, states;  // its packs start at states first + p * lanes * V; states is 0 if there is no such channel
  bool leads;                // the lane that writes out
  int64_t channel, in_B, in_C;
  T A[P][V], D, bias;

  __device__ __forceinline__ Channel(const rom_state_update_args& args, const Layout& layout) : a(args), A{} {
    const int lane = static_cast<int>(threadIdx.x) & ((1 << layout.log2_lanes) - 1);
    const int64_t in_block = threadIdx.x >> layout.log2_lanes, dim = a.u.size[2];
    channel = static_cast<int64_t>(blockIdx.x) * (kThreads >> layout.log2_lanes) + in_block;
    const bool exists = channel < dim;
    if (!exists) channel = dim - 1;  // goes along without states and writes nothing: the shuffles want whole warps
    lanes = 1 << layout.log2_lanes, first = lane * V, states = exists ? static_cast<int>(a.A.size[1]) : 0;
    leads = exists && lane == 0;
    in_B = static_cast<int64_t>(static_cast<unsigned>(channel) / layout.per_B) * a.B.stride[2] + first;
    in_C = static_cast<int64_t>(static_cast<unsigned>(channel) / layout.per_C) * a.C.stride[2] + first;
    D = parameter<X>(a.D, channel), bias = parameter<X>(a.delta_bias, channel);
    load(static_cast<const T*>(a.A.data) + channel * a.A.size[1] + first, A);
  }

  // f(p, n) for each pack p that exists, n elements behind the thread's first.
  template <class F>
  __device__ __forceinline__ void each_pack(F f) const {
#pragma unroll
    for (int p = 0; p < P; ++p)
      if (first + p * lanes * V < states) f(p, p * lanes * V);
  }
  template <class From>
  __device__ __forceinline__ void load(const From* from, T (&to)[P][V]) const {
    each_pack([&](int p, int n) { load_pack(from + n, to[p]); });
  }
  __device__ __forceinline__ T* state(int slot) const {
    return static_cast<T*>(a.state.data) + slot * a.state.stride[0] + channel * a.state.stride[1] + first;
  }

  // One step of sequence b: the state moves on. All lanes of the channel get out.
  __device__ __forceinline__ T advance(int b, int64_t step, T (&h)[P][V]) const {
    const T u = read(*element<X>(a.u, b, step, channel));
    const T z = a.z.data ? read(*element<X>(a.z, b, step, channel)) : T(0);
    T delta = read(*element<X>(a.delta, b, step, channel)) + bias, B[P][V] = {}, C[P][V] = {}, y = 0;
    load(element<S>(a.B, b, step, in_B), B);
    load(element<S>(a.C, b, step, in_C), C);
    if (a.delta_softplus) delta = softplus(delta);
    const T rate = delta * static_cast<T>(kLog2E), input = delta * u;  // exp(delta A) = 2^(rate A)
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < V; ++v) {
        h[p][v] = fma(exp2_fast(rate * A[p][v]), h[p][v], input * B[p][v]);
        y = fma(C[p][v], h[p][v], y);
      }
    for (int width = lanes / 2; width > 0; width /= 2) y += __shfl_xor_sync(0xffffffffu, y, width);
    y = fma(D, u, y);
    return a.z.data ? y * silu(z) : y;
  }
};

// Without a number of resident blocks the compiler aims for one of its own, and spills to reach it.
template <class X, class S, int V, int P>
__global__ void __launch_bounds__(kThreads, sizeof(Compute<X>) == 8 ? 2 : 4)
    state_update(rom_state_update_args a, Layout layout) {
  const Channel<X, S, V, P> mine(a, layout);
  const int batch = static_cast<int>(a.u.size[0]);
#pragma unroll 1
  for (int b = static_cast<int>(blockIdx.y); b < batch; b += static_cast<int>(gridDim.y)) {
    const int slot = slot_of(a.state_indices, b);
    if (!is_slot(a.state, slot)) {
      if (mine.leads) write_without_slot<X>(a.out, b, slot, mine.channel);
      continue;
    }
    Compute<X> h[P][V] = {};
    mine.load(mine.state(slot), h);
#pragma unroll 1
    for (int64_t step = 0; step < a.u.size[1]; ++step) {
      const Compute<X> y = mine.advance(b, step, h);
      if (mine.leads) *element<X>(a.out, b, step, mine.channel) = rounded<X>(y);
    }
    mine.each_pack([&](int p, int n) { store_pack(mine.state(slot) + n, h[p]); });
  }
}

// ---------------------------------------------------------------------------------------------------- launches
template <class X, class S, int V>
void launch(const rom_state_update_args& a) {
  const int64_t batch = a.u.size[0], dim = a.u.size[2], packs = (a.A.size[1] + V - 1) / V;
  Layout layout{0, static_cast<unsigned>(dim / a.B.size[2]), static_cast<unsigned>(dim / a.C.size[2])};
  while (layout.log2_lanes < 5 && (2 << layout.log2_lanes) < packs) ++layout.log2_lanes;
  const int64_t channels = kThreads >> layout.log2_lanes, columns = (dim + channels - 1) / channels;
  const dim3 grid(static_cast<unsigned>(columns), rows_side_by_side(batch, columns));
  if (packs <= 64)
    ROM_LAUNCH((state_update<X, S, V, 2>), grid, kThreads, 0, a.launch.stream, a, layout);
  else
    ROM_LAUNCH((state_update<X, S, V, kMostStates / 32 / V>), grid, kThreads, 0, a.launch.stream, a, layout);
}

template <class X, class S>
void launch(const rom_state_update_args& a) {
  constexpr int V = 16 / sizeof(Compute<X>);
  const bool whole = a.A.size[1] % V == 0 && rows_aligned(a.state, V) && rows_aligned(a.A, V) && rows_aligned(a.B, V) &&
                     rows_aligned(a.C, V);
  whole ? launch<X, S, V>(a) : launch<X, S, 1>(a);
}

}  // namespace

extern "C" rom_status rom_state_update_cuda(const rom_state_update_args* args) {
  const rom_state_update_args& a = *args;
  if (a.u.size[0] == 0 || a.u.size[1] == 0 || a.u.size[2] == 0) return ROM_OK;
  if (a.A.size[1] > kMostStates)
    return rom_fail(ROM_UNSUPPORTED, "%lld states (up to %d are)", (long long)a.A.size[1], kMostStates);
  bool known = false;
  with_storage_type(a.u.dtype, [&]<class X>(Type<X>) {
    known = a.B.dtype == a.C.dtype && (a.B.dtype == kDtype<Compute<X>> || a.B.dtype == a.u.dtype);
    if (known) a.B.dtype == a.u.dtype ? launch<X, X>(a) : launch<X, Compute<X>>(a);
  });
  return known
             ? launch_status("state_update")
             : rom_fail(ROM_UNSUPPORTED, "dtypes %d (u), %d (B) and %d (C) together", a.u.dtype, a.B.dtype, a.C.dtype);
}
