// SPDX-License-Identifier: Apache-2.0
//
// Small dense algebra, written once for two kinds of elements E:
//   E = float, double   one matrix; a vector holds neighbours of a row ("rows")
//   E = Vec<T>          as many matrices as a vector has lanes; element (i, j) of all of them is one vector ("lanes")
// Lanes serve matrices of up to 16 columns, which would leave most of a row vector empty: no shuffles, and every
// division or square root is shared. Include after simd.hpp, inside the anonymous namespace.
//
// Row-major; for rows, both dimensions of a buffer are padded to whole blocks of 16: nothing here has a tail. Whatever
// stands in the padding never reaches an element.
//
// A large matrix may have several threads (Team): its products are cut by rows, which changes no bit of a result.

template <class E>
struct ElementOf {  // a scalar
  using scalar = E;
  static constexpr int step = lanes<E>, block = 16;
};
template <>
struct ElementOf<vfloat> {
  using scalar = float;
  static constexpr int step = 1, block = 8;
};
template <>
struct ElementOf<vdouble> {
  using scalar = double;
  static constexpr int step = 1, block = 8;
};
template <class E>
using ScalarOfElement = typename ElementOf<E>::scalar;
template <class E>
constexpr int step = ElementOf<E>::step;  // elements in a vector

template <class E>
using VectorOf = Vec<ScalarOfElement<E>>;
template <class E>
ROM_INLINE int64_t padded(int64_t size) {
  return step<E> == 1 ? size : (size + 15) & ~(int64_t)15;
}
// The row stride of a buffer. Rows a multiple of 256 bytes apart share few sets of the first-level cache: 20 % of the
// time at 512 columns.
template <class E>
ROM_INLINE int64_t leading(int64_t columns) {
  const int64_t ld = padded<E>(columns);
  return step<E> > 1 && ld >= 128 && ld % 64 == 0 ? ld + 16 : ld;
}
ROM_INLINE vfloat spread(float x) { return broadcast(x); }
ROM_INLINE vdouble spread(double x) { return broadcast(x); }
ROM_INLINE vfloat spread(vfloat x) { return x; }
ROM_INLINE vdouble spread(vdouble x) { return x; }
ROM_INLINE vfloat read(const float* p) { return load(p); }
ROM_INLINE vdouble read(const double* p) { return load(p); }
ROM_INLINE vfloat read(const vfloat* p) { return *p; }
ROM_INLINE vdouble read(const vdouble* p) { return *p; }
ROM_INLINE void write(float* p, vfloat v) { store(p, v); }
ROM_INLINE void write(double* p, vdouble v) { store(p, v); }
ROM_INLINE void write(vfloat* p, vfloat v) { *p = v; }
ROM_INLINE void write(vdouble* p, vdouble v) { *p = v; }

// ------------------------------------------------------------------------------------------------ products
enum class Into { set, add };

// The left factor: element (i, l) is p[i * row + l * column], so a transpose is a swap of strides.
template <class E>
struct Left {
  const E* p;
  int64_t row, column;
};
template <class E>
ROM_INLINE Left<E> plain(const E* p, int64_t ld) {
  return {p, ld, 1};
}
template <class E>
ROM_INLINE Left<E> transposed(const E* p, int64_t ld) {
  return {p, 1, ld};
}

#if defined(__AVX512F__)
constexpr int kTileRows = 8;  // 8 x 3 accumulators and their operands fill 28 of 32 registers
#else
constexpr int kTileRows = 4;  // 4 x 3 fill 16
#endif
constexpr int kTileVectors = 3;

// MR rows times NV vectors of C, kept in registers over the whole sum.
template <class E, int MR, int NV>
__attribute__((noinline)) void tile(int64_t inner, Left<E> a, const E* b, int64_t ldb, E* c, int64_t ldc, Into into) {
  using V = Vec<ScalarOfElement<E>>;
  V sum[MR][NV] = {};
  for (int64_t l = 0; l < inner; ++l) {
    V right[NV];
    ROM_UNROLL
    for (int v = 0; v < NV; ++v) right[v] = read(b + l * ldb + v * step<E>);
    ROM_UNROLL
    for (int i = 0; i < MR; ++i) {
      const V left = spread(a.p[i * a.row + l * a.column]);
      ROM_UNROLL
      for (int v = 0; v < NV; ++v) sum[i][v] = fma(left, right[v], sum[i][v]);
    }
  }
  ROM_UNROLL
  for (int i = 0; i < MR; ++i) ROM_UNROLL
  for (int v = 0; v < NV; ++v) {
    E* at = c + i * ldc + v * step<E>;
    write(at, into == Into::set ? sum[i][v] : read(at) + sum[i][v]);
  }
}

template <class E, int NV, int MR = kTileRows>
ROM_INLINE void tile_rows(int64_t rows, int64_t inner, Left<E> a, const E* b, int64_t ldb, E* c, int64_t ldc,
                          Into into) {
  int64_t i = 0;
  for (; i + MR <= rows; i += MR)
    tile<E, MR, NV>(inner, {a.p + i * a.row, a.row, a.column}, b, ldb, c + i * ldc, ldc, into);
  if constexpr (MR > 1)
    if (i < rows)
      tile_rows<E, NV, MR / 2>(rows - i, inner, {a.p + i * a.row, a.row, a.column}, b, ldb, c + i * ldc, ldc, into);
}

// C = A B or C += A B; A is rows x inner, B inner x columns. Sums run over `inner` in order, kAtOnce terms in an
// accumulator: over 512 terms that halves the error of a single one.
constexpr int64_t kAtOnce = 128;
template <class E>
void multiply_alone(int64_t rows, int64_t columns, int64_t inner, Left<E> a, const E* b, int64_t ldb, E* c, int64_t ldc,
                    Into into = Into::set) {
  for (; inner > kAtOnce; inner -= kAtOnce, a.p += kAtOnce * a.column, b += kAtOnce * ldb, into = Into::add)
    multiply_alone<E>(rows, columns, kAtOnce, a, b, ldb, c, ldc, into);
  int64_t vectors = (columns + step<E> - 1) / step<E>;
  while (vectors > 0) {
    const int64_t width = vectors == 4 ? 2 : vectors < kTileVectors ? vectors : kTileVectors;
    if (width == 3) tile_rows<E, 3>(rows, inner, a, b, ldb, c, ldc, into);
    if (width == 2) tile_rows<E, 2>(rows, inner, a, b, ldb, c, ldc, into);
    if (width == 1) tile_rows<E, 1>(rows, inner, a, b, ldb, c, ldc, into);
    b += width * step<E>;
    c += width * step<E>;
    vectors -= width;
  }
}

// The threads a product may be cut for; 1 while it is one of several that run at the same time.
static thread_local int64_t team = 1;

// f(first row, rows) over strips of [0, n), by all of the team if `work` multiply-adds are worth waking it (5 us).
template <class F>
ROM_INLINE void each_strip(int64_t n, int64_t strip, int64_t work, F f) {
  const auto run = [&](int64_t s) { f(s * strip, n - s * strip < strip ? n - s * strip : strip); };
  const int64_t strips = (n + strip - 1) / strip, threads = team;
  if (threads == 1 || work < 1048576) {
    for (int64_t s = 0; s < strips; ++s) run(s);
    return;
  }
  parallel_for(strips, threads, [&](int64_t s, int64_t) {
    FlushSubnormals flush;
    const int64_t before = team;
    team = 1;
    run(s);
    team = before;
  });
}

template <class E>
void multiply(int64_t rows, int64_t columns, int64_t inner, Left<E> a, const E* b, int64_t ldb, E* c, int64_t ldc,
              Into into = Into::set) {
  if (team == 1) return multiply_alone<E>(rows, columns, inner, a, b, ldb, c, ldc, into);
  each_strip(rows, 64, rows * columns * inner, [&](int64_t i, int64_t count) {
    multiply_alone<E>(count, columns, inner, {a.p + i * a.row, a.row, a.column}, b, ldb, c + i * ldc, ldc, into);
  });
}

// ------------------------------------------------------------------------------------------------ transposes
// low and high interleave the halves of two vectors; log2(L) rounds of that transpose an L x L block.
template <int L>
struct Interleave;
template <>
struct Interleave<1> {  // never called
  template <class V>
  static V low(V a, V) {
    return a;
  }
  template <class V>
  static V high(V a, V) {
    return a;
  }
};
template <>
struct Interleave<2> {
  template <class V>
  static V low(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 2);
  }
  template <class V>
  static V high(V a, V b) {
    return __builtin_shufflevector(a, b, 1, 3);
  }
};
template <>
struct Interleave<4> {
  template <class V>
  static V low(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  }
  template <class V>
  static V high(V a, V b) {
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  }
};
template <>
struct Interleave<8> {
  template <class V>
  static V low(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  }
  template <class V>
  static V high(V a, V b) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }
};
template <>
struct Interleave<16> {
  template <class V>
  static V low(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
  template <class V>
  static V high(V a, V b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
};

template <class V, int L>
ROM_INLINE void transpose_block(V (&v)[L]) {
  ROM_UNROLL
  for (int round = 1; round < L; round *= 2) {
    V next[L];
    ROM_UNROLL
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = Interleave<L>::low(v[i], v[i + L / 2]);
      next[2 * i + 1] = Interleave<L>::high(v[i], v[i + L / 2]);
    }
    ROM_UNROLL
    for (int i = 0; i < L; ++i) v[i] = next[i];
  }
}

// ------------------------------------------------------------------------------------------------ vector by vector
// f(column, row vector by vector) over the first `columns` of a row.
template <class E, class F>
ROM_INLINE void each_column(int64_t columns, F f) {
  for (int64_t c = 0; c < columns; c += step<E>) f(c);
}

// Where lane l of a vector stands at column c + l: the lanes left of `column`, and the one there, are chosen from
// `yes`.
template <class E>
ROM_INLINE VectorOf<E> column_numbers(int64_t c) {
  using T = ScalarOfElement<E>;
  VectorOf<E> numbers = broadcast((T)c);
  for (int l = 0; l < step<E>; ++l) numbers[l] += (T)l;
  return numbers;
}
template <class E>
ROM_INLINE VectorOf<E> choose_left_of(int64_t column, int64_t c, VectorOf<E> yes, VectorOf<E> no) {
  if constexpr (step<E> == 1)
    return c < column ? yes : no;
  else
    return column_numbers<E>(c) < (ScalarOfElement<E>)column ? yes : no;
}
template <class E>
ROM_INLINE VectorOf<E> choose_at(int64_t column, int64_t c, VectorOf<E> yes, VectorOf<E> no) {
  if constexpr (step<E> == 1)
    return c == column ? yes : no;
  else
    return column_numbers<E>(c) == (ScalarOfElement<E>)column ? yes : no;
}

// Column j of every row times factors[j].
template <class E>
void scale_columns(int64_t rows, int64_t columns, const E* factors, E* a, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i)
    each_column<E>(columns, [&](int64_t c) { write(a + i * ld + c, read(a + i * ld + c) * read(factors + c)); });
}

// to = from^T, n x n.
template <class E>
void transpose(int64_t n, const E* from, E* to, int64_t ld) {
  constexpr int L = step<E>;
  for (int64_t i = 0; i < n; i += L)
    for (int64_t j = 0; j < n; j += L) {
      VectorOf<E> v[L];
      ROM_UNROLL
      for (int l = 0; l < L; ++l) v[l] = read(from + (i + l) * ld + j);
      transpose_block(v);
      ROM_UNROLL
      for (int l = 0; l < L; ++l) write(to + (j + l) * ld + i, v[l]);
    }
}

// ------------------------------------------------------------------------------------------------ inverses
// Columns eliminated at once from an n x n matrix, by a smaller inverse and products.
template <class E>
ROM_INLINE int64_t elimination(int64_t n) {
  return step<E> > 1 && n > 128 ? 64 : ElementOf<E>::block;
}
// Scratch of `invert`, in elements.
template <class E>
int64_t invert_scratch(int64_t n) {
  const int64_t nb = elimination<E>(n);
  return nb * nb + n * nb + nb * leading<E>(n) + (nb > ElementOf<E>::block ? invert_scratch<E>(nb) : 0);
}

// The w x w corner of `block` (rows of ElementOf<E>::block elements) in place, by Gauss-Jordan. Elements are replaced
// inside vectors: a vector load after a store of one element waits ~15 cycles, half the time of this function.
template <class E>
void invert_block(E* block, int64_t w) {
  constexpr int nb = ElementOf<E>::block, vectors = nb / step<E>;
  using V = VectorOf<E>;
  for (int64_t p = 0; p < w; ++p) {
    E* pivot_row = block + p * nb;
    const V scale = spread((ScalarOfElement<E>)1 / pivot_row[p]);
    V pivot[vectors];
    ROM_UNROLL
    for (int v = 0; v < vectors; ++v) {
      pivot[v] = choose_at<E>(p, v * step<E>, scale, read(pivot_row + v * step<E>) * scale);
      write(pivot_row + v * step<E>, pivot[v]);
    }
    for (int64_t i = 0; i < w; ++i) {
      if (i == p) continue;
      E* row = block + i * nb;
      const V factor = spread(-row[p]);
      ROM_UNROLL
      for (int v = 0; v < vectors; ++v) {
        const V old = choose_at<E>(p, v * step<E>, V{}, read(row + v * step<E>));
        write(row + v * step<E>, fma(factor, pivot[v], old));
      }
    }
  }
}

// A^-1 in place without pivoting, for A with a positive definite symmetric part. Gauss-Jordan by blocks: the rest of
// the matrix is updated once per block by a product, which is fast, and rounds once per block instead of once per
// column. With `upper`, A is an upper triangle and zeros stay untouched.
template <class E>
void invert(int64_t n, E* a, int64_t ld, E* scratch, bool upper = false) {
  const int64_t nb = elimination<E>(n);
  E *block = scratch, *column = block + nb * nb, *panel = column + n * nb, *rest = panel + nb * leading<E>(n);
  for (int64_t j = 0; j < n; j += nb) {
    const int64_t w = n - j < nb ? n - j : nb, wide = padded<E>(w);
    const int64_t last = upper ? j + w : n, first = upper ? j : 0;
    for (int64_t i = 0; i < w; ++i)
      each_column<E>(wide, [&](int64_t c) { write(block + i * nb + c, read(a + (j + i) * ld + j + c)); });
    if (nb == ElementOf<E>::block)
      invert_block<E>(block, w);
    else
      invert<E>(w, block, nb, rest, upper);
    for (int64_t i = 0; i < last; ++i)
      each_column<E>(wide, [&](int64_t c) {
        write(column + i * nb + c, -read(a + i * ld + j + c));
        write(a + i * ld + j + c, VectorOf<E>{});
      });
    for (int64_t i = 0; i < w; ++i)
      each_column<E>(ld, [&](int64_t c) { write(panel + i * ld + c, read(a + (j + i) * ld + c)); });
    multiply<E>(w, n - first, w, plain(block, nb), panel + first, ld, a + j * ld + first, ld);
    for (int64_t i = 0; i < w; ++i)
      each_column<E>(wide, [&](int64_t c) { write(a + (j + i) * ld + j + c, read(block + i * nb + c)); });
    multiply<E>(j, n - first, w, plain(column, nb), a + j * ld + first, ld, a + first, ld, Into::add);
    multiply<E>(last - j - w, n - first, w, plain(column + (j + w) * nb, nb), a + j * ld + first, ld,
                a + (j + w) * ld + first, ld, Into::add);
  }
}

template <class T>
void exchange(T* one, T* other, int64_t columns) {
  each_column<T>(columns, [&](int64_t c) {
    const Vec<T> kept = read(one + c);
    write(one + c, read(other + c));
    write(other + c, kept);
  });
}

// Gauss-Jordan with partial pivoting on the w columns of A from j on, of which `column` (rows of nb elements) holds a
// copy. With P the rows chosen, it becomes P^-1 there and -A P^-1 elsewhere. Exchanges rows of A too, with order[p].
template <class T>
void eliminate(int64_t n, int64_t j, int64_t w, T* a, int64_t ld, T* column, int64_t nb, int32_t* order) {
  const int64_t wide = padded<T>(w);
  for (int64_t p = j; p < j + w; ++p) {
    T* const pivot = column + p * nb;
    int64_t best = p;
    for (int64_t i = p + 1; i < n; ++i)
      if (fabs((double)column[i * nb + p - j]) > fabs((double)column[best * nb + p - j])) best = i;
    order[p] = (int32_t)best;
    if (best != p) {
      exchange(pivot, column + best * nb, wide);
      exchange(a + p * ld, a + best * ld, padded<T>(n));
    }
    const T scale = (T)1 / pivot[p - j];
    pivot[p - j] = 1;
    each_column<T>(wide, [&](int64_t c) { write(pivot + c, read(pivot + c) * scale); });
    for (int64_t i = 0; i < n; ++i) {
      if (i == p) continue;
      T* row = column + i * nb;
      const Vec<T> factor = spread(-row[p - j]);
      row[p - j] = 0;
      each_column<T>(wide, [&](int64_t c) { write(row + c, fma(factor, read(pivot + c), read(row + c))); });
    }
  }
}

// A^-1 in place with partial pivoting, for one matrix; `order` has room for n indices. The factors of the products are
// A P^-1, bounded by the pivoting, and A's own rows: with (P^-1 A) instead the error is 5 times as large.
template <class T>
void invert_pivoted(int64_t n, T* a, int64_t ld, T* scratch, int32_t* order) {
  const int64_t nb = elimination<T>(n);
  T *column = scratch, *panel = column + n * nb;
  for (int64_t j = 0; j < n; j += nb) {
    const int64_t w = n - j < nb ? n - j : nb, wide = padded<T>(w);
    for (int64_t i = 0; i < n; ++i)
      each_column<T>(wide, [&](int64_t c) { write(column + i * nb + c, read(a + i * ld + j + c)); });
    eliminate(n, j, w, a, ld, column, nb, order);
    for (int64_t i = 0; i < w; ++i)
      each_column<T>(ld, [&](int64_t c) { write(panel + i * ld + c, read(a + (j + i) * ld + c)); });
    multiply<T>(j, n, w, plain(column, nb), panel, ld, a, ld, Into::add);
    multiply<T>(w, n, w, plain(column + j * nb, nb), panel, ld, a + j * ld, ld);
    multiply<T>(n - j - w, n, w, plain(column + (j + w) * nb, nb), panel, ld, a + (j + w) * ld, ld, Into::add);
    for (int64_t i = 0; i < n; ++i)
      each_column<T>(wide, [&](int64_t c) { write(a + i * ld + j + c, read(column + i * nb + c)); });
  }
  for (int64_t i = 0; i < n; ++i)  // the rows were exchanged, so the inverse's columns go back
    for (int64_t p = n - 1; p >= 0; --p) {
      T* row = a + i * ld;
      const T kept = row[p];
      row[p] = row[order[p]];
      row[order[p]] = kept;
    }
}
