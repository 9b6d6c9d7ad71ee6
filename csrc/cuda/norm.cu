// SPDX-License-Identifier: Apache-2.0
//
// add + RMSNorm. Memory-bound: a block reads its row once from memory, the second pass over it comes from L1/L2.
// grad_weight sums over rows: every block adds its rows into a private line (no atomics), a second kernel adds the
// lines in order. How rows are split depends on the number of rows only, so every device gives the same bits.
#include "rom/norm.h"

#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"

namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kRowsPerBlock = 16;           // backward: a line of grad_weight costs 1/16 of the rows' own traffic
constexpr int64_t kMaxLines = 2048;             // and the lines never more than 2048 rows
constexpr int64_t kMaxSharedBytes = 48 * 1024;  // what every launch may ask for without an opt-in
constexpr int kReduceColumns = 32, kReduceRows = 8;

template <class S>
__device__ const S* row(const rom_tensor& t, int64_t r) {
  return t.data ? static_cast<const S*>(t.data) + r * t.stride[0] : nullptr;
}
template <class S>
__device__ S* row_out(const rom_tensor& t, int64_t r) {
  return t.data ? static_cast<S*>(t.data) + r * t.stride[0] : nullptr;
}

template <int V, class X, class R>
__device__ __forceinline__ void load_total(const X* x, const R* residual, int64_t i, Compute<X> (&total)[V]) {
  load_pack(x + i, total);
  if (!residual) return;
  Compute<X> more[V];
  load_pack(residual + i, more);
  for (int v = 0; v < V; ++v) total[v] += more[v];
}

// X: storage of x and out; R: storage of residual and sum; V neighbours per load.
template <class X, class R, int V>
__global__ void __launch_bounds__(kMaxThreads) norm_forward(rom_norm_forward_args a) {
  using T = Compute<X>;
  const int64_t r = blockIdx.x, dim = a.x.size[1], step = V * blockDim.x;
  const X* x = row<X>(a.x, r);
  const R* residual = row<R>(a.residual, r);
  const T* weight = static_cast<const T*>(a.weight.data);
  R* sum_out = row_out<R>(a.sum, r);
  X* out = row_out<X>(a.out, r);
  T squares = 0;
  for (int64_t i = V * threadIdx.x; i < dim; i += step) {
    T total[V];
    load_total(x, residual, i, total);
    for (int v = 0; v < V; ++v) squares += total[v] * total[v];
    if (sum_out) store_pack(sum_out + i, total);
  }
  const T rstd = T(1) / sqrt(block_sum(squares) / static_cast<T>(dim) + static_cast<T>(a.eps));
  if (threadIdx.x == 0) static_cast<T*>(a.rstd.data)[r] = rstd;
  for (int64_t i = V * threadIdx.x; i < dim; i += step) {
    T total[V], scale[V];
    load_total(x, residual, i, total);
    load_pack(weight + i, scale);
    for (int v = 0; v < V; ++v) total[v] *= rstd * scale[v];
    store_pack(out + i, total);
  }
}

// With xhat = sum * rstd and g = grad_out * weight:  grad_sum += rstd * (g - xhat * mean(g * xhat)).
// `line` is this block's part of grad_weight; every column belongs to one thread, so it needs no barrier.
template <class X, class R, int V>
__device__ void backward_row(const rom_norm_backward_args& a, int64_t r, Compute<X>* line) {
  using T = Compute<X>;
  const int64_t dim = a.sum.size[1], step = V * blockDim.x;
  const R* total = row<R>(a.sum, r);
  const X* grad_out = row<X>(a.grad_out, r);
  const R* grad_sum = row<R>(a.grad_sum, r);
  const T* weight = static_cast<const T*>(a.weight.data);
  const T rstd = static_cast<const T*>(a.rstd.data)[r];
  T dots = 0;
  for (int64_t i = V * threadIdx.x; i < dim; i += step) {
    T xhat[V], g[V], scale[V], sums[V];
    load_pack(total + i, xhat);
    load_pack(grad_out + i, g);
    load_pack(weight + i, scale);
    load_pack(line + i, sums);
    for (int v = 0; v < V; ++v) {
      xhat[v] *= rstd;
      sums[v] += g[v] * xhat[v];
      dots += g[v] * scale[v] * xhat[v];
    }
    store_pack(line + i, sums);
  }
  const T mean = block_sum(dots) / static_cast<T>(dim);
  X* grad_x = row_out<X>(a.grad_x, r);
  R* grad_residual = row_out<R>(a.grad_residual, r);
  for (int64_t i = V * threadIdx.x; i < dim; i += step) {
    T xhat[V], g[V], scale[V];
    load_pack(total + i, xhat);
    load_pack(grad_out + i, g);
    load_pack(weight + i, scale);
    for (int v = 0; v < V; ++v) g[v] = (g[v] * scale[v] - xhat[v] * rstd * mean) * rstd;
    if (grad_sum) {
      load_pack(grad_sum + i, xhat);
      for (int v = 0; v < V; ++v) g[v] += xhat[v];
    }
    store_pack(grad_x + i, g);
    if (grad_residual) store_pack(grad_residual + i, g);
  }
}

template <class X, class R, int V>
__global__ void __launch_bounds__(kMaxThreads)
    norm_backward(rom_norm_backward_args a, int64_t rows_per_block, bool line_in_shared) {
  using T = Compute<X>;
  ROM_DYNAMIC_SHARED(T, shared);
  const int64_t rows = a.sum.size[0], dim = a.sum.size[1], step = V * blockDim.x;
  T* const mine = static_cast<T*>(a.workspace.data) + blockIdx.x * dim;
  T* const line = line_in_shared ? shared : mine;
  const T zeros[V] = {};
  for (int64_t i = V * threadIdx.x; i < dim; i += step) store_pack(line + i, zeros);
  const int64_t begin = blockIdx.x * rows_per_block, end = begin + rows_per_block;
  for (int64_t r = begin; r < (end < rows ? end : rows); ++r) backward_row<X, R, V>(a, r, line);
  if (!line_in_shared) return;
  for (int64_t i = V * threadIdx.x; i < dim; i += step) {
    T sums[V];
    load_pack(line + i, sums);
    store_pack(mine + i, sums);
  }
}

// grad_weight[i] = the sum of column i over the lines: eight strided sums, added in order.
template <class T>
__global__ void __launch_bounds__(kReduceColumns* kReduceRows)
    norm_backward_reduce(const T* lines, int64_t count, int64_t dim, T* grad_weight) {
  __shared__ T partial[kReduceRows][kReduceColumns];
  const int column = threadIdx.x % kReduceColumns, part = threadIdx.x / kReduceColumns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceColumns + column;
  T sum = 0;
  if (i < dim)
    for (int64_t k = part; k < count; k += kReduceRows) sum += lines[k * dim + i];
  partial[part][column] = sum;
  __syncthreads();
  if (part != 0 || i >= dim) return;
  for (int k = 1; k < kReduceRows; ++k) sum += partial[k][column];
  grad_weight[i] = sum;
}

// ---------------------------------------------------------------------------------------------------- launches
int64_t rows_per_block(int64_t rows) {
  const int64_t least = (rows + kMaxLines - 1) / kMaxLines;
  return least > kRowsPerBlock ? least : kRowsPerBlock;
}
int64_t lines_of(int64_t rows) { return (rows + rows_per_block(rows) - 1) / rows_per_block(rows); }

unsigned threads_for(int64_t packs) {
  const int64_t warps = packs > 32 ? (packs + 31) / 32 : 1;
  return static_cast<unsigned>(warps * 32 < kMaxThreads ? warps * 32 : kMaxThreads);
}

template <class X, class R, int V>
void launch_forward(const rom_norm_forward_args& a) {
  const auto rows = static_cast<unsigned>(a.x.size[0]);
  ROM_LAUNCH((norm_forward<X, R, V>), rows, threads_for(a.x.size[1] / V), 0, a.launch.stream, a);
}

template <class X, class R, int V>
void launch_backward(const rom_norm_backward_args& a) {
  using T = Compute<X>;
  const int64_t rows = a.sum.size[0], dim = a.sum.size[1], lines = lines_of(rows);
  const int64_t bytes = dim * static_cast<int64_t>(sizeof(T));
  const bool in_shared = bytes <= kMaxSharedBytes;
  if (rows > 0)
    ROM_LAUNCH((norm_backward<X, R, V>), static_cast<unsigned>(lines), threads_for(dim / V),
               static_cast<size_t>(in_shared ? bytes : 0), a.launch.stream, a, rows_per_block(rows), in_shared);
  ROM_LAUNCH((norm_backward_reduce<T>), static_cast<unsigned>((dim + kReduceColumns - 1) / kReduceColumns),
             kReduceColumns * kReduceRows, 0, a.launch.stream, static_cast<const T*>(a.workspace.data), lines, dim,
             static_cast<T*>(a.grad_weight.data));
}

template <class X, class R>
struct Types {
  // 16-byte loads of the wider type.
  static constexpr int lanes = 16 / (sizeof(X) > sizeof(R) ? sizeof(X) : sizeof(R));
};

// f(Types<X, R>) for the pairs that occur: the residual stream in x's own type or in float32.
template <class F>
rom_status with_types(int x, int residual, F f) {
  if (x == ROM_FLOAT32 && residual == x) return f(Types<float, float>{});
  if (x == ROM_BFLOAT16 && residual == x) return f(Types<bfloat16, bfloat16>{});
  if (x == ROM_FLOAT16 && residual == x) return f(Types<float16, float16>{});
  if (x == ROM_FLOAT64 && residual == x) return f(Types<double, double>{});
  if (x == ROM_BFLOAT16 && residual == ROM_FLOAT32) return f(Types<bfloat16, float>{});
  if (x == ROM_FLOAT16 && residual == ROM_FLOAT32) return f(Types<float16, float>{});
  return rom_fail(ROM_UNSUPPORTED, "dtypes %d (x) and %d (residual) do not go together", x, residual);
}

bool aligned(const rom_norm_forward_args& a, int lanes) {
  return a.x.size[1] % lanes == 0 && rows_aligned(a.x, lanes) && rows_aligned(a.residual, lanes) &&
         rows_aligned(a.weight, lanes) && rows_aligned(a.out, lanes) && rows_aligned(a.sum, lanes);
}
bool aligned(const rom_norm_backward_args& a, int lanes) {
  return a.sum.size[1] % lanes == 0 && rows_aligned(a.sum, lanes) && rows_aligned(a.weight, lanes) &&
         rows_aligned(a.grad_out, lanes) && rows_aligned(a.grad_sum, lanes) && rows_aligned(a.grad_x, lanes) &&
         rows_aligned(a.grad_residual, lanes);
}

}  // namespace

extern "C" rom_status rom_norm_forward_cuda(const rom_norm_forward_args* args) {
  const rom_norm_forward_args& a = *args;
  if (a.x.size[0] == 0) return ROM_OK;
  return with_types(a.x.dtype, a.sum.data ? a.sum.dtype : a.x.dtype, [&]<class X, class R>(Types<X, R> types) {
    constexpr int lanes = decltype(types)::lanes;
    aligned(a, lanes) ? launch_forward<X, R, lanes>(a) : launch_forward<X, R, 1>(a);
    return launch_status("norm_forward");
  });
}

extern "C" int64_t rom_norm_backward_workspace_cuda(const rom_norm_backward_args* args) {
  return lines_of(args->sum.size[0]) * args->sum.size[1] * (args->sum.dtype == ROM_FLOAT64 ? 8 : 4);
}

extern "C" rom_status rom_norm_backward_cuda(const rom_norm_backward_args* args) {
  const rom_norm_backward_args& a = *args;
  if (a.sum.size[1] == 0) return ROM_OK;
  return with_types(a.grad_x.dtype, a.sum.dtype, [&]<class X, class R>(Types<X, R> types) {
    constexpr int lanes = decltype(types)::lanes;
    aligned(a, lanes) ? launch_backward<X, R, lanes>(a) : launch_backward<X, R, 1>(a);
    return launch_status("norm_backward");
  });
}
