// SPDX-License-Identifier: Apache-2.0
//
// Products of Householder reflections by the compact WY form, and their gradient. The formulas are in rom/orthogonal.h
// and rom.ops.householder. V, L and Z are triangles: products are done in strips of rows, each over the part of the sum
// that is not zero and the part of the result that is wanted.
#include "cpu/kernel.hpp"
#include "rom/orthogonal.h"

namespace {
#include "cpu/simd.hpp"

#include "cpu/dense.hpp"
#include "cpu/matrix_batch.hpp"

// Rows of a strip: few for small matrices, whose triangles they follow closely, more where each must load the right
// factor from the second-level cache again.
ROM_INLINE int64_t strip_of(int64_t k) { return k <= 128 ? 16 : 64; }
ROM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The upper triangle (in strips) of C = V^T V, or all of C = V^T B; row i of V^T begins at column i.
template <class E>
void gram_of_v(int64_t n, int64_t k, const E* v, E* c, int64_t ld) {
  each_strip(k, strip_of(k), n * k * k / 2, [&](int64_t i, int64_t rows) {
    const E* corner = v + i * ld + i;
    multiply<E>(rows, k - i, n - i, transposed(corner, ld), corner, ld, c + i * ld + i, ld);
  });
}
template <class E>
void multiply_v_transposed(int64_t n, int64_t k, const E* v, const E* b, E* c, int64_t ld) {
  each_strip(k, strip_of(k), n * k * k / 2, [&](int64_t i, int64_t rows) {
    multiply<E>(rows, k, n - i, transposed(v + i * ld + i, ld), b + i * ld, ld, c + i * ld, ld);
  });
}
// The upper triangle (in strips) of C = A B, where B is a lower triangle, or A and B are upper ones.
template <class E>
void multiply_upper(int64_t k, const E* a, const E* b, E* c, int64_t ld) {
  each_strip(k, strip_of(k), k * k * k / 3, [&](int64_t i, int64_t rows) {
    const int64_t corner = i * ld + i;
    multiply<E>(rows, k - i, k - i, plain(a + corner, ld), b + corner, ld, c + corner, ld);
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

  Forward(Arena& arena, int64_t n, int64_t k) : n(n), k(k), ld(leading<E>(k)) {
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
    gram_of_v<E>(n, k, v, t, ld);
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(k, [&](int64_t c) {
        const V value = read(t + i * ld + c);
        write(t + i * ld + c, choose_left_of<E>(i, c, V{}, choose_at<E>(i, c, value * (T)0.5, value)));
      });
    invert<E>(k, t, ld, scratch, true);
    multiply_upper<E>(k, t, top, z, ld);
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(k, [&](int64_t c) { write(z + i * ld + c, choose_left_of<E>(i, c, V{}, -read(z + i * ld + c))); });
    each_strip(n, strip_of(k), n * k * k, [&](int64_t i, int64_t rows) {  // row i of V ends at column i
      multiply<E>(rows, k, smaller(i + rows, k), plain(v + i * ld, ld), z, ld, q + i * ld, ld);
    });
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

  Backward(Arena& arena, int64_t n, int64_t k) : n(n), k(k), ld(leading<E>(k)) {
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
  // grad V = V M - G Z^T, and its first k rows lose C^T. Only its lower triangle is wanted.
  void gradient() const {
    const int64_t strip = strip_of(k);
    form_v<E>(k, v, top, ld);
    multiply_upper<E>(k, t, top, z, ld);
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(
          k, [&](int64_t j) { write(z + i * ld + j, choose_left_of<E>(i, j, VectorOf<E>{}, read(z + i * ld + j))); });
    multiply_v_transposed<E>(n, k, v, g, s, ld);
    each_strip(k, strip, k * k * k / 2, [&](int64_t i, int64_t rows) {  // row i of T^T ends at column i
      multiply<E>(rows, k, i + rows, transposed(t + i, ld), s, ld, c + i * ld, ld);
    });
    transpose<E>(k, z, top, ld);  // Z^T: row l ends at column l
    multiply_upper<E>(k, c, top, s, ld);
    transpose<E>(k, s, z, ld);
    for (int64_t i = 0; i < k; ++i)
      each_column<E>(k, [&](int64_t j) {
        E* at = s + i * ld + j;
        write(at, choose_left_of<E>(i, j, read(z + i * ld + j), read(at)));
      });
    negate<E>(k, top, ld);
    each_strip(k, strip, n * k * k / 2, [&](int64_t j, int64_t columns) {
      const int64_t corner = j * ld + j;
      multiply<E>(n - j, columns, k - j, plain(g + corner, ld), top + corner, ld, out + corner, ld);
    });
    each_strip(n, strip, n * k * k, [&](int64_t i, int64_t rows) {
      const int64_t end = smaller(i + rows, k);
      multiply<E>(rows, end, end, plain(v + i * ld, ld), s, ld, out + i * ld, ld, Into::add);
    });
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
