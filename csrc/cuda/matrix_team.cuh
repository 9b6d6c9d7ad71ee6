// SPDX-License-Identifier: Apache-2.0
//
// Small dense algebra on the GPU: a team of threads has a matrix of up to K columns in shared memory, and computes
// products in registers, a tile per thread. A team is a warp up to K = 32 (four teams make a block), a block above.
// Matrices are padded to K columns; padding is finite, and such that it never reaches an element.
#pragma once
#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"

namespace {

template <class T, int K>
struct Team {
  static constexpr int kThreads = K <= 32 ? 32 : K == 64 ? 64 : 256;
  static constexpr int kTeams = kThreads == 32 ? 4 : 1, kBlock = kThreads * kTeams;
  // Blocks per processor that registers must leave room for; without a word ptxas spills for the sake of more.
  static constexpr int kBlocks = sizeof(T) == 8 ? 4 : K == 16 ? 6 : K == 32 ? 4 : K == 64 ? 8 : 1;
  // Threads form a grid over a tile. 8 x 8 elements each at 64 and 128: 4 vectors from shared memory feed 64
  // multiply-adds, which balances the two.
  static constexpr int kAcross = K <= 64 ? 8 : 16, kDown = kThreads / kAcross;
  static constexpr int kRows = K < 64 ? K : 64;            // rows of a tall matrix in shared memory at a time
  static constexpr int kStride = K + 16 / (int)sizeof(T);  // of rows in shared memory: neighbours in other banks
  static constexpr int kSquare = K * kStride, kStage = kRows * kStride;  // elements

  const int index = static_cast<int>(threadIdx.x) / kThreads, thread = static_cast<int>(threadIdx.x) % kThreads;

  __device__ int64_t matrix() const { return static_cast<int64_t>(blockIdx.x) * kTeams + index; }
  __device__ __forceinline__ void sync() const {
    if constexpr (kThreads == 32)
      __syncwarp();
    else
      __syncthreads();
  }
  // f(row, column) over rows x K elements; a thread stays in its column, neighbours are neighbours in a row. From
  // global memory several are to be on their way; elsewhere unrolling is compile time for nothing.
  template <int kAtOnce = 1, class F>
  __device__ __forceinline__ void each(int rows, F f) const {
    const int c = thread % K;
#pragma unroll(kAtOnce)
    for (int r = thread / K; r < rows; r += kThreads / K) f(r, c);
  }
  // The sum over the team, in every thread and always in the same order. `scratch` has an element per warp.
  __device__ T sum(T value, T* scratch) const {
    value = warp_sum(value);
    if constexpr (kThreads > 32) {
      if (thread % 32 == 0) scratch[thread / 32] = value;
      sync();
      value = 0;
      for (int w = 0; w < kThreads / 32; ++w) value += scratch[w];
      sync();
    }
    return value;
  }
};

// V neighbours in shared memory, aligned to 16 bytes or to all of them.
template <int V, class T>
__device__ __forceinline__ void load_lanes(const T* p, T* to) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(p);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = pack.lane[v];
}

// This thread's part of a matrix of kHeight x kWidth elements, in packs of four rows and four columns.
template <class T, int kHeight, int kWidth, int kDown, int kAcross>
struct Tile {
  static constexpr int kRows = kHeight / kDown, kColumns = kWidth / kAcross;
  static constexpr int kRowPack = kRows < 4 ? kRows : 4, kColumnPack = kColumns < 4 ? kColumns : 4;
  // Terms of A B at a time: with 64 sums in registers there is room for two, or half as many threads fit.
  static constexpr int kStep = (kRows * kColumns < 64 ? 16 : 8) / (int)sizeof(T);
  const int down, across;
  T v[kRows][kColumns];

  __device__ explicit Tile(int thread) : down(thread / kAcross), across(thread % kAcross) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) v[i][j] = 0;
  }
  __device__ __forceinline__ int row(int i) const {
    return kRowPack * down + i % kRowPack + i / kRowPack * (kRowPack * kDown);
  }
  __device__ __forceinline__ int column(int j) const {
    return kColumnPack * across + j % kColumnPack + j / kColumnPack * (kColumnPack * kAcross);
  }
  // f(row, first column, the pack's elements) over the tile's packs.
  template <class F>
  __device__ __forceinline__ void each_pack(F f) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; j += kColumnPack) f(row(i), column(j), &v[i][j]);
  }
  __device__ __forceinline__ void load(const T* m, int stride) {
    each_pack([&](int r, int c, T* pack) { load_lanes<kColumnPack>(m + r * stride + c, pack); });
  }
  __device__ __forceinline__ void store(T* m, int stride) {
    each_pack([&](int r, int c, T* pack) { put(m + r * stride + c, pack); });
  }
  __device__ static __forceinline__ void put(T* at, const T* from) {
    Pack<T, kColumnPack> pack;
#pragma unroll
    for (int j = 0; j < kColumnPack; ++j) pack.lane[j] = from[j];
    *reinterpret_cast<Pack<T, kColumnPack>*>(at) = pack;
  }
  // The tile's part of column pack after column pack in row l of b.
  __device__ __forceinline__ void load_right(const T* b, int stride, int l, T (&right)[kColumns]) const {
#pragma unroll
    for (int j = 0; j < kColumns; j += kColumnPack) load_lanes<kColumnPack>(b + l * stride + column(j), &right[j]);
  }
  __device__ __forceinline__ void add_outer(const T* left, int step, const T (&right)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) v[i][j] = fma(left[i * step], right[j], v[i][j]);
  }

  // += A B over `inner` terms (rounded up to a whole vector), A and B in rows of `stride`.
  __device__ __forceinline__ void add_product(const T* a, const T* b, int inner, int stride) {
#pragma unroll 1
    for (int l = 0; l < inner; l += kStep) {
      T left[kRows][kStep], right[kColumns];
#pragma unroll
      for (int i = 0; i < kRows; ++i) load_lanes<kStep>(a + row(i) * stride + l, left[i]);
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
        load_right(b, stride, l + s, right);
        add_outer(&left[0][s], kStep, right);
      }
    }
  }
  // += A^T B.
  __device__ __forceinline__ void add_transposed_product(const T* a, const T* b, int inner, int stride) {
#pragma unroll 2
    for (int l = 0; l < inner; ++l) {
      T left[kRows], right[kColumns];
#pragma unroll
      for (int i = 0; i < kRows; i += kRowPack) load_lanes<kRowPack>(a + l * stride + row(i), &left[i]);
      load_right(b, stride, l, right);
      add_outer(left, 1, right);
    }
  }
};

// The tile of a team's matrix, and that of its stage of rows.
template <class T, int K>
using Square = Tile<T, K, K, Team<T, K>::kDown, Team<T, K>::kAcross>;
template <class T, int K>
using Stage = Tile<T, Team<T, K>::kRows, K, Team<T, K>::kDown, Team<T, K>::kAcross>;

}  // namespace
