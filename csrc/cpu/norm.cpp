// SPDX-License-Identifier: Apache-2.0
//
// add + RMSNorm. Memory-bound: each row is read once from memory, its second pass comes from L1/L2.
#include "cpu/kernel.hpp"
#include "rom/norm.h"

namespace {
#include "cpu/simd.hpp"

constexpr int64_t kRowsPerTask = 64;  // fixes the summation order of grad_weight whatever the thread count

template <class S>
const S* row(const rom_tensor& t, int64_t r) {
  return (const S*)t.data + r * t.stride[0];
}
template <class S>
S* row_out(const rom_tensor& t, int64_t r) {
  return (S*)t.data + r * t.stride[0];
}

// f(i, count) over vectors of a row; the last one may be partial.
template <class T, class F>
ROM_INLINE void each_vector(int64_t dim, F f) {
  for (int64_t i = 0; i < dim; i += lanes<T>) f(i, dim - i < lanes<T> ? (int)(dim - i) : lanes<T>);
}
template <class S>
ROM_INLINE Vec<Compute<S>> get(const S* p, int count) {
  return count == lanes<Compute<S>> ? load(p) : load_partial(p, count);
}
template <class S>
ROM_INLINE void put(S* p, Vec<Compute<S>> v, int count) {
  if (count == lanes<Compute<S>>)
    store(p, v);
  else
    store_partial(p, v, count);
}

// X: storage of x and out; R: storage of residual and sum; both compute in T. `weight` and `rstd` are stored in T.
template <class X, class R>
void forward_row(const rom_norm_forward_args& a, int64_t r) {
  using T = Compute<X>;
  const int64_t dim = a.x.size[1];
  const X* x = row<X>(a.x, r);
  const R* residual = a.residual.data ? row<R>(a.residual, r) : nullptr;
  R* sum_out = a.sum.data ? row_out<R>(a.sum, r) : nullptr;
  const T* weight = (const T*)a.weight.data;
  Vec<T> squares = broadcast((T)0);
  auto total = [&](int64_t i, int count) {
    Vec<T> s = get(x + i, count);
    return residual ? s + get(residual + i, count) : s;
  };
  each_vector<T>(dim, [&](int64_t i, int count) {
    const Vec<T> s = total(i, count);
    squares = fma(s, s, squares);
    if (sum_out) put(sum_out + i, s, count);
  });
  const T rstd = (T)1 / (T)sqrt(sum<T>(squares) / (T)dim + (T)a.eps);
  ((T*)a.rstd.data)[r] = rstd;
  X* out = row_out<X>(a.out, r);
  each_vector<T>(dim,
                 [&](int64_t i, int count) { put(out + i, total(i, count) * rstd * get(weight + i, count), count); });
}

// With xhat = sum * rstd and g = grad_out * weight:  grad_sum += rstd * (g - xhat * mean(g * xhat)).
template <class X, class R>
void backward_row(const rom_norm_backward_args& a, int64_t r, Compute<X>* grad_weight) {
  using T = Compute<X>;
  const int64_t dim = a.sum.size[1];
  const R* total = row<R>(a.sum, r);
  const X* grad_out = row<X>(a.grad_out, r);
  const R* grad_sum = a.grad_sum.data ? row<R>(a.grad_sum, r) : nullptr;
  X* grad_x = row_out<X>(a.grad_x, r);
  R* grad_residual = a.grad_residual.data ? row_out<R>(a.grad_residual, r) : nullptr;
  const T *weight = (const T*)a.weight.data, rstd = ((const T*)a.rstd.data)[r];
  Vec<T> dots = broadcast((T)0);
  each_vector<T>(dim, [&](int64_t i, int count) {
    const Vec<T> xhat = get(total + i, count) * rstd, g = get(grad_out + i, count);
    put(grad_weight + i, get(grad_weight + i, count) + g * xhat, count);
    dots = fma(g * get(weight + i, count), xhat, dots);
  });
  const T mean = sum<T>(dots) / (T)dim;
  each_vector<T>(dim, [&](int64_t i, int count) {
    const Vec<T> xhat = get(total + i, count) * rstd, g = get(grad_out + i, count) * get(weight + i, count);
    Vec<T> grad = (g - xhat * mean) * rstd;
    if (grad_sum) grad += get(grad_sum + i, count);
    put(grad_x + i, grad, count);
    if (grad_residual) put(grad_residual + i, grad, count);
  });
}

int64_t tasks_of(int64_t rows) { return (rows + kRowsPerTask - 1) / kRowsPerTask; }

template <class X, class R>
void backward(const rom_norm_backward_args& a) {
  using T = Compute<X>;
  const int64_t rows = a.sum.size[0], dim = a.sum.size[1], tasks = tasks_of(rows);
  T *partial = (T*)a.workspace.data, *grad_weight = (T*)a.grad_weight.data;
  parallel_for(tasks, a.launch.threads, [&](int64_t task, int64_t) {
    FlushSubnormals flush;
    T* mine = partial + task * dim;
    __builtin_memset(mine, 0, (size_t)dim * sizeof(T));
    const int64_t end = (task + 1) * kRowsPerTask;
    for (int64_t r = task * kRowsPerTask; r < (end < rows ? end : rows); ++r) backward_row<X, R>(a, r, mine);
  });
  for (int64_t i = 0; i < dim; ++i) {
    T total = 0;
    for (int64_t task = 0; task < tasks; ++task) total += partial[task * dim + i];
    grad_weight[i] = total;
  }
}

// f(Type<X>, Type<R>) for the pairs that occur: the residual stream in x's own type or in float32.
template <class F>
bool with_types(int x, int residual, F f) {
  if (x == residual) return with_storage_type(x, [&]<class X>(Type<X> type) { f(type, type); });
  if (residual != ROM_FLOAT32 || (x != ROM_BFLOAT16 && x != ROM_FLOAT16)) return false;
  x == ROM_BFLOAT16 ? f(Type<bfloat16>{}, Type<float>{}) : f(Type<float16>{}, Type<float>{});
  return true;
}

rom_status dtype_error(int x, int residual) {
  return rom_fail(ROM_UNSUPPORTED, "dtypes %d (x) and %d (residual) do not go together", x, residual);
}

}  // namespace

ROM_CPU_KERNEL(rom_norm_forward, rom_norm_forward_args) {
  const int64_t rows = a.x.size[0];
  const int residual = a.sum.data ? a.sum.dtype : a.x.dtype;
  const bool known = with_types(a.x.dtype, residual, [&]<class X, class R>(Type<X>, Type<R>) {
    parallel_for(tasks_of(rows), a.launch.threads, [&](int64_t task, int64_t) {
      FlushSubnormals flush;
      const int64_t end = (task + 1) * kRowsPerTask;
      for (int64_t r = task * kRowsPerTask; r < (end < rows ? end : rows); ++r) forward_row<X, R>(a, r);
    });
  });
  return known ? ROM_OK : dtype_error(a.x.dtype, residual);
}

ROM_CPU_WORKSPACE(rom_norm_backward, rom_norm_backward_args) {
  return tasks_of(a.sum.size[0]) * a.sum.size[1] * (a.sum.dtype == ROM_FLOAT64 ? 8 : 4);
}

ROM_CPU_KERNEL(rom_norm_backward, rom_norm_backward_args) {
  const bool known =
      with_types(a.grad_x.dtype, a.sum.dtype, [&]<class X, class R>(Type<X>, Type<R>) { backward<X, R>(a); });
  return known ? ROM_OK : dtype_error(a.grad_x.dtype, a.sum.dtype);
}
