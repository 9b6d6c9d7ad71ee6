// SPDX-License-Identifier: Apache-2.0
//
// What a CUDA source needs around its kernels. Sources that keep to it also compile with a C++20 compiler alone:
// tests/emulation runs them thread by thread on the CPU, under ThreadSanitizer and AddressSanitizer. So launch with
// ROM_LAUNCH instead of <<<>>>, and get dynamic shared memory from ROM_DYNAMIC_SHARED.
#pragma once
#if defined(ROM_CUDA_ON_CPU)
#include "cuda_on_cpu.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// ROM_LAUNCH(kernel<float>, grid, threads, shared_bytes, stream, arguments...); a comma in the name wants parentheses.
#define ROM_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (threads), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

#define ROM_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char rom_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(rom_dynamic_shared)
#endif

#include "core/status.hpp"

// More than 48 KiB of dynamic shared memory is an opt-in per kernel and device: call it before each such launch.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes) {
  if (bytes > 48 * 1024)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// The status of the launches before it. Errors inside a running kernel surface at the caller's next synchronisation.
inline rom_status launch_status(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? ROM_OK : rom_fail(ROM_DEVICE_ERROR, "%s: %s", kernel, cudaGetErrorString(error));
}
