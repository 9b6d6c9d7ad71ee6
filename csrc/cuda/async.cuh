// SPDX-License-Identifier: Apache-2.0
//
// Asynchronous copies from global to shared memory (cp.async, sm_80 and later), 16 aligned bytes each. A thread's
// copies up to async_commit() form a group; async_wait<n>() waits until at most the n newest groups of this thread are
// under way. Only then, and for other threads after a barrier, the bytes are there.
#pragma once
#include "cuda/launch.cuh"

namespace {
#if defined(ROM_CUDA_ON_CPU)
using emulation::async_commit;
using emulation::async_copy16;
template <int kPending>
void async_wait() {
  emulation::async_wait(kPending);
}
#else
// With wanted = false nothing is read and zeros are written.
__device__ __forceinline__ void async_copy16(void* shared, const void* global, bool wanted) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(wanted ? 16 : 0) : "memory");
}
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#endif
}  // namespace
