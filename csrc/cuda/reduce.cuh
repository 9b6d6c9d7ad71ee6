// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cuda/launch.cuh"

namespace {

// The sum over a warp, in every lane: halving, so the order is fixed.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int width = 16; width > 0; width /= 2) value += __shfl_xor_sync(0xffffffffu, value, width);
  return value;
}

// The sum over a block of whole warps, in every thread: lanes by halving, then the warps' sums by halving.
template <class T>
__device__ T block_sum(T value) {
  __shared__ T warp_sums[32];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  value = warp_sum(value);
  if (lane == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = warp_sum(lane < warps ? warp_sums[lane] : T(0));
  __syncthreads();  // a warp that returned early must not write the next row's sum over this one's
  return value;
}

}  // namespace
