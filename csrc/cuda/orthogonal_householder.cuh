// SPDX-License-Identifier: Apache-2.0
//
// Products of Householder reflections by the compact WY form, and their gradient. The formulas are in rom/orthogonal.h
// and rom.ops.householder. The triangles are treated as full matrices.
#pragma once
#include "cuda/orthogonal.cuh"

namespace {

// z = T V1^T for T in t, whose product is taken by stages of V1's columns.
template <class T, int K>
__device__ void form_z(const Work<T, K>& work, const rom_tensor& x, const T* t, T* stage, Square<T, K>& z) {
  constexpr int S = Work<T, K>::kStride, kRows = Team<T, K>::kRows;
  const int k = work.k;
#pragma unroll 1
  for (int first = 0; first < k; first += kRows) {
    work.sync();
    with_storage<T>(x.dtype, [&]<class X>(Type<X>) {
      const X* from = static_cast<const X*>(x.data) + work.at * work.n * k;
      work.each(K, [&](int r, int c) {  // stage = V1^T's rows from `first` on
        if (c < first || c >= first + kRows) return;
        stage[(c - first) * S + r] = reflector(r < k && c < r ? read(from[r * k + c]) : T(0), r, c, k);
      });
    });
    work.sync();
    z.add_product(t + first, stage, kRows < k - first ? kRows : k - first, S);
  }
}

template <class T, int K>
__global__ void __launch_bounds__(Team<T, K>::kBlock, Team<T, K>::kBlocks)
    householder_forward(rom_householder_forward_args a, Plan plan) {
  constexpr int S = Team<T, K>::kStride, kRows = Team<T, K>::kRows;
  ROM_DYNAMIC_SHARED(T, shared);
  const Work<T, K> work(a.x, a.workspace, plan);
  if (work.at >= work.batch) return;
  const int k = work.k;
  T* const m = shared + work.index * (Team<T, K>::kSquare + Team<T, K>::kStage);
  T* const stage = m + Team<T, K>::kSquare;
  const T sign = work.sign(a.signs);
  const auto fill = [&](int64_t first) {  // rows of V
    work.load(stage, kRows, a.x, first, [&](T x, int r, int c) { return reflector(x, first + r, c, k); });
  };
  if (work.sum_products(m, stage, stage, 0, fill)) return;
  if (work.does(kSolve)) {
    work.each(K, [&](int r, int c) {  // L
      T& element = m[r * S + c];
      element = r > c ? T(0) : r < c ? element : c < k ? element * T(0.5) : T(1);
    });
    work.sync();
    invert(work, m, stage, k);
    work.store(a.inverse, k, 0, [&](int r, int c) { return m[r * S + c]; });
    Square<T, K> z(work.thread);
    form_z(work, a.x, m, stage, z);
    work.replace(m, z);
    if (work.is_split()) work.store_square(work.kept(0), [&](int r, int c) { return m[r * S + c]; });
  }
  if (!work.does(kProducts)) return;
  if (work.is_split()) work.load_square(m, work.kept(0));
  work.each_stage(0, [&](int64_t first) {
    fill(first);
    work.sync();
    Stage<T, K> rows(work.thread);
    rows.add_product(stage, m, k < first + kRows ? k : static_cast<int>(first) + kRows, S);
    work.replace(stage, rows);
    work.store(a.q, kRows, first,
               [&](int r, int c) { return sign * ((first + r == c ? T(1) : T(0)) - stage[r * S + c]); });
  });
}

// With Y = V^T G: C = T^T Y; L's gradient is the upper triangle of C Z^T, M that triangle and its mirror image; the
// gradient of V is V M - G Z^T, and its first k rows lose C^T.
template <class T, int K>
__global__ void __launch_bounds__(Team<T, K>::kBlock, Team<T, K>::kBlocks)
    householder_backward(rom_householder_backward_args a, Plan plan) {
  constexpr int S = Team<T, K>::kStride, kRows = Team<T, K>::kRows, kSquare = Team<T, K>::kSquare;
  ROM_DYNAMIC_SHARED(T, shared);
  const Work<T, K> work(a.x, a.workspace, plan);
  if (work.at >= work.batch) return;
  const int k = work.k;
  T* const m = shared + work.index * (2 * kSquare + Team<T, K>::kStage);
  T *const z = m + kSquare, *const stage = z + kSquare;
  const T sign = work.sign(a.signs);
  const auto fill_v = [&](int64_t first) {
    work.load(stage, kRows, a.x, first, [&](T x, int r, int c) { return reflector(x, first + r, c, k); });
  };
  const auto fill = [&](int64_t first) {
    fill_v(first);
    work.load(z, kRows, a.grad, first, [&](T g, int, int) { return sign * g; });
  };
  T* const c_transposed = work.kept(0);
  if (work.sum_products(m, stage, z, 0, fill)) return;
  if (work.does(kSolve)) {
    work.load(z, K, a.inverse, 0, [](T t, int, int) { return t; });
    work.sync();
    Square<T, K> c(work.thread);
    c.add_transposed_product(z, m, k, S);
    work.replace(m, c);
    Square<T, K> product(work.thread);
    form_z(work, a.x, z, stage, product);
    work.sync();
    product.each_pack([&](int row, int column, T* pack) {  // Z^T
#pragma unroll
      for (int j = 0; j < Square<T, K>::kColumnPack; ++j) z[(column + j) * S + row] = pack[j];
    });
    work.store_square(c_transposed, [&](int i, int j) { return m[j * S + i]; });
    work.sync();
    Square<T, K> gradient(work.thread);
    gradient.add_product(m, z, k, S);
    work.replace(m, gradient);
    work.each(K, [&](int i, int j) {
      if (i > j) m[i * S + j] = m[j * S + i];
    });
    if (work.is_split()) {
      work.store_square(work.kept(1), [&](int i, int j) { return m[i * S + j]; });
      work.store_square(work.kept(2), [&](int i, int j) { return z[i * S + j]; });
    }
  }
  if (!work.does(kProducts)) return;
  if (work.is_split()) {
    work.load_square(m, work.kept(1));
    work.load_square(z, work.kept(2));
  }
  work.each_stage(0, [&](int64_t first) {
    Stage<T, K> rows(work.thread);
    fill_v(first);
    work.sync();
    rows.add_product(stage, m, k < first + kRows ? k : static_cast<int>(first) + kRows, S);
    work.sync();
    work.load(stage, kRows, a.grad, first, [&](T g, int, int) { return -sign * g; });
    work.sync();
    rows.add_product(stage, z, k, S);
    work.replace(stage, rows);
    work.store(a.grad_x, kRows, first, [&](int r, int c) {
      if (first + r <= c) return T(0);
      return stage[r * S + c] - (first + r < k ? c_transposed[(first + r) * k + c] : T(0));
    });
  });
}

// ---------------------------------------------------------------------------------------------------- launches
struct HouseholderForward {
  template <class T, int K>
  static Plan plan(const rom_tensor& x) {
    return plan_for<T, K>(x.size[0], x.size[1], 0, 1);
  }
  template <class T, int K>
  static int64_t elements(const rom_tensor&) {
    return Team<T, K>::kSquare + Team<T, K>::kStage;
  }
  template <class T, int K>
  static constexpr auto kernel = householder_forward<T, K>;
};

struct HouseholderBackward {
  template <class T, int K>
  static Plan plan(const rom_tensor& x) {
    return plan_for<T, K>(x.size[0], x.size[1], 1, 3);
  }
  template <class T, int K>
  static int64_t elements(const rom_tensor&) {
    return 2 * Team<T, K>::kSquare + Team<T, K>::kStage;
  }
  template <class T, int K>
  static constexpr auto kernel = householder_backward<T, K>;
};

}  // namespace
