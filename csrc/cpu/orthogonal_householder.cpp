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
  E *v, *top, *t, *z, *q, *signs, *scratch;
  Forward(Arena& arena, int64_t n, int64_t k) {
    const int64_t ld = padded<E>(k);
    const int64_t square = padded<E>(k) * ld;
    v = arena.take<E>(padded<E>(n) * ld);
    q = arena.take<E>(n * ld);
    top = arena.take<E>(square);
    t = arena.take<E>(square);
    z = arena.take<E>(square);
    signs = arena.take<E>(ld);
    scratch = arena.take<E>(invert_scratch<E>(k));
  }
};

template <class E>
void forward(int64_t n, int64_t k, const Forward<E>& w, bool has_signs) {
  using T = ScalarOfElement<E>;
  using V = VectorOf<E>;
  const int64_t ld = padded<E>(k);
  form_v<E>(k, w.v, w.top, ld);
  multiply_v_transposed<E>(n, k, w.v, w.v, w.t, ld);
  for (int64_t i = 0; i < k; ++i)
    each_column<E>(k, [&](int64_t c) {
      const V value = read(w.t + i * ld + c);
      write(w.t + i * ld + c, choose_left_of<E>(i, c, V{}, choose_at<E>(i, c, value * (T)0.5, value)));
    });
  invert<E>(k, w.t, ld, w.scratch, true);
  form_z<E>(k, w.t, w.top, w.z, ld);
  negate<E>(k, w.z, ld);
  multiply_v<E>(n, k, w.v, w.z, w.q, ld);
  for (int64_t i = 0; i < k; ++i) w.q[i * ld + i] += (T)1;
  if (has_signs) scale_columns<E>(n, k, w.signs, w.q, ld);
}

template <class E>
void forward_batch(const rom_householder_forward_args& a) {
  using T = ScalarOfElement<E>;
  const int64_t n = a.x.size[1], k = a.x.size[2];
  const T *x = (const T*)a.x.data, *signs = (const T*)a.signs.data;
  T *q = (T*)a.q.data, *inverse = (T*)a.inverse.data;
  each_group<Forward, E>(a.x.size[0], n, k, a.launch, a.workspace.data,
                         [&](const Forward<E>& w, int64_t first, int64_t count) {
                           load_group(x + first * n * k, count, n, k, w.v);
                           if (signs) load_group(signs + first * k, count, 1, k, w.signs);
                           forward<E>(n, k, w, signs != nullptr);
                           store_group(w.q, count, n, k, q + first * n * k);
                           store_group(w.t, count, k, k, inverse + first * k * k);
                         });
}

// ------------------------------------------------------------------------------------------------ backward
template <class E>
struct Backward {
  E *v, *g, *top, *t, *z, *c, *s, *out, *signs;
  Backward(Arena& arena, int64_t n, int64_t k) {
    const int64_t ld = padded<E>(k);
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
};

// C = T^T V^T G;  L's gradient is the upper triangle of C Z^T, M that triangle and its mirror image;
// grad V = V M - G Z^T, and its first k rows lose C^T.
template <class E>
void backward(int64_t n, int64_t k, const Backward<E>& w, bool has_signs) {
  const int64_t ld = padded<E>(k);
  if (has_signs) scale_columns<E>(n, k, w.signs, w.g, ld);
  form_v<E>(k, w.v, w.top, ld);
  form_z<E>(k, w.t, w.top, w.z, ld);
  multiply_v_transposed<E>(n, k, w.v, w.g, w.s, ld);
  each_strip(k, [&](int64_t i, int64_t rows) {  // T^T: row i ends at column i
    multiply<E>(rows, k, i + rows, transposed(w.t + i, ld), w.s, ld, w.c + i * ld, ld);
  });
  transpose<E>(k, w.z, w.top, ld);  // Z^T: row l ends at column l
  multiply<E>(k, k, k, plain(w.c, ld), w.top, ld, w.s, ld);
  transpose<E>(k, w.s, w.z, ld);
  for (int64_t i = 0; i < k; ++i)
    each_column<E>(k, [&](int64_t c) {
      E* at = w.s + i * ld + c;
      write(at, choose_left_of<E>(i, c, read(w.z + i * ld + c), read(at)));
    });
  negate<E>(k, w.top, ld);
  multiply<E>(n, k, k, plain(w.g, ld), w.top, ld, w.out, ld);
  multiply_v<E>(n, k, w.v, w.s, w.out, ld, Into::add);
  transpose<E>(k, w.c, w.z, ld);
  for (int64_t i = 0; i < k; ++i)
    each_column<E>(k, [&](int64_t c) {
      E* at = w.out + i * ld + c;
      write(at, choose_left_of<E>(i, c, read(at) - read(w.z + i * ld + c), VectorOf<E>{}));
    });
}

template <class E>
void backward_batch(const rom_householder_backward_args& a) {
  using T = ScalarOfElement<E>;
  const int64_t n = a.x.size[1], k = a.x.size[2];
  const T *x = (const T*)a.x.data, *grad = (const T*)a.grad.data, *inverse = (const T*)a.inverse.data;
  const T* signs = (const T*)a.signs.data;
  T* grad_x = (T*)a.grad_x.data;
  each_group<Backward, E>(a.x.size[0], n, k, a.launch, a.workspace.data,
                          [&](const Backward<E>& w, int64_t first, int64_t count) {
                            load_group(x + first * n * k, count, n, k, w.v);
                            load_group(grad + first * n * k, count, n, k, w.g);
                            load_group(inverse + first * k * k, count, k, k, w.t);
                            if (signs) load_group(signs + first * k, count, 1, k, w.signs);
                            backward<E>(n, k, w, signs != nullptr);
                            store_group(w.out, count, n, k, grad_x + first * n * k);
                          });
}

}  // namespace

ROM_CPU_WORKSPACE(rom_householder_forward, rom_householder_forward_args) {
  return group_workspace<Forward>(a.x, a.launch);
}
ROM_CPU_KERNEL(rom_householder_forward, rom_householder_forward_args) {
  const bool known = with_element(a.x, [&]<class E>(Type<E>) { forward_batch<E>(a); });
  return known ? ROM_OK : rom_fail(ROM_UNSUPPORTED, "dtype %d of x", a.x.dtype);
}
ROM_CPU_WORKSPACE(rom_householder_backward, rom_householder_backward_args) {
  return group_workspace<Backward>(a.x, a.launch);
}
ROM_CPU_KERNEL(rom_householder_backward, rom_householder_backward_args) {
  const bool known = with_element(a.x, [&]<class E>(Type<E>) { backward_batch<E>(a); });
  return known ? ROM_OK : rom_fail(ROM_UNSUPPORTED, "dtype %d of x", a.x.dtype);
}
