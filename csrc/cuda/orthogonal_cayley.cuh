// SPDX-License-Identifier: Apache-2.0
//
// The Cayley map of a batch of matrices, and its gradient. The formulas are in rom/orthogonal.h and rom.ops.cayley.
#pragma once
#include "cuda/orthogonal.cuh"

namespace {

// Without pivoting the error grows like |K - I|^2, in float32 to 2e-6 at 8. Beyond, K is inverted with pivoting, column
// by column, which alone leaves 6e-6 at 40 and 64 columns, and refined by a Newton step.
constexpr int kPivotAbove = 8;

// m = K from m = B^T B (or anything, if x is square); the squared Frobenius norm of K - I. x is read below the
// diagonal only.
template <class T, int K>
__device__ T form_kernel(const Work<T, K>& work, const rom_tensor& x, T* m, T* scratch) {
  constexpr int S = Work<T, K>::kStride;
  const bool tall = work.n > work.k;
  T squares = 0;
  with_storage<T>(x.dtype, [&]<class X>(Type<X>) {
    typename Work<T, K>::template Elements<const X> from(work, x, 0);
    const int end = from.end < work.k ? from.end : work.k;
    const auto next = [&](int r, int c) {
      const T half = c < r && r < end ? read(*from.at) * T(0.5) : T(0);
      from.at += from.step;
      return half;
    };
    if (!tall)
      return work.template each<4>(K, [&](int r, int c) {
        const T half = next(r, c), one = c == r ? T(1) : T(0);
        squares = fma(2 * half, half, squares);
        if (c <= r) m[r * S + c] = one - half, m[c * S + r] = one + half;
      });
    work.each(K, [&](int r, int c) {
      const T half = next(r, c);
      if (c > r) return;
      T *below = m + r * S + c, *above = m + c * S + r;
      const T lower = fma(T(0.25), *below, -half), upper = fma(T(0.25), *above, half);
      squares = fma(lower, lower, c < r ? fma(upper, upper, squares) : squares);
      *below = c < r ? lower : lower + T(1);
      *above = c < r ? upper : upper + T(1);
    });
  });
  return work.sum(squares, scratch);
}

// R in m += (I - R K) R, with K in `kept` and R's new rows on their way through `inverse`, which may be `kept`, if a
// stage has room for all rows. The residual's sums are in double: in float32 they cost Q five times its error.
template <class T, int K>
__device__ void refine(const Work<T, K>& work, T* m, T* stage, const T* kept, T* inverse) {
  constexpr int S = Work<T, K>::kStride, kRows = Team<T, K>::kRows;
  const int k = work.k;
#pragma unroll 1
  for (int first = 0; first < k; first += kRows) {
    work.each(kRows, [&](int r, int c) {
      const T* row = m + (first + r) * S;
      double residual = first + r == c ? 1 : 0;
      for (int l = 0; c < k && l < k; ++l)
        residual = fma(-static_cast<double>(row[l]), static_cast<double>(kept[l * k + c]), residual);
      stage[r * S + c] = c < k ? static_cast<T>(residual) : T(0);
    });
    work.sync();
    Stage<T, K> change(work.thread);
    change.add_product(stage, m, k, S);
    work.replace(stage, change);
    work.each(k - first < kRows ? k - first : kRows, [&](int r, int c) {
      if (c < k) inverse[(first + r) * k + c] = m[(first + r) * S + c] + stage[r * S + c];
    });
  }
  work.load_square(m, inverse);  // a thread reads what it has written
}

template <class T, int K>
__global__ void __launch_bounds__(Team<T, K>::kBlock, K == 128 ? 2 : Team<T, K>::kBlocks)
    cayley_forward(rom_cayley_forward_args a, Plan plan) {
  constexpr int S = Team<T, K>::kStride;
  ROM_DYNAMIC_SHARED(T, shared);
  const Work<T, K> work(a.x, a.workspace, plan);
  if (work.at >= work.batch) return;
  const int k = work.k;
  const bool tall = work.n > k;
  T* const m = shared + work.index * (Team<T, K>::kSquare + Team<T, K>::kStage);
  T* const stage = m + Team<T, K>::kSquare;  // also for eliminations
  const auto plain = [](T x, int, int) { return x; };
  const auto fill = [&](int64_t first) { work.load(stage, Team<T, K>::kRows, a.x, first, plain); };
  if (tall && work.sum_products(m, stage, stage, k, fill)) return;
  const T sign = work.sign(a.signs);
  if (work.does(kSolve)) {
    const T squares = form_kernel(work, a.x, m, stage);
    work.sync();
    if (squares <= T(kPivotAbove * kPivotAbove)) {
      invert(work, m, stage, k);
    } else {  // or NaN
      T* const inverse = static_cast<T*>(a.inverse.data) + work.at * k * k;
      T* const kept = K > Team<T, K>::kRows ? work.kept(0) : inverse;
      work.store_square(kept, [&](int r, int c) { return m[r * S + c]; });
      invert_pivoted(work, m, stage, k);
      refine(work, m, stage, kept, inverse);
    }
    work.store(a.inverse, k, 0, [&](int r, int c) { return m[r * S + c]; });
    work.store(a.q, k, 0, [&](int r, int c) { return sign * fma(T(2), m[r * S + c], r == c ? T(-1) : T(0)); });
  }
  if (!tall || !work.does(kProducts)) return;
  if (work.is_split()) work.load(m, K, a.inverse, 0, plain);
  work.each_stage(k, [&](int64_t first) {
    fill(first);
    work.sync();
    Stage<T, K> rows(work.thread);
    rows.add_product(stage, m, k, S);
    work.replace(stage, rows);
    work.store(a.q, Team<T, K>::kRows, first, [&](int r, int c) { return sign * stage[r * S + c]; });
  });
}

template <class T, int K>
__global__ void __launch_bounds__(Team<T, K>::kBlock, Team<T, K>::kBlocks)
    cayley_backward(rom_cayley_backward_args a, Plan plan) {
  constexpr int S = Team<T, K>::kStride, kRows = Team<T, K>::kRows, kSquare = Team<T, K>::kSquare;
  ROM_DYNAMIC_SHARED(T, shared);
  const Work<T, K> work(a.x, a.workspace, plan);
  if (work.at >= work.batch) return;
  const int k = work.k;
  const bool tall = work.n > k;
  T* const m = shared + work.index * (2 * kSquare + (tall ? Team<T, K>::kStage : 0));
  T *const r = m + kSquare, *const stage = r + kSquare;
  const T sign = work.sign(a.signs);
  const auto plain = [](T x, int, int) { return x; };
  const auto signed_ = [&](T x, int, int) { return sign * x; };
  const auto fill = [&](int64_t first) {
    work.load(stage, kRows, a.x, first, plain);
    work.load(r, kRows, a.grad, first, signed_);
  };
  if (tall && work.sum_products(m, stage, r, k, fill)) return;
  if (work.does(kSolve)) {
    // S = 2 G1 + B^T G2, the gradient of R
    work.load(m, K, a.grad, 0,
              [&](T g, int i, int c) { return i < k ? fma(2 * sign, g, tall ? m[i * S + c] : T(0)) : T(0); });
    work.load(r, K, a.inverse, 0, plain);
    work.sync();
    Square<T, K> product(work.thread);
    product.add_transposed_product(m, r, k, S);
    work.replace(m, product);
    Square<T, K> w(work.thread);  // W = R S^T R, minus K's gradient transposed
    w.add_product(r, m, k, S);
    work.replace(m, w);
    work.store(a.grad_x, k, 0, [&](int i, int c) { return i > c ? (m[c * S + i] - m[i * S + c]) * T(0.5) : T(0); });
    if (!tall) return;
    work.each(K, [&](int i, int c) {  // -(W + W^T) / 4, of elements that no other thread has read
      if (i < c) return;
      const T mean = (m[i * S + c] + m[c * S + i]) * T(-0.25);
      m[i * S + c] = mean, m[c * S + i] = mean;
    });
    work.sync();
    if (work.is_split()) work.store_square(work.kept(0), [&](int i, int c) { return m[i * S + c]; });
  }
  if (!work.does(kProducts)) return;
  if (work.is_split()) work.load_square(m, work.kept(0));
  const T* inverse = static_cast<const T*>(a.inverse.data) + work.at * k * k;
  work.each(K, [&](int i, int c) { r[c * S + i] = i < k && c < k ? inverse[i * k + c] : T(0); });  // R^T
  work.each_stage(k, [&](int64_t first) {
    Stage<T, K> rows(work.thread);
    work.load(stage, kRows, a.grad, first, signed_);
    work.sync();
    rows.add_product(stage, r, k, S);
    work.sync();
    work.load(stage, kRows, a.x, first, plain);
    work.sync();
    rows.add_product(stage, m, k, S);
    work.replace(stage, rows);
    work.store(a.grad_x, kRows, first, [&](int i, int c) { return stage[i * S + c]; });
  });
}

// ---------------------------------------------------------------------------------------------------- launches
struct CayleyForward {
  template <class T, int K>
  static Plan plan(const rom_tensor& x) {
    constexpr int kKept = K > Team<T, K>::kRows ? 1 : 0;
    return plan_for<T, K>(x.size[0], x.size[1] - x.size[2], kKept, kKept);
  }
  template <class T, int K>
  static int64_t elements(const rom_tensor&) {
    return Team<T, K>::kSquare + Team<T, K>::kStage;
  }
  template <class T, int K>
  static constexpr auto kernel = cayley_forward<T, K>;
};

struct CayleyBackward {
  template <class T, int K>
  static Plan plan(const rom_tensor& x) {
    return plan_for<T, K>(x.size[0], x.size[1] - x.size[2], 0, 1);
  }
  template <class T, int K>
  static int64_t elements(const rom_tensor& x) {
    return 2 * Team<T, K>::kSquare + (x.size[1] > x.size[2] ? Team<T, K>::kStage : 0);
  }
  template <class T, int K>
  static constexpr auto kernel = cayley_backward<T, K>;
};

}  // namespace
