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
#include "cpu/orthogonal_registers.hpp"

// The error without pivoting grows like |S|^2, S = K - I (Frobenius): in float32 3e-6 at |S| = 8, 1e-4 at 100. Beyond 8
// a matrix in rows is inverted with pivoting, and Q gets a Newton-Schulz step. From 128 columns on |S| is spread over
// more directions and the bound grows (at 512 training begins near 11, where the error is 2e-6). Lanes, which cannot
// pivot together, get a Newton step of the inverse up to 64 and are pivoted one by one beyond.
constexpr double kFarAbove = 8, kPivotLanesAbove = 64;

// ------------------------------------------------------------------------------------------------ the inverse
template <class E>
struct Inverse {
  using T = ScalarOfElement<E>;
  using V = VectorOf<E>;
  int64_t n, k, ld;
  E *r, *kept, *spare, *scratch;
  T *one, *scratch_of_one;  // for pivoting: the matrices of the lanes, as rows
  int32_t* order;

  Inverse(Arena& arena, int64_t n, int64_t k) : n(n), k(k), ld(leading<E>(k)) {
    const int64_t square = padded<E>(k) * ld;
    r = arena.take<E>(square);
    kept = arena.take<E>(square);
    spare = arena.take<E>(square);
    scratch = arena.take<E>(invert_scratch<E>(k));
    const bool lanes_too = group_size<E> > 1;
    one = arena.take<T>(lanes_too ? group_size<E> * rows_size() : 0);
    scratch_of_one = arena.take<T>(lanes_too ? invert_scratch<T>(k) : 0);
    order = arena.take<int32_t>(k);
  }

  // r = K^-1; whether Q = 2 R - I needs a step towards orthogonality.
  bool of(const E* x) const {
    const auto squares = form(x);
    if constexpr (group_size<E> == 1) {
      const bool near = squares <= far();  // not of a NaN
      if (near)
        invert<E>(k, r, ld, scratch);
      else
        invert_pivoted<E>(k, r, ld, scratch, order);
      return !near;
    } else {
      of_lanes(squares);
      return false;
    }
  }

 private:
  // Of squared norms; NaN is pivoted.
  T far() const { return (T)(kFarAbove * kFarAbove) * (k > 128 ? (T)k / (T)128 : (T)1); }
  static bool pivoted(T squares) { return !(squares <= (T)(kPivotLanesAbove * kPivotLanesAbove)); }
  int64_t rows_size() const { return padded<T>(k) * leading<T>(k); }

  // Lanes go on together; those that need pivoting are done again, one by one.
  void of_lanes(E squares) const {
    bool some_far = false, some_pivoted = false;
    for (int lane = 0; lane < group_size<E>; ++lane) {
      some_far |= squares[lane] > far();
      some_pivoted |= pivoted(squares[lane]);
    }
    if (some_far) __builtin_memcpy(kept, r, (size_t)(k * ld) * sizeof(E));
    for (int lane = 0; some_pivoted && lane < group_size<E>; ++lane)
      if (pivoted(squares[lane])) invert_lane(lane);
    invert<E>(k, r, ld, scratch);
    if (some_far) refine(squares);
    for (int lane = 0; some_pivoted && lane < group_size<E>; ++lane)
      if (pivoted(squares[lane]))
        for (int64_t i = 0; i < k; ++i)
          for (int64_t j = 0; j < k; ++j) r[i * k + j][lane] = one[lane * rows_size() + i * leading<T>(k) + j];
  }

  // one[lane] = K^-1 of the lane, with pivoting.
  void invert_lane(int lane) const {
    T* to = one + lane * rows_size();
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < leading<T>(k); ++j) to[i * leading<T>(k) + j] = j < k ? r[i * k + j][lane] : (T)0;
    invert_pivoted<T>(k, to, leading<T>(k), scratch_of_one, order);
  }

  // r = K; the squared Frobenius norm of K - I (per lane).
  E form(const E* x) const {
    E *lower = spare, *upper = kept;  // not in use yet
    for (int64_t i = 0; i < padded<E>(k); ++i)
      each_column<E>(k, [&](int64_t c) {
        write(lower + i * ld + c, i < k ? choose_left_of<E>(i, c, read(x + i * ld + c), V{}) : V{});
      });
    transpose<E>(k, lower, upper, ld);
    if (n > k) multiply<E>(k, k, n - k, transposed(x + k * ld, ld), x + k * ld, ld, r, ld);
    V squares{};
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(k, [&](int64_t c) {
        const V gram = n > k ? read(r + i * ld + c) : V{};
        const V value = gram * (T)0.25 - (read(lower + i * ld + c) - read(upper + i * ld + c)) * (T)0.5;
        squares = fma(value, value, squares);
        write(r + i * ld + c, choose_at<E>(i, c, value + (T)1, value));
      });
    if constexpr (group_size<E> == 1)
      return sum<T>(squares);
    else
      return squares;
  }

  // Lanes that need it: R += R (I - K R), with K in `kept`.
  void refine(E squares) const {
    multiply<E>(k, k, k, plain(kept, ld), r, ld, spare, ld);
    for (int64_t e = 0; e < k * k; ++e) spare[e] = e % (k + 1) ? -spare[e] : (T)1 - spare[e];
    __builtin_memcpy(kept, r, (size_t)(k * k) * sizeof(E));
    multiply<E>(k, k, k, plain(kept, ld), spare, ld, r, ld, Into::add);
    for (int64_t e = 0; e < k * k; ++e) r[e] = squares > far() ? r[e] : kept[e];
  }
};

// ------------------------------------------------------------------------------------------------ forward
template <class E>
struct Forward {
  using T = ScalarOfElement<E>;
  int64_t n, k, ld;
  Inverse<E> inverse;
  E *x, *q, *signs;

  Forward(Arena& arena, int64_t n, int64_t k) : n(n), k(k), ld(leading<E>(k)), inverse(arena, n, k) {
    x = arena.take<E>(padded<E>(n) * ld);
    q = arena.take<E>(padded<E>(n) * ld);
    signs = arena.take<E>(ld);
  }

  void run(const rom_cayley_forward_args& a, const Group& group) const {
    group.load(a.x, n, x);
    const bool far = inverse.of(x);
    const E* r = inverse.r;
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(k, [&](int64_t c) {
        const VectorOf<E> twice = read(r + i * ld + c) * (T)2;
        write(q + i * ld + c, choose_at<E>(i, c, twice - (T)1, twice));
      });
    multiply<E>(n - k, k, k, plain(x + k * ld, ld), r, ld, q + k * ld, ld);
    if (far) polish();
    if (a.signs.data) {
      group.load(a.signs, 1, signs);
      scale_columns<E>(n, k, signs, q, ld);
    }
    group.store(q, n, a.q);
  }

 private:
  // Q += Q (I - Q^T Q) / 2; overwrites x.
  void polish() const {
    E* error = inverse.spare;
    multiply<E>(k, k, n, transposed(q, ld), q, ld, error, ld);
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(k, [&](int64_t c) {
        const VectorOf<E> half = read(error + i * ld + c) * (T)-0.5;
        write(error + i * ld + c, choose_at<E>(i, c, half + (T)0.5, half));
      });
    multiply<E>(n, k, k, plain(q, ld), error, ld, x, ld);
    for (int64_t i = 0; i < n; ++i)
      each_column<E>(k, [&](int64_t c) { write(q + i * ld + c, read(q + i * ld + c) + read(x + i * ld + c)); });
  }
};

// ------------------------------------------------------------------------------------------------ backward
// Below this mean of R's diagonal the rounding of Q1 = 2 R - I is more than 4 units in the last place of R: as a
// 32-bit number it says nothing about an R of 1e-8.
constexpr double kAgainBelow = 1.0 / 64;

template <class E>
struct Backward {
  using T = ScalarOfElement<E>;
  using V = VectorOf<E>;
  int64_t n, k, ld;
  Inverse<E> inverse;
  E *x, *g, *s, *t, *out, *signs;

  Backward(Arena& arena, int64_t n, int64_t k) : n(n), k(k), ld(leading<E>(k)), inverse(arena, n, k) {
    const int64_t square = padded<E>(k) * ld;
    x = arena.take<E>(n * ld);
    g = arena.take<E>(n * ld);
    out = arena.take<E>(n * ld);
    s = arena.take<E>(square);
    t = arena.take<E>(square);
    signs = arena.take<E>(ld);
  }

  void run(const rom_cayley_backward_args& a, const Group& group) const {
    if (n > k) group.load(a.x, n, x);
    group.load(a.grad, n, g);
    group.load(a.q, k, s);
    if (a.signs.data) {
      group.load(a.signs, 1, signs);
      scale_columns<E>(n, k, signs, g, ld);
      scale_columns<E>(k, k, signs, s, ld);
    }
    recover(a, group);
    gradient();
    group.store(out, n, a.grad_x);
  }

 private:
  // R from Q1 in s, or from x.
  void recover(const rom_cayley_backward_args& a, const Group& group) const {
    T trace[group_size<E>] = {};
    for (int64_t i = 0; i < k; ++i)
      for (int lane = 0; lane < group_size<E>; ++lane) trace[lane] += ((const T*)(s + i * ld + i))[lane];
    bool again = false;
    for (int lane = 0; lane < group.count; ++lane) again |= near_zero(trace[lane]);
    if (again) {
      group.load(a.x, n, x);
      inverse.of(x);
    }
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(k, [&](int64_t c) {
        const V half = read(s + i * ld + c) * (T)0.5;
        V value = choose_at<E>(i, c, half + (T)0.5, half);
        E* at = inverse.r + i * ld + c;
        if (again)
          for (int lane = 0; lane < lanes<T>; ++lane)
            if (near_zero(trace[group_size<E> > 1 ? lane : 0])) value[lane] = read(at)[lane];
        write(at, value);
      });
  }
  // Whether the trace of R = (Q1 + I) / 2 is; NaN too.
  bool near_zero(T trace_of_q) const { return !((T)k + trace_of_q >= (T)(2 * kAgainBelow) * (T)k); }

  // S = 2 G1 + B^T G2 (the gradient of R), W = R S^T R = -(gradient of K)^T; then
  // grad X1 = tril((W^T - W) / 2, -1) and grad B = G2 R^T - B (W + W^T) / 4.
  void gradient() const {
    const E *r = inverse.r, *below = x + k * ld, *grad_below = g + k * ld;
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(k, [&](int64_t c) { write(s + i * ld + c, read(g + i * ld + c) * (T)2); });
    if (n > k) multiply<E>(k, k, n - k, transposed(below, ld), grad_below, ld, s, ld, Into::add);
    multiply<E>(k, k, k, transposed(s, ld), r, ld, t, ld);
    multiply<E>(k, k, k, plain(r, ld), t, ld, s, ld);  // W
    transpose<E>(k, s, t, ld);
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(k, [&](int64_t c) {
        const V w = read(s + i * ld + c), mirrored = read(t + i * ld + c);
        write(out + i * ld + c, choose_left_of<E>(i, c, (mirrored - w) * (T)0.5, V{}));
        write(s + i * ld + c, (w + mirrored) * (T)-0.25);
      });
    if (n == k) return;
    transpose<E>(k, r, t, ld);
    multiply<E>(n - k, k, k, plain(grad_below, ld), t, ld, out + k * ld, ld);
    multiply<E>(n - k, k, k, plain(below, ld), s, ld, out + k * ld, ld, Into::add);
  }
};

}  // namespace

ROM_CPU_WORKSPACE(rom_cayley_forward, rom_cayley_forward_args) { return batch_workspace<Forward>(a); }
ROM_CPU_KERNEL(rom_cayley_forward, rom_cayley_forward_args) {
#if defined(__AVX512F__)
  const float *x = (const float*)a.x.data, *signs = (const float*)a.signs.data;
  if (in_registers(a.x))
    return run_in_registers<Forward>(a, [&](int64_t e, int64_t s) {
      return forward_registers(x + e, signs ? signs + s : nullptr, (int)a.x.size[1], kFarAbove, (float*)a.q.data + e);
    });
#endif
  return run_batch<Forward>(a);
}

ROM_CPU_WORKSPACE(rom_cayley_backward, rom_cayley_backward_args) { return batch_workspace<Backward>(a); }
ROM_CPU_KERNEL(rom_cayley_backward, rom_cayley_backward_args) {
#if defined(__AVX512F__)
  const float *grad = (const float*)a.grad.data, *q = (const float*)a.q.data, *signs = (const float*)a.signs.data;
  if (in_registers(a.x))
    return run_in_registers<Backward>(a, [&](int64_t e, int64_t s) {
      return backward_registers(grad + e, q + e, signs ? signs + s : nullptr, (int)a.x.size[1], (float)kAgainBelow,
                                (float*)a.grad_x.data + e);
    });
#endif
  return run_batch<Backward>(a);
}
