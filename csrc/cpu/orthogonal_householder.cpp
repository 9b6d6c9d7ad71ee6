// SPDX-License-Identifier: Apache-2.0
//
// Products of Householder reflections by the compact WY form, and their gradient. The formulas are in rom/orthogonal.h
// and rom.ops.householder. V, L and Z are triangles: products are done in strips of 16 rows, each over the part of the
// sum that is not zero.
#include "cpu/kernel.hpp"
#include "rom/orthogonal.h"

namespace {
#include "cpu/simd.hpp"

#include "cpu/dense.hpp"
#include "cpu/matrix_batch.hpp"

constexpr int64_t kStrip = 16;

// f(first row, rows) over strips of [0, n).
template <class F>
ROM_INLINE void each_strip(int64_t n, F f) {
  for (int64_t i = 0; i < n; i += kStrip) f(i, n - i < kStrip ? n - i : kStrip);
}
ROM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// C = V^T B, where row i of V^T begins at column i.
template <class E>
void multiply_v_transposed(int64_t n, int64_t k, const E* v, const E* b, E* c, int64_t ld) {
  each_strip(k, [&](int64_t i, int64_t rows) {
    multiply<E>(rows, k, n - i, transposed(v + i * ld + i, ld), b + i * ld, ld, c + i * ld, ld);
  });
}
// C = V B (or C += V B), where row i of V ends at column i.
template <class E>
void multiply_v(int64_t n, int64_t k, const E* v, const E* b, E* c, int64_t ld, Into into = Into::set) {
  each_strip(n, [&](int64_t i, int64_t rows) {
    multiply<E>(rows, k, smaller(i + rows, k), plain(v + i * ld, ld), b, ld, c + i * ld, ld, into);
  });
}

// V = tril(x, -1) + [I; 0], in x's place, and V1^T.
template <class E>
void form_v(int64_t k, E* x, E* top, int64_t ld) {
  using V = VectorOf<E>;
  const V one = broadcast((ScalarOfElement<E>)1);
  for (int64_t i = 0; i < k; ++i)
    each_column<E>(k, [&](int64_t c) {
      E* at = x + i * ld + c;
      write(at, choose_left_of<E>(i, c, read(at), choose_at<E>(i, c, one, V{})));
    });
  transpose<E>(k, x, top, ld);
}

// Z = T V1^T, both upper triangles.
template <class E>
void form_z(int64_t k, const E* t, const E* top, E* z, int64_t ld) {
  each_strip(k, [&](int64_t i, int64_t rows) {
    multiply<E>(rows, k, k - i, plain(t + i * ld + i, ld), top + i * ld, ld, z + i * ld, ld);
  });
}

template <class E>
void negate(int64_t k, E* a, int64_t ld) {
  for (int64_t i = 0; i < k; ++i) each_column<E>(k, [&](int64_t c) { write(a + i * ld + c, -read(a + i * ld + c)); });
}

// ------------------------------------------------------------------------------------------------ forward
template <class E>
struct Forward {
  using T = ScalarOfElement<E>;
  using V = VectorOf<E>;
  int64_t n, k, ld;
  E *v, *top, *t, *z, *q, *signs, *scratch;

  Forward(Arena& arena, int64_t n, int64_t k) : n(n), k(k), ld(padded<E>(k)) {
    const int64_t square = padded<E>(k) * ld;
    v = arena.take<E>(padded<E>(n) * ld);
    q = arena.take<E>(n * ld);
    top = arena.take<E>(square);
    t = arena.take<E>(square);
    z = arena.take<E>(square);
    signs = arena.take<E>(ld);
    scratch = arena.take<E>(invert_scratch<E>(k));
  }

  void run(const rom_householder_forward_args& a, const Group& group) const {
    group.load(a.x, n, v);
    form_v<E>(k, v, top, ld);
    multiply_v_transposed<E>(n, k, v, v, t, ld);
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(k, [&](int64_t c) {
        const V value = read(t + i * ld + c);
        write(t + i * ld + c, choose_left_of<E>(i, c, V{}, choose_at<E>(i, c, value * (T)0.5, value)));
      });
    invert<E>(k, t, ld, scratch, true);
    form_z<E>(k, t, top, z, ld);
    negate<E>(k, z, ld);
    multiply_v<E>(n, k, v, z, q, ld);
    for (int64_t i = 0; i < k; ++i) q[i * ld + i] += (T)1;
    if (a.signs.data) {
      group.load(a.signs, 1, signs);
      scale_columns<E>(n, k, signs, q, ld);
    }
    group.store(q, n, a.q);
    group.store(t, k, a.inverse);
  }
};

// ------------------------------------------------------------------------------------------------ backward
template <class E>
struct Backward {
  int64_t n, k, ld;
  E *v, *g, *top, *t, *z, *c, *s, *out, *signs;

  Backward(Arena& arena, int64_t n, int64_t k) : n(n), k(k), ld(padded<E>(k)) {
    const int64_t square = padded<E>(k) * ld;
    v = arena.take<E>(padded<E>(n) * ld);
    g = arena.take<E>(n * ld);
    out = arena.take<E>(n * ld);
    top = arena.take<E>(square);
    t = arena.take<E>(square);
    z = arena.take<E>(square);
    c = arena.take<E>(square);
    s = arena.take<E>(square);
    signs = arena.take<E>(ld);
  }

  void run(const rom_householder_backward_args& a, const Group& group) const {
    group.load(a.x, n, v);
    group.load(a.grad, n, g);
    group.load(a.inverse, k, t);
    if (a.signs.data) {
      group.load(a.signs, 1, signs);
      scale_columns<E>(n, k, signs, g, ld);
    }
    gradient();
    group.store(out, n, a.grad_x);
  }

 private:
  // C = T^T V^T G;  L's gradient is the upper triangle of C Z^T, M that triangle and its mirror image;
  // grad V = V M - G Z^T, and its first k rows lose C^T.
  void gradient() const {
    form_v<E>(k, v, top, ld);
    form_z<E>(k, t, top, z, ld);
    multiply_v_transposed<E>(n, k, v, g, s, ld);
    each_strip(k, [&](int64_t i, int64_t rows) {  // T^T: row i ends at column i
      multiply<E>(rows, k, i + rows, transposed(t + i, ld), s, ld, c + i * ld, ld);
    });
    transpose<E>(k, z, top, ld);  // Z^T: row l ends at column l
    multiply<E>(k, k, k, plain(c, ld), top, ld, s, ld);
    transpose<E>(k, s, z, ld);
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(k, [&](int64_t j) {
        E* at = s + i * ld + j;
        write(at, choose_left_of<E>(i, j, read(z + i * ld + j), read(at)));
      });
    negate<E>(k, top, ld);
    multiply<E>(n, k, k, plain(g, ld), top, ld, out, ld);
    multiply_v<E>(n, k, v, s, out, ld, Into::add);
    transpose<E>(k, c, z, ld);
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(k, [&](int64_t j) {
        E* at = out + i * ld + j;
        write(at, choose_left_of<E>(i, j, read(at) - read(z + i * ld + j), VectorOf<E>{}));
      });
  }
};

}  // namespace

ROM_CPU_WORKSPACE(rom_householder_forward, rom_householder_forward_args) { return batch_workspace<Forward>(a); }
ROM_CPU_KERNEL(rom_householder_forward, rom_householder_forward_args) { return run_batch<Forward>(a); }
ROM_CPU_WORKSPACE(rom_householder_backward, rom_householder_backward_args) { return batch_workspace<Backward>(a); }
ROM_CPU_KERNEL(rom_householder_backward, rom_householder_backward_args) { return run_batch<Backward>(a); }
