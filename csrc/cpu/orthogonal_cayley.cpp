// SPDX-License-Identifier: Apache-2.0
//
// The Cayley map of a batch of matrices, and its gradient. The formulas are in rom/orthogonal.h and rom.ops.cayley;
// every product is in registers and cache (dense.hpp), so one pass over memory does a matrix.
#include "cpu/kernel.hpp"
#include "rom/orthogonal.h"

namespace {
#include "cpu/simd.hpp"

#include "cpu/dense.hpp"
#include "cpu/matrix_batch.hpp"

// The error without pivoting grows like |S|^2, S = K - I: in float32 3e-6 at |S| = 8, 1e-4 at 100. Up to 64 a Newton
// step repairs it, at a third of the price of pivoting; beyond that its residual is too large.
constexpr double kRefineAbove = 8, kPivotAbove = 64;

// ------------------------------------------------------------------------------------------------ forward
template <class E>
struct Forward {
  E *x, *r, *q, *signs, *scratch, *kept;
  ScalarOfElement<E>*one, *row;  // for pivoting: the matrices of the lanes, a row
  int32_t* order;
  Forward(Arena& arena, int64_t n, int64_t k) {
    const int64_t ld = padded<E>(k);
    x = arena.take<E>(padded<E>(n) * ld);
    r = arena.take<E>(k * ld);
    q = arena.take<E>(padded<E>(n) * ld);
    kept = arena.take<E>(padded<E>(k) * ld);
    signs = arena.take<E>(ld);
    scratch = arena.take<E>(invert_scratch<E>(k));
    one = arena.take<ScalarOfElement<E>>(group_size<E> > 1 ? group_size<E> * k * k : 0);
    row = arena.take<ScalarOfElement<E>>(k);
    order = arena.take<int32_t>(k);
  }
};

// r = K, and the squared Frobenius norm of K - I (per lane).
template <class E>
E form_kernel(int64_t n, int64_t k, const Forward<E>& w, int64_t ld) {
  using T = ScalarOfElement<E>;
  using V = VectorOf<E>;
  E *lower = w.q, *upper = w.kept;  // not in use yet
  for (int64_t i = 0; i < padded<E>(k); ++i)
    each_column<E>(k, [&](int64_t c) {
      write(lower + i * ld + c, i < k ? choose_left_of<E>(i, c, read(w.x + i * ld + c), V{}) : V{});
    });
  transpose<E>(k, lower, upper, ld);
  if (n > k) multiply<E>(k, k, n - k, transposed(w.x + k * ld, ld), w.x + k * ld, ld, w.r, ld);
  V squares{};
  for (int64_t i = 0; i < k; ++i)
    each_column<E>(k, [&](int64_t c) {
      const V gram = n > k ? read(w.r + i * ld + c) : V{};
      const V value = gram * (T)0.25 - (read(lower + i * ld + c) - read(upper + i * ld + c)) * (T)0.5;
      squares = fma(value, value, squares);
      write(w.r + i * ld + c, choose_at<E>(i, c, value + (T)1, value));
    });
  if constexpr (group_size<E> == 1)
    return sum<T>(squares);
  else
    return squares;
}

// R += R (I - K R) with K in `kept`; of lanes, only those that need it.
template <class E>
void refine(int64_t k, E squares, const Forward<E>& w, int64_t ld) {
  using T = ScalarOfElement<E>;
  using V = VectorOf<E>;
  multiply<E>(k, k, k, plain(w.kept, ld), w.r, ld, w.q, ld);
  for (int64_t i = 0; i < k; ++i)
    each_column<E>(k, [&](int64_t c) {
      const V product = read(w.q + i * ld + c);
      write(w.q + i * ld + c, choose_at<E>(i, c, (T)1 - product, -product));
      write(w.kept + i * ld + c, read(w.r + i * ld + c));
    });
  multiply<E>(k, k, k, plain(w.kept, ld), w.q, ld, w.r, ld, Into::add);
  if constexpr (group_size<E> > 1)
    for (int64_t e = 0; e < k * k; ++e) w.r[e] = squares > (T)(kRefineAbove * kRefineAbove) ? w.r[e] : w.kept[e];
}

// r = K^-1. Lanes go on together; those that need pivoting are done again, one by one.
template <class E>
void invert_guarded(int64_t k, E squares, const Forward<E>& w, int64_t ld) {
  using T = ScalarOfElement<E>;
  T norm[group_size<E>];
  __builtin_memcpy(norm, &squares, sizeof(norm));
  bool far = false, pivoting = false;
  for (const T value : norm) {
    far |= value > (T)(kRefineAbove * kRefineAbove);
    pivoting |= !(value <= (T)(kPivotAbove * kPivotAbove));  // or NaN
  }
  if constexpr (group_size<E> == 1)
    if (pivoting) return invert_pivoted<T>(k, w.r, ld, w.row, w.order);
  if (far || pivoting) __builtin_memcpy(w.kept, w.r, (size_t)(k * ld) * sizeof(E));
  if constexpr (group_size<E> > 1)
    for (int lane = 0; pivoting && lane < group_size<E>; ++lane)
      if (!(norm[lane] <= (T)(kPivotAbove * kPivotAbove))) {
        T* one = w.one + lane * k * k;
        for (int64_t e = 0; e < k * k; ++e) one[e] = w.r[e][lane];
        invert_pivoted<T>(k, one, k, w.row, w.order);
      }
  invert<E>(k, w.r, ld, w.scratch);
  if (far) refine<E>(k, squares, w, ld);
  if constexpr (group_size<E> > 1)
    for (int lane = 0; pivoting && lane < group_size<E>; ++lane)
      if (!(norm[lane] <= (T)(kPivotAbove * kPivotAbove)))
        for (int64_t e = 0; e < k * k; ++e) w.r[e][lane] = w.one[lane * k * k + e];
}

template <class E>
void forward(int64_t n, int64_t k, const Forward<E>& w, bool has_signs) {
  using T = ScalarOfElement<E>;
  const int64_t ld = padded<E>(k);
  invert_guarded<E>(k, form_kernel<E>(n, k, w, ld), w, ld);
  for (int64_t i = 0; i < k; ++i)
    each_column<E>(k, [&](int64_t c) {
      const VectorOf<E> twice = read(w.r + i * ld + c) * (T)2;
      write(w.q + i * ld + c, choose_at<E>(i, c, twice - (T)1, twice));
    });
  multiply<E>(n - k, k, k, plain(w.x + k * ld, ld), w.r, ld, w.q + k * ld, ld);
  if (has_signs) scale_columns<E>(n, k, w.signs, w.q, ld);
}

template <class E>
void forward_batch(const rom_cayley_forward_args& a) {
  using T = ScalarOfElement<E>;
  const int64_t n = a.x.size[1], k = a.x.size[2];
  const T *x = (const T*)a.x.data, *signs = (const T*)a.signs.data;
  T *q = (T*)a.q.data, *inverse = (T*)a.inverse.data;
  each_group<Forward, E>(a.x.size[0], n, k, a.launch, a.workspace.data,
                         [&](const Forward<E>& w, int64_t first, int64_t count) {
                           load_group(x + first * n * k, count, n, k, w.x);
                           if (signs) load_group(signs + first * k, count, 1, k, w.signs);
                           forward<E>(n, k, w, signs != nullptr);
                           store_group(w.q, count, n, k, q + first * n * k);
                           store_group(w.r, count, k, k, inverse + first * k * k);
                         });
}

// ------------------------------------------------------------------------------------------------ backward
template <class E>
struct Backward {
  E *x, *g, *r, *s, *t, *out, *signs;
  Backward(Arena& arena, int64_t n, int64_t k) {
    const int64_t ld = padded<E>(k);
    const int64_t square = padded<E>(k) * ld;
    x = arena.take<E>(n * ld);
    g = arena.take<E>(n * ld);
    out = arena.take<E>(n * ld);
    r = arena.take<E>(square);
    s = arena.take<E>(square);
    t = arena.take<E>(square);
    signs = arena.take<E>(ld);
  }
};

// S = 2 G1 + B^T G2 (the gradient of R), W = R S^T R = -(gradient of K)^T; then
// grad X1 = tril((W^T - W) / 2, -1) and grad B = G2 R^T - B (W + W^T) / 4.
template <class E>
void backward(int64_t n, int64_t k, const Backward<E>& w, bool has_signs) {
  using T = ScalarOfElement<E>;
  const int64_t ld = padded<E>(k);
  const E *below = w.x + k * ld, *grad_below = w.g + k * ld;
  if (has_signs) scale_columns<E>(n, k, w.signs, w.g, ld);
  for (int64_t i = 0; i < k; ++i)
    each_column<E>(k, [&](int64_t c) { write(w.s + i * ld + c, read(w.g + i * ld + c) * (T)2); });
  if (n > k) multiply<E>(k, k, n - k, transposed(below, ld), grad_below, ld, w.s, ld, Into::add);
  multiply<E>(k, k, k, transposed(w.s, ld), w.r, ld, w.t, ld);
  multiply<E>(k, k, k, plain(w.r, ld), w.t, ld, w.s, ld);  // W
  transpose<E>(k, w.s, w.t, ld);
  for (int64_t i = 0; i < k; ++i)
    each_column<E>(k, [&](int64_t c) {
      const VectorOf<E> a = read(w.s + i * ld + c), b = read(w.t + i * ld + c);
      write(w.out + i * ld + c, choose_left_of<E>(i, c, (b - a) * (T)0.5, VectorOf<E>{}));
      write(w.s + i * ld + c, (a + b) * (T)-0.25);
    });
  if (n == k) return;
  transpose<E>(k, w.r, w.t, ld);
  multiply<E>(n - k, k, k, plain(grad_below, ld), w.t, ld, w.out + k * ld, ld);
  multiply<E>(n - k, k, k, plain(below, ld), w.s, ld, w.out + k * ld, ld, Into::add);
}

template <class E>
void backward_batch(const rom_cayley_backward_args& a) {
  using T = ScalarOfElement<E>;
  const int64_t n = a.x.size[1], k = a.x.size[2];
  const T *x = (const T*)a.x.data, *grad = (const T*)a.grad.data, *inverse = (const T*)a.inverse.data;
  const T* signs = (const T*)a.signs.data;
  T* grad_x = (T*)a.grad_x.data;
  each_group<Backward, E>(a.x.size[0], n, k, a.launch, a.workspace.data,
                          [&](const Backward<E>& w, int64_t first, int64_t count) {
                            if (n > k) load_group(x + first * n * k, count, n, k, w.x);
                            load_group(grad + first * n * k, count, n, k, w.g);
                            load_group(inverse + first * k * k, count, k, k, w.r);
                            if (signs) load_group(signs + first * k, count, 1, k, w.signs);
                            backward<E>(n, k, w, signs != nullptr);
                            store_group(w.out, count, n, k, grad_x + first * n * k);
                          });
}

}  // namespace

ROM_CPU_WORKSPACE(rom_cayley_forward, rom_cayley_forward_args) { return group_workspace<Forward>(a.x, a.launch); }
ROM_CPU_KERNEL(rom_cayley_forward, rom_cayley_forward_args) {
  const bool known = with_element(a.x, [&]<class E>(Type<E>) { forward_batch<E>(a); });
  return known ? ROM_OK : rom_fail(ROM_UNSUPPORTED, "dtype %d of x", a.x.dtype);
}
ROM_CPU_WORKSPACE(rom_cayley_backward, rom_cayley_backward_args) { return group_workspace<Backward>(a.x, a.launch); }
ROM_CPU_KERNEL(rom_cayley_backward, rom_cayley_backward_args) {
  const bool known = with_element(a.x, [&]<class E>(Type<E>) { backward_batch<E>(a); });
  return known ? ROM_OK : rom_fail(ROM_UNSUPPORTED, "dtype %d of x", a.x.dtype);
}
