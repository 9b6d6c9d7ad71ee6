// SPDX-License-Identifier: Apache-2.0
//
// What one scheduler of the chip can do with the instructions the scan is made of, and what its memory can move. One
// line of JSON per measurement. The figures decide how many lanes share a channel (the cost of a warp-uniform LDS.128),
// how many of 16 exponentials go to the FMA pipe, and how many warps a scheduler needs to reach its rate.
//
//   nvcc -std=c++17 -O3 -arch=sm_90a micro.cu -o micro && ./micro
//
// tests/gates/test_micro.py counts the instructions of every loop: nothing that is timed may be optimised away.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "micro: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// ------------------------------------------------------------------------------------------------ instruction mixes
// A body has registers (its members), `turn`, which the loop repeats and which counts as kCount instructions or
// elements, and `sum`, which makes the results observable.

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Degree 5 on the FMA pipe after reduction to the nearest integer; the constant term is exactly 1.
__device__ __forceinline__ float ex2_polynomial(float x) {
  constexpr float kMagic = 12582912.f;  // 1.5 · 2^23: adding it rounds to an integer, held in the low bits
  x = fmaxf(x, -126.f);
  const float rounded = x + kMagic, f = x - (rounded - kMagic);
  float p = .00132646524f;
  p = fmaf(p, f, .00967151132f);
  p = fmaf(p, f, .0555073396f);
  p = fmaf(p, f, .240222421f);
  p = fmaf(p, f, .693146978f);
  p = fmaf(p, f, 1.f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(rounded) << 23));
}

struct Ffma {
  static constexpr int kCount = 64;
  float x[8];
  __device__ explicit Ffma(float seed) {
    for (float& v : x) v = seed += 1;
  }
  __device__ void turn(int, const float4*) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("fma.rn.f32 %0, %0, %0, %0;" : "+f"(x[i % 8]));
  }
  __device__ float sum() const { return x[0] + x[1] + x[2] + x[3] + x[4] + x[5] + x[6] + x[7]; }
};

struct Ex2 {
  static constexpr int kCount = 64;
  float x[8];
  __device__ explicit Ex2(float seed) {
    for (float& v : x) v = seed += 1;
  }
  __device__ void turn(int, const float4*) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i % 8] = ex2(x[i % 8]);
  }
  __device__ float sum() const { return x[0] + x[1] + x[2] + x[3] + x[4] + x[5] + x[6] + x[7]; }
};

// kFmas FFMA for every LDS.128. The lanes of a warp read kAddresses different vectors: 1 as in the forward scan, 4 as
// in the backward scan (state quads), 32 as in a tile of its own (four wavefronts). Volatile, or dead components would
// shrink the load.
template <int kAddresses, int kFmas>
struct Lds128 {
  static constexpr int kCount = 16;
  float x[8];
  uint32_t base;
  __device__ explicit Lds128(float seed) {
    for (float& v : x) v = seed += 1;
    base = threadIdx.x % kAddresses * 16;
  }
  __device__ void turn(int i, const float4* tile) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(tile)) + base + i % 4 * 512;
    float v[kCount][4];
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v[k][0]), "=f"(v[k][1]), "=f"(v[k][2]), "=f"(v[k][3])
                   : "r"(address + k * 512));
#pragma unroll
    for (int k = 0; k < kCount; ++k)
#pragma unroll
      for (int f = 0; f < kFmas; ++f)
        asm volatile("fma.rn.f32 %0, %1, %0, %0;" : "+f"(x[(k * kFmas + f) % 8]) : "f"(v[k][f % 4]));
  }
  __device__ float sum() const { return x[0] + x[1] + x[2] + x[3] + x[4] + x[5] + x[6] + x[7]; }
};

// 16 exponentials of δ·A, kPolynomial of them on the FMA pipe.
template <int kPolynomial>
struct Exponentials {
  static constexpr int kCount = 16;
  float A[16], total[4] = {}, delta;  // four sums: adding one after the other would be the limit
  __device__ explicit Exponentials(float seed) : delta(seed) {
    for (float& a : A) a = seed -= 1;
  }
  __device__ void turn(int, const float4*) {
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const float x = delta * A[n];
      total[n % 4] += n * kPolynomial / 16 != (n + 1) * kPolynomial / 16 ? ex2_polynomial(x) : ex2(x);
    }
    delta += 1e-6f;
  }
  __device__ float sum() const { return total[0] + total[1] + total[2] + total[3]; }
};

// A time step of 16 states in registers: exponential, δBu, h, y; B and C are in registers, so no load is in the way.
template <int kPolynomial>
struct ScanStep {
  static constexpr int kCount = 16;
  float A[16], B[16], C[16], h[16], y[2] = {}, delta;
  __device__ explicit ScanStep(float seed) : delta(seed) {
    for (int n = 0; n < 16; ++n) A[n] = seed -= 1, B[n] = seed * .5f, C[n] = seed * .25f, h[n] = 0;
  }
  __device__ void turn(int, const float4*) {
    const float step = delta * .5f;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const float x = delta * A[n];
      const float a = n * kPolynomial / 16 != (n + 1) * kPolynomial / 16 ? ex2_polynomial(x) : ex2(x);
      h[n] = fmaf(a, h[n], step * B[n]);
      y[n % 2] = fmaf(h[n], C[n], y[n % 2]);
    }
    delta += 1e-6f;
  }
  __device__ float sum() const { return y[0] + y[1]; }
};

// ------------------------------------------------------------------------------------------------ the clocked loop
struct Span {
  long long begin, end;
};

__device__ unsigned long long nanoseconds() {
  unsigned long long t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

template <class Body>
__global__ void __launch_bounds__(512) clocked(int turns, float seed, Span* warps, float* sink) {
  __shared__ float4 tile[(Lds128<32, 0>::kCount + 4) * 32];
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(tile) / sizeof(float4)); i += blockDim.x)
    tile[i] = make_float4(seed, seed, seed, seed);
  Body body(seed + threadIdx.x * 1e-3f);
  body.turn(0, tile);  // fetches the code
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 1
  for (int i = 0; i < turns; ++i) body.turn(i, tile);
  const float sum = body.sum();
  const long long end = clock64();
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x % 32 == 0) warps[thread / 32] = {begin, end};
  sink[thread] = sum;
}

// Cycles per kCount-th of a turn on one scheduler: the median block, from its first warp's start to its last one's end.
template <class Body>
double cycles(int processors, int warps_per_scheduler) {
  constexpr int kTurns = 512;
  const int warps = 4 * warps_per_scheduler;
  Span* spans;
  float* sink;
  check(cudaMalloc(&spans, sizeof(Span) * processors * warps), "cudaMalloc");
  check(cudaMalloc(&sink, sizeof(float) * processors * warps * 32), "cudaMalloc");
  for (int run = 0; run < 2; ++run)  // the first one wakes the chip
    clocked<Body><<<processors, warps * 32>>>(kTurns, -.1f, spans, sink);
  check(cudaGetLastError(), "launch");
  std::vector<Span> found(processors * warps);
  check(cudaMemcpy(found.data(), spans, sizeof(Span) * found.size(), cudaMemcpyDeviceToHost), "run");
  check(cudaFree(spans), "cudaFree");
  check(cudaFree(sink), "cudaFree");
  std::vector<long long> blocks;
  for (int b = 0; b < processors; ++b) {
    Span all = found[b * warps];
    for (int w = 1; w < warps; ++w) {
      all.begin = std::min(all.begin, found[b * warps + w].begin);
      all.end = std::max(all.end, found[b * warps + w].end);
    }
    blocks.push_back(all.end - all.begin);
  }
  std::nth_element(blocks.begin(), blocks.begin() + processors / 2, blocks.end());
  return static_cast<double>(blocks[processors / 2]) / kTurns / Body::kCount / warps_per_scheduler;
}

template <class Body>
void measure(int processors, const char* name, const char* per) {
  for (int warps : {1, 2, 4}) {
    std::printf("{\"measure\": \"%s\", \"warps_per_scheduler\": %d, \"value\": %.4f, \"unit\": \"cycles per %s\"}\n",
                name, warps, cycles<Body>(processors, warps), per);
    std::fflush(stdout);
  }
}

// The clock while all schedulers multiply and add: what turns cycles into seconds under load.
__global__ void __launch_bounds__(512) frequency(int turns, double* gigahertz, float* sink) {
  Ffma body(threadIdx.x);
  const unsigned long long start = nanoseconds();
  const long long begin = clock64();
#pragma unroll 1
  for (int i = 0; i < turns; ++i) body.turn(i, nullptr);
  const float sum = body.sum();
  const long long end = clock64();
  const unsigned long long stop = nanoseconds();
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0) gigahertz[blockIdx.x] = static_cast<double>(end - begin) / (stop - start);
}

void measure_frequency(int processors) {
  double* gigahertz;
  float* sink;
  check(cudaMalloc(&gigahertz, sizeof(double) * processors), "cudaMalloc");
  check(cudaMalloc(&sink, sizeof(float) * processors * 512), "cudaMalloc");
  frequency<<<processors, 512>>>(200'000, gigahertz, sink);  // 200 000 · 64 · 4 cycles: about 30 ms
  check(cudaGetLastError(), "launch");
  std::vector<double> found(processors);
  check(cudaMemcpy(found.data(), gigahertz, sizeof(double) * processors, cudaMemcpyDeviceToHost), "run");
  check(cudaFree(gigahertz), "cudaFree");
  check(cudaFree(sink), "cudaFree");
  std::sort(found.begin(), found.end());
  std::printf("{\"measure\": \"clock under FFMA\", \"value\": %.4f, \"unit\": \"GHz\"}\n", found[processors / 2]);
}

// ------------------------------------------------------------------------------------------------ memory
constexpr int kThreads = 256, kUnroll = 4;

// Each turn of a block moves kThreads · kUnroll neighbouring vectors.
template <class Vector>
__global__ void __launch_bounds__(kThreads)
    copy(const Vector* __restrict__ source, Vector* __restrict__ target, int64_t tiles) {
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kThreads * kUnroll + threadIdx.x;
    Vector v[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) v[k] = source[first + k * kThreads];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) target[first + k * kThreads] = v[k];
  }
}

__device__ uint32_t fold(uint2 v) { return v.x ^ v.y; }
__device__ uint32_t fold(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

template <class Vector>
__global__ void __launch_bounds__(kThreads)
    read(const Vector* __restrict__ source, Vector* __restrict__ target, int64_t tiles) {
  uint32_t folded = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kThreads * kUnroll + threadIdx.x;
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) folded ^= fold(source[first + k * kThreads]);
  }
  if (folded == 0x9e3779b9u) target[threadIdx.x] = Vector{folded};  // never, but the compiler cannot know
}

template <class Vector>
using Mover = void (*)(const Vector*, Vector*, int64_t);

template <class Vector>
void measure_memory(const char* name, Mover<Vector> kernel, int passes, void* source, void* target, int64_t bytes,
                    int blocks, const char* grid) {
  const int64_t tiles = bytes / (sizeof(Vector) * kThreads * kUnroll);
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&stop), "event");
  std::vector<float> milliseconds;
  for (int run = 0; run < 12; ++run) {
    check(cudaEventRecord(start), "event");
    kernel<<<blocks ? blocks : static_cast<int>(tiles), kThreads>>>(static_cast<const Vector*>(source),
                                                                    static_cast<Vector*>(target), tiles);
    check(cudaGetLastError(), "launch");
    check(cudaEventRecord(stop), "event");
    check(cudaEventSynchronize(stop), "run");
    float elapsed;
    check(cudaEventElapsedTime(&elapsed, start, stop), "event");
    if (run >= 2) milliseconds.push_back(elapsed);
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  std::printf("{\"measure\": \"%s, %zu-byte vectors, %s\", \"value\": %.1f, \"unit\": \"GB/s\"}\n", name,
              sizeof(Vector), grid, passes * static_cast<double>(bytes) / milliseconds[milliseconds.size() / 2] / 1e6);
  std::fflush(stdout);
  check(cudaEventDestroy(start), "event");
  check(cudaEventDestroy(stop), "event");
}

template <class Vector>
void measure_memory(void* source, void* target, int64_t bytes, int processors) {
  measure_memory<Vector>("copy", copy<Vector>, 2, source, target, bytes, 0, "a block per tile");
  measure_memory<Vector>("copy", copy<Vector>, 2, source, target, bytes, 8 * processors, "8 blocks per SM");
  measure_memory<Vector>("read", read<Vector>, 1, source, target, bytes, 8 * processors, "8 blocks per SM");
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "no GPU");
  const int processors = device.multiProcessorCount;
  measure_frequency(processors);
  measure<Ffma>(processors, "FFMA", "FFMA");
  measure<Ex2>(processors, "ex2.approx", "MUFU.EX2");
  measure<Lds128<1, 1>>(processors, "LDS.128 warp-uniform + 1 FFMA", "LDS.128");
  measure<Lds128<4, 1>>(processors, "LDS.128 of 4 addresses + 1 FFMA", "LDS.128");
  measure<Lds128<32, 1>>(processors, "LDS.128 of 32 addresses + 1 FFMA", "LDS.128");
  measure<Lds128<1, 4>>(processors, "LDS.128 warp-uniform + 4 FFMA", "LDS.128");
  measure<Lds128<1, 8>>(processors, "LDS.128 warp-uniform + 8 FFMA", "LDS.128");
  measure<Lds128<1, 16>>(processors, "LDS.128 warp-uniform + 16 FFMA", "LDS.128");
  measure<Lds128<4, 8>>(processors, "LDS.128 of 4 addresses + 8 FFMA", "LDS.128");
  measure<Exponentials<0>>(processors, "exp2, 0 of 16 polynomial", "exponential");
  measure<Exponentials<1>>(processors, "exp2, 1 of 16 polynomial", "exponential");
  measure<Exponentials<2>>(processors, "exp2, 2 of 16 polynomial", "exponential");
  measure<Exponentials<3>>(processors, "exp2, 3 of 16 polynomial", "exponential");
  measure<Exponentials<4>>(processors, "exp2, 4 of 16 polynomial", "exponential");
  measure<ScanStep<0>>(processors, "scan step, 0 of 16 polynomial", "state");
  measure<ScanStep<1>>(processors, "scan step, 1 of 16 polynomial", "state");
  measure<ScanStep<2>>(processors, "scan step, 2 of 16 polynomial", "state");
  measure<ScanStep<3>>(processors, "scan step, 3 of 16 polynomial", "state");
  measure<ScanStep<4>>(processors, "scan step, 4 of 16 polynomial", "state");
  constexpr int64_t kBytes = int64_t{1} << 30;
  void *source, *target;
  check(cudaMalloc(&source, kBytes), "cudaMalloc");
  check(cudaMalloc(&target, kBytes), "cudaMalloc");
  check(cudaMemset(source, 1, kBytes), "cudaMemset");
  measure_memory<uint2>(source, target, kBytes, processors);
  measure_memory<uint4>(source, target, kBytes, processors);
  check(cudaFree(source), "cudaFree");
  check(cudaFree(target), "cudaFree");
  return 0;
}
