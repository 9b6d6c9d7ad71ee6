// SPDX-License-Identifier: Apache-2.0
//
// add + RMSNorm forward: one block per row, two passes over it (the second from L1/L2).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "core/status.hpp"
#include "rom/norm.h"

namespace {

constexpr int kThreads = 256;

template <class S>
__device__ float to_float(S x) {
  return static_cast<float>(x);
}
template <class S>
__device__ S from_float(float x) {
  return static_cast<S>(x);
}

// Sum over the block in a fixed order: lanes by halving, then the warps' sums by halving.
__device__ float block_sum(float value) {
  __shared__ float warp_sums[32];
  for (int width = 16; width > 0; width /= 2) value += __shfl_xor_sync(0xffffffffu, value, width);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < kThreads / 32 ? warp_sums[threadIdx.x % 32] : 0.0f;
  for (int width = 16; width > 0; width /= 2) value += __shfl_xor_sync(0xffffffffu, value, width);
  return value;
}

struct Params {
  const void *x, *residual;
  const float* weight;
  void *out, *sum;
  float* rstd;
  int64_t dim, x_stride, residual_stride, out_stride, sum_stride;
  float eps;
};

template <class X, class R>
__global__ void __launch_bounds__(kThreads) norm_forward(Params p) {
  const int64_t r = blockIdx.x;
  const X* x = static_cast<const X*>(p.x) + r * p.x_stride;
  const R* residual = p.residual ? static_cast<const R*>(p.residual) + r * p.residual_stride : nullptr;
  R* sum_out = p.sum ? static_cast<R*>(p.sum) + r * p.sum_stride : nullptr;
  X* out = static_cast<X*>(p.out) + r * p.out_stride;
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < p.dim; i += kThreads) {
    const float s = to_float(x[i]) + (residual ? to_float(residual[i]) : 0.0f);
    squares += s * s;
    if (sum_out) sum_out[i] = from_float<R>(s);
  }
  const float rstd = rsqrtf(block_sum(squares) / static_cast<float>(p.dim) + p.eps);
  if (threadIdx.x == 0) p.rstd[r] = rstd;
  for (int64_t i = threadIdx.x; i < p.dim; i += kThreads) {
    const float s = to_float(x[i]) + (residual ? to_float(residual[i]) : 0.0f);
    out[i] = from_float<X>(s * rstd * p.weight[i]);
  }
}

template <class X, class R>
rom_status launch(const rom_norm_forward_args& a) {
  const Params p{a.x.data,        a.residual.data, static_cast<const float*>(a.weight.data),
                 a.out.data,      a.sum.data,      static_cast<float*>(a.rstd.data),
                 a.x.size[1],     a.x.stride[0],   a.residual.stride[0],
                 a.out.stride[0], a.sum.stride[0], static_cast<float>(a.eps)};
  if (a.x.size[0] == 0) return ROM_OK;
  norm_forward<X, R>
      <<<static_cast<unsigned>(a.x.size[0]), kThreads, 0, static_cast<cudaStream_t>(a.launch.stream)>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? ROM_OK : rom_fail(ROM_DEVICE_ERROR, "launch: %s", cudaGetErrorString(error));
}

}  // namespace

extern "C" rom_status rom_norm_forward_cuda(const rom_norm_forward_args* args) {
  const int x = args->x.dtype, residual = args->sum.data ? args->sum.dtype : x;
  if (x == ROM_FLOAT32 && residual == x) return launch<float, float>(*args);
  if (x == ROM_BFLOAT16 && residual == x) return launch<__nv_bfloat16, __nv_bfloat16>(*args);
  if (x == ROM_FLOAT16 && residual == x) return launch<__half, __half>(*args);
  if (x == ROM_BFLOAT16 && residual == ROM_FLOAT32) return launch<__nv_bfloat16, float>(*args);
  if (x == ROM_FLOAT16 && residual == ROM_FLOAT32) return launch<__half, float>(*args);
  return rom_fail(ROM_UNSUPPORTED, "dtypes %d (x) and %d (residual) do not go together", x, residual);
}
