// SPDX-License-Identifier: Apache-2.0
//
// The inverse of a team's matrix by Gauss-Jordan elimination, in place: in a warp's registers up to 32 columns, by
// blocks of 16 above; with partial pivoting on request.
#pragma once
#include "cuda/math.cuh"
#include "cuda/matrix_team.cuh"

namespace {

// 1 / x to half an ulp, for x in the middle of the exponents' range.
template <class T>
__device__ __forceinline__ T reciprocal(T x) {
  const T guess = reciprocal_fast(x);
  return fma(guess, fma(-x, guess, T(1)), guess);
}

// The first k columns of a warp's tile (4 x 8 threads), K = 16 or 32. A thread's 8 x 4 elements want 13 values of
// others per pivot; a row or column per thread would want 32. All indices into v are constants.
template <class T, int K>
__device__ __forceinline__ void eliminate(Tile<T, K, K, 4, 8>& tile, int k) {
  using Mine = Tile<T, K, K, 4, 8>;
#pragma unroll
  for (int a = 0; a < K / 16; ++a)
#pragma unroll 1
    for (int b = 0; b < 4; ++b)
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int p = 16 * a + 4 * b + v;
        if (p >= k) return;
        const int i = 4 * a + v, j = v % Mine::kColumnPack, across = p / Mine::kColumnPack;
        const bool my_row = tile.down == b, my_column = tile.across == across;
        T factor[Mine::kRows], row[Mine::kColumns];
#pragma unroll
        for (int r = 0; r < Mine::kRows; ++r)
          factor[r] = __shfl_sync(0xffffffffu, tile.v[r][j], tile.down * 8 + across);
#pragma unroll
        for (int c = 0; c < Mine::kColumns; ++c) row[c] = __shfl_sync(0xffffffffu, tile.v[i][c], b * 8 + tile.across);
        const T scale = reciprocal(__shfl_sync(0xffffffffu, tile.v[i][j], b * 8 + across));
#pragma unroll
        for (int c = 0; c < Mine::kColumns; ++c) {
          row[c] = c == j && my_column ? scale : row[c] * scale;
          tile.v[i][c] = my_row ? T(0) : tile.v[i][c];
        }
        factor[i] = my_row ? T(-1) : factor[i];
#pragma unroll
        for (int r = 0; r < Mine::kRows; ++r) {
          tile.v[r][j] = my_column ? T(0) : tile.v[r][j];
#pragma unroll
          for (int c = 0; c < Mine::kColumns; ++c) tile.v[r][c] = fma(-factor[r], row[c], tile.v[r][c]);
        }
      }
}

// By blocks of 16: the first warp inverts the block on the diagonal, the team does the rest as products. `panel` has
// room for 16 rows.
template <class T, int K>
__device__ void invert_blocked(const Team<T, K>& team, T* m, T* panel, int k) {
  constexpr int S = Team<T, K>::kStride, kBlock = 16, kEach = kBlock * K / Team<T, K>::kThreads;
#pragma unroll 1
  for (int j = 0; j < k; j += kBlock) {
    if (team.thread < 32) {
      Tile<T, kBlock, kBlock, 4, 8> block(team.thread);
      block.load(m + j * S + j, S);
      eliminate<T, kBlock>(block, kBlock);
      block.store(panel + j, S);
    }
    team.sync();
    const int c = team.thread % K, first = team.thread / K * kEach;
    if (c < j || c >= j + kBlock) {  // the block of rows, times the block's inverse
      T sum[kEach] = {};
#pragma unroll 4
      for (int l = 0; l < kBlock; ++l) {
        const T x = m[(j + l) * S + c];
#pragma unroll
        for (int r = 0; r < kEach; ++r) sum[r] = fma(panel[(first + r) * S + j + l], x, sum[r]);
      }
#pragma unroll
      for (int r = 0; r < kEach; ++r) panel[(first + r) * S + c] = sum[r];
    }
    team.sync();
    Square<T, K> update(team.thread);
    update.add_product(m + j, panel, kBlock, S);
    team.sync();
    update.each_pack([&](int r, int c, T* pack) {
      constexpr int V = Square<T, K>::kColumnPack;
      T value[V];
      const bool of_block = r >= j && r < j + kBlock;
      load_lanes<V>(of_block ? panel + (r - j) * S + c : m + r * S + c, value);
#pragma unroll
      for (int v = 0; v < V; ++v)
        pack[v] = of_block ? value[v] : (c >= j && c < j + kBlock ? T(0) : value[v]) - pack[v];
      update.put(m + r * S + c, pack);
    });
    team.sync();
  }
}

// The row at or below p with the largest element in column p, found by a warp.
template <class T>
__device__ __forceinline__ int find_pivot(const T* m, int stride, int p, int k, int lane) {
  T largest = -1;
  int at = p;
  for (int i = p + lane; i < k; i += 32) {
    const T size = fabs(m[i * stride + p]);
    if (size > largest) largest = size, at = i;
  }
  for (int width = 16; width > 0; width /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, largest, width);
    const int other_at = __shfl_xor_sync(0xffffffffu, at, width);
    if (other > largest || (other == largest && other_at < at)) largest = other, at = other_at;
  }
  return at;
}

// With partial pivoting; `scratch` has room for 3 K elements.
template <class T, int K>
__device__ void invert_pivoted(const Team<T, K>& team, T* m, T* scratch, int k) {
  constexpr int S = Team<T, K>::kStride, kThreads = Team<T, K>::kThreads;
  T *row = scratch, *factor = scratch + K;
  int* order = reinterpret_cast<int*>(scratch + 2 * K);
#pragma unroll 1
  for (int p = 0; p < k; ++p) {
    if (team.thread < 32) {
      const int at = find_pivot(m, S, p, k, team.thread);
      if (team.thread == 0) order[p] = at;
    }
    team.sync();
    const int best = order[p];
    const T scale = T(1) / m[best * S + p];
    for (int i = team.thread; i < k; i += kThreads) factor[i] = m[(i == best ? p : i) * S + p];
    for (int c = team.thread; c < k; c += kThreads) {
      row[c] = c == p ? scale : m[best * S + c] * scale;
      if (c != p) m[best * S + c] = m[p * S + c];  // column p, which all read, is replaced below
    }
    team.sync();
    team.each(k, [&](int r, int c) {
      if (c < k) m[r * S + c] = r == p ? row[c] : fma(-factor[r], row[c], c == p ? T(0) : m[r * S + c]);
    });
    team.sync();
  }
  for (int i = team.thread; i < k; i += kThreads)  // the rows were exchanged, so the inverse's columns go back
    for (int p = k - 1; p >= 0; --p) {
      const T kept = m[i * S + p];
      m[i * S + p] = m[i * S + order[p]];
      m[i * S + order[p]] = kept;
    }
  team.sync();
}

// m = m^-1 without pivoting, for a matrix whose pivots are known to be no smaller than about 1. `scratch` has room for
// 16 rows.
template <class T, int K>
__device__ __forceinline__ void invert(const Team<T, K>& team, T* m, T* scratch, int k) {
  if constexpr (K <= 32) {
    Square<T, K> tile(team.thread);
    tile.load(m, Team<T, K>::kStride);
    eliminate<T, K>(tile, k);
    tile.store(m, Team<T, K>::kStride);
    team.sync();
  } else {
    invert_blocked(team, m, scratch, k);
  }
}

}  // namespace
