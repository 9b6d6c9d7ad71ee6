// SPDX-License-Identifier: Apache-2.0
//
// The Cayley map of square matrices of 9 to 16 columns, float32, with AVX-512: a row is a register, and a matrix half
// of the registers. Twice as fast as lanes (0.45 instead of 1.06 ms for 1024 matrices, forward and backward), 16 of
// which take half of the first-level cache per operand, and a transpose on the way in and out. Include after
// matrix_batch.hpp.
#if defined(__AVX512F__)
constexpr int kRows = 16;
struct Rows {
  vfloat row[kRows];
};

ROM_INLINE vfloat keep(int mask, vfloat v) { return (vfloat)_mm512_maskz_mov_ps((__mmask16)mask, (__m512)v); }
// `v` with lane `lane` taken from `other`.
ROM_INLINE vfloat with_lane(vfloat v, int lane, vfloat other) {
  return (vfloat)_mm512_mask_mov_ps((__m512)v, (__mmask16)(1 << lane), (__m512)other);
}
// Lane `lane` of v in all lanes.
ROM_INLINE vfloat all_of(vfloat v, int lane) {
  return (vfloat)_mm512_maskz_permutexvar_ps(0xffff, _mm512_set1_epi32(lane), (__m512)v);
}

// Row i of an n x n matrix with `below` its part left of the diagonal only; what is not there is zero.
ROM_INLINE vfloat load_row(const float* p, int i, int n, bool below = false) {
  const int mask = i < n ? (1 << (below ? i : n)) - 1 : 0;
  return (vfloat)_mm512_maskz_loadu_ps((__mmask16)mask, p + i * n);
}
// Past the caches: what the caller reads next, and the interpreter's own memory, stay there (10 % of a whole call).
ROM_INLINE void stream_row(float* p, int i, int n, vfloat v) {
  if (n == kRows) return stream(p + i * kRows, v);
  _mm512_mask_storeu_ps(p + i * n, (__mmask16)(i < n ? (1 << n) - 1 : 0), (__m512)v);
}
ROM_INLINE void store_row(float* p, int i, int n, vfloat v) {
  _mm512_mask_storeu_ps(p + i * n, (__mmask16)(i < n ? (1 << n) - 1 : 0), (__m512)v);
}

// K = I - (L - L^T) / 2 inverted in place by Gauss-Jordan, without pivoting; false, and nothing done, where K is far
// from I. Rows and columns from n on stay those of I.
ROM_INLINE bool invert_registers(const float* x, int n, double far, Rows& k) {
  Rows upper;
  ROM_UNROLL
  for (int i = 0; i < kRows; ++i) upper.row[i] = k.row[i] = load_row(x, i, n, true) * 0.5f;
  transpose_block(upper.row);
  vfloat squares{};
  ROM_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const vfloat value = upper.row[i] - k.row[i];
    squares = fma(value, value, squares);
    k.row[i] = with_lane(value, i, broadcast(1.0f));
  }
  if (!(sum<float>(squares) <= (float)(far * far))) return false;
  ROM_UNROLL
  for (int p = 0; p < kRows; ++p) {
    const vfloat scale = reciprocal(all_of(k.row[p], p));
    const vfloat pivot = with_lane(k.row[p] * scale, p, scale);
    ROM_UNROLL
    for (int i = 0; i < kRows; ++i)
      if (i != p) k.row[i] = fma(-all_of(k.row[i], p), pivot, keep(0xffff ^ (1 << p), k.row[i]));
    k.row[p] = pivot;
  }
  return true;
}

ROM_INLINE bool forward_registers(const float* x, const float* signs, int n, double far, float* q) {
  Rows r;
  if (!invert_registers(x, n, far, r)) return false;
  const vfloat sign = signs ? load_partial(signs, n) : broadcast(1.0f);
  ROM_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const vfloat twice = r.row[i] + r.row[i];
    store_row(q, i, n, with_lane(twice, i, twice - 1.0f) * sign);
  }
  return true;
}

// Row i of the product whose right factor is in registers, four at a time: sums of 16 terms hide their own latency.
template <class F>
ROM_INLINE void multiply_registers(const Rows& right, const float* left, int row, int column, F f) {
  for (int i = 0; i < kRows; i += 4) {
    vfloat sum[4] = {};
    ROM_UNROLL
    for (int l = 0; l < kRows; ++l) ROM_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] = fma(broadcast(left[(i + j) * row + l * column]), right.row[l], sum[j]);
    ROM_UNROLL
    for (int j = 0; j < 4; ++j) f(i + j, sum[j]);
  }
}

// With R = (Q + I) / 2, M = R^T G R^T and grad X = tril(M - M^T, -1). False, and nothing done, where the mean of R's
// diagonal is below `again_below`.
ROM_INLINE bool backward_registers(const float* grad, const float* q, const float* signs, int n, float again_below,
                                   float* grad_x) {
  alignas(64) float plain_q[kRows * kRows], product[kRows * kRows];
  const vfloat sign = signs ? load_partial(signs, n) : broadcast(1.0f);
  Rows right;
  vfloat trace{};
  ROM_UNROLL
  for (int i = 0; i < kRows; ++i) {
    right.row[i] = load_row(q, i, n) * sign;
    store(plain_q + i * kRows, right.row[i]);
    trace = with_lane(trace, i, right.row[i]);
  }
  if (!((float)n + sum<float>(trace) >= 2 * again_below * (float)n)) return false;
  Rows g;
  ROM_UNROLL
  for (int i = 0; i < kRows; ++i) g.row[i] = load_row(grad, i, n) * sign * 0.5f;
  multiply_registers(g, plain_q, 1, kRows, [&](int i, vfloat row) { store(product + i * kRows, row); });
  ROM_UNROLL
  for (int i = 0; i < kRows; ++i) store(product + i * kRows, load(product + i * kRows) + g.row[i]);
  transpose_block(right.row);
  Rows m;
  multiply_registers(right, product, kRows, 1,
                     [&](int i, vfloat row) { store(plain_q + i * kRows, (row + load(product + i * kRows)) * 0.5f); });
  ROM_UNROLL
  for (int i = 0; i < kRows; ++i) m.row[i] = load(plain_q + i * kRows);
  transpose_block(m.row);
  ROM_UNROLL
  for (int i = 0; i < kRows; ++i) stream_row(grad_x, i, n, keep((1 << i) - 1, load(plain_q + i * kRows) - m.row[i]));
  return true;
}

ROM_INLINE bool in_registers(const rom_tensor& x) {
  return x.dtype == ROM_FLOAT32 && x.size[1] == x.size[2] && x.size[1] > 8 && x.size[1] <= kRows;
}
// one(first element, first sign) for every matrix; those it answers false for go through Work<float>, whose buffers are
// smaller than those of lanes.
template <template <class> class Work, class Args, class F>
rom_status run_in_registers(const Args& a, F one) {
  constexpr int64_t per_task = 64;  // about 15 us
  const int64_t batch = a.x.size[0], n = a.x.size[1], bytes = work_bytes<Work, float>(n, n);
  parallel_for((batch + per_task - 1) / per_task, a.launch.threads, [&](int64_t task, int64_t worker) {
    FlushSubnormals flush;
    for (int64_t b = task * per_task; b < batch && b < (task + 1) * per_task; ++b) {
      if (one(b * n * n, b * n)) continue;
      Arena arena{aligned(a.workspace.data) + worker * bytes};
      Work<float>(arena, n, n).run(a, Group{b, 1});
    }
    stream_end();
  });
  return ROM_OK;
}
#endif
