// SPDX-License-Identifier: Apache-2.0
//
// csrc/cpu/simd.hpp against libm in double precision, on the instruction set this file is compiled for.
#include "check.hpp"
#include "cpu/kernel.hpp"

namespace {
#include "cpu/simd.hpp"

bool runs_here() {
#if defined(ROM_ISA_AVX512)
  return rom_cpu_isa_level() >= 2;
#elif defined(ROM_ISA_AVX2)
  return rom_cpu_isa_level() >= 1;
#else
  return true;
#endif
}

// check(x[lane], f(x)[lane]) for `steps` arguments evenly spread over [low, high].
template <class T, class F, class G>
void sweep(double low, double high, int64_t steps, F f, G check) {
  for (int64_t start = 0; start < steps; start += lanes<T>) {
    T x[lanes<T>];
    for (int i = 0; i < lanes<T>; ++i) x[i] = (T)(low + (high - low) * (double)(start + i) / (double)steps);
    const Vec<T> y = f(load(x));
    for (int i = 0; i < lanes<T>; ++i) check((double)x[i], (double)y[i]);
  }
}

constexpr int64_t kSteps = 400000;

// Bounds are the worst error measured over 4 million arguments on each instruction set, and a fifth more.
void check_exp2() {
  sweep<float>(
      -125.9, 127.4, kSteps, [](vfloat x) { return exp2(x); },
      [](double x, double y) { CHECK_RELATIVE(y, ::exp2(x), 2.2e-7, x); });
  sweep<double>(
      -1021, 1023, kSteps, [](vdouble x) { return exp2(x); },
      [](double x, double y) { CHECK_RELATIVE(y, ::exp2(x), 3e-16, x); });
  CHECK(exp2(broadcast(0.0f))[0] == 1.0f);  // exactly: decays near 1 drift otherwise
  CHECK(exp2(broadcast(0.0))[0] == 1.0);
  CHECK(exp2(broadcast(-INFINITY))[0] <= 1.2e-38f);
  const float nan = exp2(broadcast((float)NAN))[0];
  CHECK(nan != nan);
}

void check_exp_rounded() {
  sweep<float>(
      -87, 80, kSteps, [](vfloat x) { return exp_rounded(x); },
      [](double x, double y) { CHECK_RELATIVE(y, ::exp(x), 1.2e-7, x); });
}

double softplus_exactly(double x) { return x > 20 ? x : ::log1p(::exp(x)); }

void check_softplus() {
  const auto value = [](auto x) { return softplus(x).value; };
  // exp(x) is 2^(x log2 e), whose product is rounded: the relative error grows with |x|.
  sweep<float>(-80, -20, kSteps, value, [](double x, double y) { CHECK_RELATIVE(y, softplus_exactly(x), 5e-6, x); });
  sweep<float>(-20, 80, kSteps, value, [](double x, double y) { CHECK_RELATIVE(y, softplus_exactly(x), 1.3e-6, x); });
  sweep<float>(
      -80, 80, kSteps, [](vfloat x) { return softplus(x).slope; },
      [](double x, double y) { CHECK_NEAR(y, x > 20 ? 1 : 1 / (1 + ::exp(-x)), 2.2e-7, x); });
  sweep<double>(-80, 80, kSteps / 8, value,
                [](double x, double y) { CHECK_RELATIVE(y, softplus_exactly(x), 1e-14, x); });
}

void check_sigmoid() {
  sweep<float>(
      -100, 100, kSteps, [](vfloat x) { return sigmoid(x); },
      [](double x, double y) { CHECK_NEAR(y, 1 / (1 + ::exp(-x)), 2e-7, x); });
  sweep<double>(
      -100, 100, kSteps / 8, [](vdouble x) { return sigmoid(x); },
      [](double x, double y) { CHECK_NEAR(y, 1 / (1 + ::exp(-x)), 1e-15, x); });
  CHECK_NEAR(sigmoid(broadcast(INFINITY))[0], 1.0, 1.3e-7, INFINITY);
  CHECK(sigmoid(broadcast(-INFINITY))[0] < 1e-30f);
}

void check_reciprocal_and_sum() {
  sweep<float>(
      0.01, 1000, kSteps, [](vfloat x) { return reciprocal(x); },
      [](double x, double y) { CHECK_RELATIVE(y, 1 / x, 2e-7, x); });
  vfloat v;
  float expected = 0;
  for (int i = 0; i < lanes<float>; ++i) expected += v[i] = (float)(i + 1);
  CHECK(sum<float>(v) == expected);
}

// Vector loads and stores of every 16-bit value agree with the scalar conversions.
template <class S>
void check_storage() {
  for (int start = 0; start < 65536; start += lanes<float>) {
    S in[lanes<float>], out[lanes<float>];
    for (int i = 0; i < lanes<float>; ++i) in[i] = S{(uint16_t)(start + i)};
    const vfloat v = load(in);
    store(out, v);
    for (int i = 0; i < lanes<float>; ++i) {
      const float scalar = widen(in[i]);
      CHECK_NEAR(v[i], scalar, 0.0, start + i);
      if (scalar == scalar) CHECK(out[i].bits == in[i].bits);
      if (scalar != scalar) CHECK(widen(out[i]) != widen(out[i]));
    }
  }
  uint32_t random = 1;
  for (int repeat = 0; repeat < 100000; ++repeat) {
    float in[lanes<float>];
    S out[lanes<float>];
    for (float& x : in) {
      random = random * 1664525u + 1013904223u;
      x = float_from_bits(random);
    }
    store(out, load(in));
    for (int i = 0; i < lanes<float>; ++i)
      if (in[i] == in[i]) CHECK(out[i].bits == narrow<S>(in[i]).bits);
  }
}

// A partial access reads and writes its lanes and nothing else (the sanitizers watch the memory behind them).
template <class S>
void check_partial() {
  constexpr int width = lanes<Compute<S>>;
  for (int count = 0; count <= width; ++count) {
    S* memory = new S[count];
    for (int i = 0; i < count; ++i) memory[i] = narrow<S>((Compute<S>)(i + 1));
    const Vec<Compute<S>> v = load_partial(memory, count);
    for (int i = 0; i < width; ++i) CHECK(v[i] == (i < count ? (Compute<S>)(i + 1) : 0));
    store_partial(memory, v + v, count);
    for (int i = 0; i < count; ++i) CHECK(widen(memory[i]) == (Compute<S>)(2 * i + 2));
    delete[] memory;
  }
}

void check_flush() {
  volatile float tiny = 1e-38f;
  {
    FlushSubnormals flush;
    CHECK(tiny * 0.1f == 0.0f);
    volatile uint16_t bits = 1;  // a subnormal float16 is no subnormal float, and stays
    CHECK(widen(float16{bits}) == 5.9604644775390625e-8f);
    const float16 values[lanes<float>] = {{bits}};
    CHECK(load(values)[0] == 5.9604644775390625e-8f);
  }
  CHECK(tiny * 0.1f != 0.0f);
}

void all() {
  if (!runs_here()) return;
  check_exp2();
  check_exp_rounded();
  check_softplus();
  check_sigmoid();
  check_reciprocal_and_sum();
  check_storage<bfloat16>();
  check_storage<float16>();
  check_partial<float>();
  check_partial<double>();
  check_partial<bfloat16>();
  check_partial<float16>();
  check_flush();
}

#define NAME_(isa) "vector_math_" #isa
#define NAME(isa) NAME_(isa)
const TestCase registered(NAME(ROM_ISA), all);

}  // namespace
