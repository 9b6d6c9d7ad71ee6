// SPDX-License-Identifier: Apache-2.0
//
// CUDA on the CPU: one std::thread per CUDA thread, one block at a time, for the sources that launch through
// csrc/cuda/launch.cuh. It exists to find wrong indices and missing barriers with the sanitizers: ThreadSanitizer names
// the line of a race that changes no number, AddressSanitizer every access out of bounds.
//
// Not modelled: tensor cores, TMA, divergent shuffles, the GPU's memory order (weaker than the CPU's). Shared memory
// starts as NaN, and is as stale from one block to the next as on a GPU.
#pragma once
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ static  // one block runs at a time, so its shared memory may be a static variable
#define __syncthreads() emulation::block->barrier.wait()
#define __syncwarp(...) emulation::warp->barrier.wait()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulation {

// Not std::barrier: libstdc++'s waits on atomics that all barriers of a process share, and ThreadSanitizer then takes
// two unrelated barriers for synchronisation and misses races.
class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  explicit Warp(unsigned threads) : barrier(threads) {}
  Barrier barrier;
  uint64_t slot[32];
};

struct Block {
  Block(unsigned threads, size_t shared_bytes) : barrier(threads), shared(shared_bytes / 16 + 1) {
    memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(Line));
    for (unsigned begin = 0; begin < threads; begin += 32)
      warps.push_back(std::make_unique<Warp>(threads - begin < 32 ? threads - begin : 32));
  }
  struct alignas(16) Line {
    unsigned char bytes[16];
  };
  Barrier barrier;
  std::vector<Line> shared;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Block* block;
inline thread_local Warp* warp;
inline thread_local unsigned lane;
inline cudaError_t last_error = cudaSuccess;

// Every lane publishes its value and reads lane `source`; the second barrier keeps the slots until all have read.
template <class T>
T exchange(T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& mine = *warp;
  memcpy(&mine.slot[lane], &value, sizeof(T));
  mine.barrier.wait();
  memcpy(&value, &mine.slot[source % 32], sizeof(T));
  mine.barrier.wait();
  return value;
}

// cp.async (csrc/cuda/async.cuh). A copy may land any time between issue and wait: at issue finds a buffer that is
// still being read, at the wait finds a wait that is missing. Tests run both.
inline bool async_copies_at_issue = true;
struct AsyncCopy {
  void* to;
  const void* from;
  bool wanted;
  void run() const { wanted ? memcpy(to, from, 16) : memset(to, 0, 16); }
};
inline thread_local std::vector<AsyncCopy> async_open;
inline thread_local std::vector<std::vector<AsyncCopy>> async_groups;

inline void async_copy16(void* shared, const void* global, bool wanted) {
  if (((uintptr_t)shared | (wanted ? (uintptr_t)global : 0)) % 16) {
    fprintf(stderr, "cp.async of 16 bytes from %p to %p: misaligned\n", global, shared);
    abort();
  }
  const AsyncCopy copy{shared, global, wanted};
  async_copies_at_issue ? copy.run() : async_open.push_back(copy);
}
inline void async_commit() {
  async_groups.push_back(std::move(async_open));
  async_open.clear();
}
inline void async_wait(size_t pending) {
  while (async_groups.size() > pending) {
    for (const AsyncCopy& copy : async_groups.front()) copy.run();
    async_groups.erase(async_groups.begin());
  }
}

}  // namespace emulation

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::exchange(value, static_cast<unsigned>(source));
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, emulation::lane ^ static_cast<unsigned>(mask));
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  return emulation::exchange(value, emulation::lane >= delta ? emulation::lane - delta : emulation::lane);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  return emulation::exchange(value, emulation::lane + delta < 32 ? emulation::lane + delta : emulation::lane);
}

inline bool __all_sync(unsigned, bool value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const bool other = emulation::exchange(value, emulation::lane ^ static_cast<unsigned>(mask));
    value = value && other;
  }
  return value;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace emulation {

// What cudaFuncSetAttribute allowed each kernel beyond the 48 KiB of dynamic shared memory that all may have.
inline std::map<const void*, size_t> shared_limits;

// Runs kernel(arguments...) for every thread of every block, with the limits a Hopper GPU puts on a launch.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 threads, size_t shared_bytes, Arguments... arguments) {
  const unsigned count = threads.x * threads.y * threads.z;
  const auto allowed = shared_limits.find(reinterpret_cast<const void*>(kernel));
  const size_t most_shared = allowed == shared_limits.end() ? 48 * 1024 : allowed->second;
  if (count == 0 || count > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || shared_bytes > most_shared) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  gridDim = grid;
  blockDim = threads;
  Block shared(count, shared_bytes);
  std::vector<std::thread> all;
  for (unsigned t = 0; t < count; ++t)
    all.emplace_back([&, t] {
      block = &shared;
      warp = shared.warps[t / 32].get();
      lane = t % 32;
      threadIdx = dim3(t % threads.x, t / threads.x % threads.y, t / (threads.x * threads.y));
      for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
          for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y, z);
            kernel(arguments...);
            async_commit();
            async_wait(0);
            shared.barrier.wait();
          }
    });
  for (std::thread& thread : all) thread.join();
}

}  // namespace emulation

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > 227 * 1024) return emulation::last_error = cudaErrorInvalidConfiguration;
  emulation::shared_limits[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

#define ROM_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  emulation::launch(kernel, grid, threads, shared_bytes, __VA_ARGS__)
#define ROM_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulation::block->shared.data())
