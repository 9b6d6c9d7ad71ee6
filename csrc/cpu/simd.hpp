// SPDX-License-Identifier: Apache-2.0
//
// Vectors for the CPU kernels: GCC/Clang vector extensions, so `+ - * /`, comparisons and `mask ? a : b` are operators,
// and one source serves AVX-512 (16 floats), AVX2 (8) and plain C++ (4: SSE2, NEON). Include inside an anonymous
// namespace (see kernel.hpp). Every function is for float and double; 16-bit types are widened on load.
#include "core/scalar.hpp"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ROM_INLINE static inline __attribute__((always_inline))
#define ROM_UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
#define ROM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define ROM_VECTOR_BYTES 32
#else
#define ROM_VECTOR_BYTES 16
#endif

typedef float vfloat __attribute__((vector_size(ROM_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(ROM_VECTOR_BYTES)));
typedef int32_t vint32 __attribute__((vector_size(ROM_VECTOR_BYTES)));
typedef int64_t vint64 __attribute__((vector_size(ROM_VECTOR_BYTES)));
typedef uint32_t vuint32 __attribute__((vector_size(ROM_VECTOR_BYTES)));

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  using type = vfloat;
  using bits = vint32;
};
template <>
struct VecOf<double> {
  using type = vdouble;
  using bits = vint64;
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int lanes = ROM_VECTOR_BYTES / (int)sizeof(T);

template <class V>
struct ScalarOf {
  using type = float;
};
template <>
struct ScalarOf<vdouble> {
  using type = double;
};
template <class V>
using Scalar = typename ScalarOf<V>::type;

// The type a storage type computes in: double for double, float for the rest.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class T>
ROM_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x and folds away; 0 + x is not, for -0
}

// ------------------------------------------------------------------------------------------------ load and store
template <class T>
ROM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
ROM_INLINE vfloat load(const bfloat16* p) {
#if defined(__AVX512F__)
  __m256i half = _mm256_loadu_si256((const __m256i*)p);
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
  __m128i half = _mm_loadu_si128((const __m128i*)p);
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  vfloat v;
  for (int i = 0; i < lanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}
ROM_INLINE vfloat load(const float16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vfloat v;
  for (int i = 0; i < lanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

template <class T>
ROM_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
ROM_INLINE void store(bfloat16* p, vfloat v) {
#if defined(__AVX512F__) || defined(__AVX2__)
  const vuint32 bits = (vuint32)v;
  const vuint32 even = bits + 0x7fff + ((bits >> 16) & 1);
  const vuint32 rounded = ((v != v) ? (bits | 0x00400000) : even);  // a NaN stays a NaN
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)rounded, 16)));
#else
  const __m256i high = _mm256_srli_epi32((__m256i)rounded, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#endif
#else
  for (int i = 0; i < lanes<float>; ++i) p[i] = narrow<bfloat16>(v[i]);
#endif
}
ROM_INLINE void store(float16* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < lanes<float>; ++i) p[i] = narrow<float16>(v[i]);
#endif
}

// For results that are not read again soon: a whole line goes past the caches instead of being fetched to be
// overwritten.
template <class S, class V>
ROM_INLINE void stream(S* p, V v) {
  store(p, v);
}
#if defined(__AVX512F__)
ROM_INLINE void stream(float* p, vfloat v) {
  if (((uintptr_t)p & 63) == 0)
    _mm512_stream_ps(p, (__m512)v);
  else
    store(p, v);
}
#endif
// Streamed stores are visible to other threads after this.
ROM_INLINE void stream_end() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// The first `count` lanes only; the others read as zero and are not written. Memory past them is never touched.
template <class S>
ROM_INLINE Vec<Compute<S>> load_partial(const S* p, int count) {
  S buffer[lanes<Compute<S>>];
  __builtin_memset(buffer, 0, sizeof(buffer));
  __builtin_memcpy(buffer, p, (size_t)count * sizeof(S));
  return load(buffer);
}
template <class S>
ROM_INLINE void store_partial(S* p, Vec<Compute<S>> v, int count) {
  S buffer[lanes<Compute<S>>];
  store(buffer, v);
  __builtin_memcpy(p, buffer, (size_t)count * sizeof(S));
}
#if defined(__AVX512F__)
ROM_INLINE vfloat load_partial(const float* p, int count) {
  return (vfloat)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
}
ROM_INLINE void store_partial(float* p, vfloat v, int count) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
}
#endif

// ------------------------------------------------------------------------------------------------ arithmetic
// a * b + c, rounded once where the target has FMA. With operators alone the compiler may pick another product to fuse.
ROM_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
ROM_INLINE vdouble fma(vdouble a, vdouble b, vdouble c) { return a * b + c; }
// A NaN in `x` stays.
template <class V>
ROM_INLINE V at_most(V x, Scalar<V> bound) {
  return x > bound ? V{} + bound : x;
}
template <class V>
ROM_INLINE V at_least(V x, Scalar<V> bound) {
  return x < bound ? V{} + bound : x;
}
#if defined(__AVX2__)
// One instruction instead of compare and blend; of two operands these return the second where either is a NaN.
ROM_INLINE vfloat at_most(vfloat x, float bound) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x);
#else
  return (vfloat)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x);
#endif
}
ROM_INLINE vfloat at_least(vfloat x, float bound) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
#else
  return (vfloat)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
#endif
}
#endif

// Lane sum in a fixed order: halves are added until one is left.
template <class T>
ROM_INLINE T sum(Vec<T> v) {
  T x[lanes<T>];
  __builtin_memcpy(x, &v, sizeof(v));
  ROM_UNROLL
  for (int width = lanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

ROM_INLINE vfloat reciprocal(vfloat y) {
#if defined(__AVX512F__)
  const vfloat r = (vfloat)_mm512_rcp14_ps((__m512)y);
  return r * (2.0f - y * r);
#elif defined(__AVX2__)
  vfloat r = (vfloat)_mm256_rcp_ps((__m256)y);
  r = r * (2.0f - y * r);
  return r * (2.0f - y * r);
#else
  return 1.0f / y;
#endif
}
ROM_INLINE vdouble reciprocal(vdouble y) { return 1.0 / y; }

// ------------------------------------------------------------------------------------------------ functions
// Each is written once for a vector (X = vfloat, vdouble) and for several that advance together (staged.hpp).

// x = n + r with n the nearest integer; `shift` carries n to scale_by, in the form this instruction set likes.
template <class X>
struct Reduced {
  X shift, r;
};
ROM_INLINE Reduced<vfloat> reduce(vfloat x) {
#if defined(__AVX512F__)
  const vfloat n = (vfloat)_mm512_roundscale_ps((__m512)x, 8);
  return {n, x - n};
#else
  x = at_most(at_least(x, -126.0f), 127.49999f);
  const vfloat shift = x + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  return {shift, x - (shift - 12582912.0f)};
#endif
}
ROM_INLINE Reduced<vdouble> reduce(vdouble x) {
  x = at_most(at_least(x, -1022.0), 1023.49);
  const vdouble shift = x + 6755399441055744.0;  // 1.5 * 2^52
  return {shift, x - (shift - 6755399441055744.0)};
}
// p * 2^n
ROM_INLINE vfloat scale_by(vfloat p, vfloat shift) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)shift);
#else
  return (vfloat)((vint32)p + ((vint32)shift << 23));
#endif
}
ROM_INLINE vdouble scale_by(vdouble p, vdouble shift) { return (vdouble)((vint64)p + ((vint64)shift << 52)); }

// 2^x with nearest reduction and the constant term exactly 1: a fit whose constant is 1 + 2e-7 biases decays near 1,
// and the scan amplifies that by 1/(1 - a) (measured: 3e-4 output error instead of 5e-6). Relative error 9.2e-8;
// float64: the Taylor series to degree 13, below 4e-18.
template <class X>
ROM_INLINE X exp2(X x) {
  const Reduced<X> part = reduce(x);
  if constexpr (sizeof(Scalar<X>) == 4) {
    const X r = part.r;
    X p = r * 0.00132646524f + 0.00967151132f;
    p = p * r + 0.0555073396f;
    p = p * r + 0.240222421f;
    p = p * r + 0.693146978f;
    return scale_by(p * r + 1.0f, part.shift);
  } else {
    const X r = part.r * 0.693147180559945309417232;
    X p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    const double inverse_factorial[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                                        1.0 / 120,      1.0 / 24,      1.0 / 6,      1.0 / 2,     1.0,        1.0};
    for (double c : inverse_factorial) p = p * r + c;
    return scale_by(p, part.shift);
  }
}

template <class X>
ROM_INLINE X exp(X x) {
  return exp2(x * (Scalar<X>)1.44269504088896340736);
}
// exp within 1 ulp also where |x| is large: ln 2 is taken off in two parts, the first with an exact product. The
// rounding of x log2(e) alone costs exp(-10) 8 ulp.
ROM_INLINE vfloat exp_rounded(vfloat x) {
  const Reduced<vfloat> part = reduce(x * 1.44269504f);
#if defined(__AVX512F__)
  const vfloat n = part.shift;
#else
  const vfloat n = part.shift - 12582912.0f;
#endif
  const vfloat r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vfloat p = r * (1.0f / 5040) + 1.0f / 720;
  const float inverse_factorial[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float c : inverse_factorial) p = p * r + c;
  return scale_by(p, part.shift);
}
ROM_INLINE vdouble exp_rounded(vdouble x) { return exp(x); }
template <class X>
ROM_INLINE X sigmoid(X x) {
  // Kept inside +-80 (float), so that infinities work and the reciprocal's Newton step stays finite.
  using T = Scalar<X>;
  constexpr T bound = sizeof(T) == 8 ? 700 : 80;
  return reciprocal(exp(at_least(at_most(x * (T)-1, bound), -bound)) + (T)1);
}

// y = 1 + e as 2^k (1 + f) with f in [1/sqrt(2) - 1, sqrt(2) - 1]; for k = 0, f is e itself: small e stay exact.
template <class X>
struct LogSplit {
  X k, f;
};
ROM_INLINE LogSplit<vfloat> log_split(vfloat e, vfloat y) {
  const vint32 bits = (vint32)y, k = (bits - 0x3f3504f3) >> 23;
  const vfloat mantissa = (vfloat)(bits - (k << 23));
  return {__builtin_convertvector(k, vfloat), k > 0 ? mantissa - 1.0f : e};
}
ROM_INLINE vfloat select_above(vfloat x, float bound, vfloat above, vfloat below) { return x > bound ? above : below; }

template <class X>
struct SoftplusResult {
  X value, slope;
};
// log(1 + e^x) and its derivative from one exponential. log1p in atanh form: log(1 + e) alone loses 1e-4 at 0.02.
template <class X>
ROM_INLINE SoftplusResult<X> softplus(X x) {
  const X e = exp(at_least(at_most(x, 30.0f), -87.0f)), y = e + 1.0f;
  const LogSplit<X> part = log_split(e, y);
  const X s = part.f * reciprocal(part.f + 2.0f), s2 = s * s;
  X p = s2 * (2.0f / 9) + (2.0f / 7);
  p = p * s2 + 2.0f / 5;
  p = p * s2 + 2.0f / 3;
  p = p * s2 + 2.0f;
  // torch's threshold: beyond 20 softplus is the identity (and its slope rounds to 1)
  return {select_above(x, 20.0f, x, part.k * 0.69314718056f + p * s), e * reciprocal(y)};
}
ROM_INLINE SoftplusResult<vdouble> softplus(vdouble x) {
  vdouble value, slope;
  for (int i = 0; i < lanes<double>; ++i) {  // libm: float64 serves the tests, not speed
    const double e = ::exp(x[i]);
    value[i] = x[i] > 20.0 ? x[i] : ::log1p(e);
    slope[i] = x[i] > 20.0 ? 1.0 : e / (1.0 + e);
  }
  return {value, slope};
}

// ------------------------------------------------------------------------------------------------ flush to zero
// Decayed states become subnormal, and arithmetic on those is ~100 times slower. On for the life of the object.
struct FlushSubnormals {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(saved | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
  uint64_t saved;
  FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" ::"r"(saved | (1ull << 24)));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" ::"r"(saved)); }
#endif
};

// ------------------------------------------------------------------------------------------------ tasks and types
// body(task, worker) for every task; `body` may be any local function object.
template <class F>
ROM_INLINE void parallel_for(int64_t tasks, int64_t threads, F body) {
  rom_parallel_for(tasks, threads, [](void* f, int64_t task, int64_t worker) { (*(F*)f)(task, worker); }, &body);
}

// Calls f(Type<S>{}) with the storage type S that `dtype` names; answers false for a type that is not floating.
template <class S>
struct Type {};
template <class F>
ROM_INLINE bool with_storage_type(int dtype, F f) {
  switch (dtype) {
    case ROM_FLOAT32: f(Type<float>{}); return true;
    case ROM_BFLOAT16: f(Type<bfloat16>{}); return true;
    case ROM_FLOAT16: f(Type<float16>{}); return true;
    case ROM_FLOAT64: f(Type<double>{}); return true;
    default: return false;
  }
}

// A whole vector or the tail of a row, told apart at compile time: the loads and stores of whole vectors stay plain.
struct Full {};
struct Tail {
  int count;
};
template <class S>
ROM_INLINE Vec<Compute<S>> get(const S* p, Full) {
  return load(p);
}
template <class S>
ROM_INLINE Vec<Compute<S>> get(const S* p, Tail tail) {
  return load_partial(p, tail.count);
}
template <class S>
ROM_INLINE void put(S* p, Vec<Compute<S>> v, Full) {
  store(p, v);
}
template <class S>
ROM_INLINE void put(S* p, Vec<Compute<S>> v, Tail tail) {
  store_partial(p, v, tail.count);
}
ROM_INLINE int count_of(Full, int whole) { return whole; }
ROM_INLINE int count_of(Tail tail, int) { return tail.count; }
// f(c, Full or Tail) over the vectors of [begin, end).
template <class T, class F>
ROM_INLINE void each_vector(int64_t begin, int64_t end, F f) {
  int64_t c = begin;
  for (; c + lanes<T> <= end; c += lanes<T>) f(c, Full{});
  if (c < end) f(c, Tail{(int)(end - c)});
}
