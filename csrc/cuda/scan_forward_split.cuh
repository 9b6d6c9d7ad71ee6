// SPDX-License-Identifier: Apache-2.0
//
// Selective scan, forward, for few channels and a long sequence: the length is cut into chunks that run side by side.
// Over a chunk the state is h -> exp(A sum(delta)) h + h_0, h_0 its final state from zero. So: the states h_0 of all
// chunks; chunk after chunk, one multiply-add per state, the state each starts from; the forward proper. That is twice
// the work, hence only where at least kLeastChunks chunks would leave the GPU mostly idle otherwise.
#pragma once
#include "cuda/scan_forward.cuh"

namespace {

constexpr int64_t kBusyWarps = 528;  // one per scheduler of an H200; a constant: all devices give the same bits
constexpr int64_t kLeastChunks = 4, kLeastChunkSteps = 128;
constexpr int kSplitThreads = 128;

// Chunks of each sequence, 1: not split. Packed sequences are not: their lengths are known on the device only.
inline int64_t chunks_of(const Problem<float>& p, int lanes) {
  const int64_t warps = (p.sequences * p.dim * lanes + 32 * kLaneChannels - 1) / (32 * kLaneChannels);
  const int64_t wanted = kBusyWarps / (warps > 0 ? warps : 1), possible = p.length / kLeastChunkSteps;
  const int64_t chunks = wanted < possible ? wanted : possible;
  return p.cu_seqlens || chunks < kLeastChunks ? 1 : chunks;
}
inline int64_t split_floats(const Problem<float>& p, int64_t chunks) {
  return chunks > 1 ? chunks * p.sequences * p.dim * (p.state + 1) : 0;
}

// sums[chunk][channel] = the sum of delta over the chunk, one thread each.
template <class S>
__global__ void __launch_bounds__(kSplitThreads)
    scan_forward_delta_sums(const __grid_constant__ Forward<float> f, int tiles, float* sums) {
  const Problem<float>& p = f.problem;
  const Sequence s = chunk_of(f, blockIdx.x / tiles);
  const int d = blockIdx.x % tiles * kSplitThreads + threadIdx.x;
  if (d >= p.dim) return;
  const float bias = p.delta_bias ? p.delta_bias[d] : 0.f;
  float sum = 0;
#pragma unroll 8
  for (int64_t t = 0; t < s.length; ++t) {
    const float delta = read(row<const S>(p.delta, s, t)[d]) + bias;
    sum += p.softplus ? softplus(delta) : delta;
  }
  sums[s.index * p.dim + d] = sum;
}

// states[chunk][channel][state], the final states from zero, become the states that the chunks start from.
__global__ void __launch_bounds__(kSplitThreads)
    scan_forward_chain(const __grid_constant__ Forward<float> f, const float* sums, float* states) {
  const Problem<float>& p = f.problem;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x, size = p.dim * p.state;
  if (i >= p.sequences * size) return;
  const int64_t sequence = i / size, d = i % size / p.state;
  const float A = p.A[i % size] * static_cast<float>(kLog2E);
  float h = f.initial_state ? f.initial_state[i] : 0.f;
#pragma unroll 4
  for (int64_t chunk = sequence * f.chunks; chunk < (sequence + 1) * f.chunks; ++chunk) {
    float& state = states[chunk * size + i % size];
    const float from_zero = state;
    state = h;
    h = fmaf(exp2_fast(A * sums[chunk * p.dim + d]), h, from_zero);
  }
  f.final_state[i] = h;
}

template <class K>
void launch_split(const rom_scan_forward_args& a, int64_t chunks) {
  Forward<float> f = tiled_forward_of<K>(a);
  const Problem<float>& p = f.problem;
  const int64_t steps = (p.length + chunks - 1) / chunks;
  f.chunk_steps = static_cast<int>((steps + kCheckpointSteps - 1) / kCheckpointSteps * kCheckpointSteps);
  f.chunks = static_cast<int>((p.length + f.chunk_steps - 1) / f.chunk_steps);
  const int64_t count = f.chunks * p.sequences, size = static_cast<int64_t>(p.dim) * p.state;
  float *states = static_cast<float*>(a.workspace.data), *sums = states + count * size;

  const int tiles = (p.dim + kSplitThreads - 1) / kSplitThreads;
  ROM_LAUNCH((scan_forward_delta_sums<typename K::S>), static_cast<unsigned>(tiles * count), kSplitThreads, 0,
             a.launch.stream, f, tiles, sums);
  Forward<float> first = f;
  first.initial_state = nullptr, first.checkpoints = nullptr, first.out.data = nullptr, first.final_state = states;
  launch<K>(first, a.launch.stream);
  ROM_LAUNCH(scan_forward_chain, static_cast<unsigned>((p.sequences * size + kSplitThreads - 1) / kSplitThreads),
             kSplitThreads, 0, a.launch.stream, f, sums, states);
  f.initial_state = states, f.final_state = nullptr;
  launch<K>(f, a.launch.stream);
}

}  // namespace
