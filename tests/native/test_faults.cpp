// SPDX-License-Identifier: Apache-2.0
//
// The fault kernels, called as any C program would. Every array has its exact size, so that a sanitizer sees a step
// past its end.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.hpp"
#include "rom/faults.h"

namespace {
#include "core/scalar.hpp"

constexpr uint32_t kAll = ROM_SITE_ALL, kKeep = 0xffffffffu, kSign = 0x80000000u;
constexpr int64_t kTarget = 3;

rom_tensor flat(void* data, int64_t size, rom_dtype dtype) { return {data, {size}, {1}, 1, dtype}; }

rom_site site(uint32_t sample, uint32_t row, uint32_t col, uint32_t k, uint32_t flip, uint16_t flags = 0) {
  return {sample, row, col, k, kKeep, flip, (uint16_t)kTarget, flags, 0};
}

// Values (sample, row, col, k) of W words each, all bits zero; what the sites leave behind and their log.
template <class W>
struct Patched {
  std::vector<W> words;
  std::vector<int32_t> log;

  Patched(std::vector<rom_site> sites, int64_t samples, int64_t per_value = 1)
      : words((samples ? samples : 1) * 24 * per_value), log(3 * sites.size()) {
    rom_fault_patch_args a{};
    a.launch.threads = 1;
    a.target = kTarget;
    a.element_bytes = (int64_t)sizeof(W) * per_value;
    a.samples = samples, a.rows = 2, a.cols = 3, a.ks = 4;
    a.sample_stride = 24, a.row_stride = 12, a.col_stride = 4, a.k_stride = 1;
    a.values = flat(words.data(), (int64_t)words.size(), ROM_UINT8);
    a.sites = {sites.data(), {(int64_t)sites.size(), 8}, {8, 1}, 2, ROM_INT32};
    a.log = {log.data(), {(int64_t)sites.size(), 3}, {3, 1}, 2, ROM_INT32};
    CHECK(rom_fault_patch_cpu(&a) == ROM_OK);
  }
};

template <class W>
void check_patch() {
  const std::vector<rom_site> sites = {site(1, 1, 2, 3, 5), site(kAll, 0, 1, 2, 6), site(1, 1, 2, 3, 1),
                                       site(0, 2, 0, 0, 1), site(7, 0, 0, 0, 1)};
  const Patched<W> batch(sites, 2), shared(sites, 0);
  for (size_t i = 0; i < batch.words.size(); ++i)
    CHECK(batch.words[i] == (i == 47 ? 4 : i == 6 || i == 30 ? 6 : 0));  // the last place twice: 5, then 5 ^ 1
  CHECK((batch.log == std::vector<int32_t>{1, 0, 5, 1, 0, 6, 1, 5, 4, -1, 0, 0, 0, 0, 0}));
  for (size_t i = 0; i < shared.words.size(); ++i) CHECK(shared.words[i] == (i == 6 ? 6 : 0));
  CHECK((shared.log == std::vector<int32_t>{0, 0, 0, 1, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
}

template <class S>
constexpr rom_dtype kDtype = ROM_FLOAT32;
template <>
constexpr rom_dtype kDtype<bfloat16> = ROM_BFLOAT16;
template <>
constexpr rom_dtype kDtype<float16> = ROM_FLOAT16;
template <>
constexpr rom_dtype kDtype<double> = ROM_FLOAT64;

// Two sums of a product (S, 1, M, K) x (1, 1, K, N), N the faster stride of neither: one has its sign flipped on the
// way and at its end, the other two wrong weights. T: compute type.
template <class S, class T>
void check_accumulate(bool exact, double tolerance) {
  const int64_t samples = 2, rows = 3, cols = 5, k_size = 70, split = 64;
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  const auto values = [&](int64_t count) {
    std::vector<S> made(count);
    for (S& value : made) value = narrow<S>((T)normal(generator) / 4);
    return made;
  };
  auto a = values(samples * rows * k_size), b = values(cols * k_size), weights = values(2);
  std::vector<T> bias(cols, (T)0.5);
  std::vector<S> y(samples * rows * cols);
  const auto product = [&](int64_t place, int64_t from, int64_t to) {
    double sum = 0;
    for (int64_t k = from; k < to; ++k)
      sum += (double)widen(a[place / cols * k_size + k]) * (double)widen(b[place % cols * k_size + k]);
    return sum;
  };
  for (size_t i = 0; i < y.size(); ++i) y[i] = narrow<S>((T)(product((int64_t)i, 0, k_size) + 0.5));
  const std::vector<S> clean = y;

  // event rows name sites; k_size + 1: after the bias. 64-bit words hold the sign in their upper half
  const uint16_t upper = sizeof(T) == 8;
  std::vector<rom_site> sites = {site(kAll, 0, 0, 0, kSign, upper), site(kAll, 0, 0, 0, kSign, upper)};
  std::vector<int64_t> outputs = {7, 29}, starts = {0, 2, 2}, at = {0, 1}, ks = {split, k_size + 1};
  std::vector<int64_t> weight_starts = {0, 0, 0, 2}, weight_k = {0, k_size - 1};
  std::vector<int32_t> bits(4);
  rom_fault_accumulate_args args{};
  args.launch.threads = 2;
  args.exact = exact;
  args.a = {a.data(), {samples, 1, rows, k_size}, {rows * k_size, 0, k_size, 1}, 4, kDtype<S>};
  args.b = {b.data(), {1, 1, k_size, cols}, {0, 0, 1, k_size}, 4, kDtype<S>};
  args.bias = flat(bias.data(), cols, kDtype<T>);
  args.y = {y.data(), {samples, 1, rows, cols}, {rows * cols, rows * cols, cols, 1}, 4, kDtype<S>};
  args.sites = {sites.data(), {2, 8}, {8, 1}, 2, ROM_INT32};
  args.outputs = flat(outputs.data(), 2, ROM_INT64), args.starts = flat(starts.data(), 3, ROM_INT64);
  args.rows = flat(at.data(), 2, ROM_INT64), args.k = flat(ks.data(), 2, ROM_INT64);
  args.weight_starts = {weight_starts.data(), {2, 2}, {2, 1}, 2, ROM_INT64};
  args.weight_k = flat(weight_k.data(), 2, ROM_INT64);
  args.weights = flat(weights.data(), 2, kDtype<S>);
  args.bits = {bits.data(), {2, 2}, {2, 1}, 2, ROM_INT32};
  CHECK(rom_fault_accumulate_cpu(&args) == ROM_OK);

  double second = product(29, 1, k_size - 1) + 0.5;
  for (int i = 0; i < 2; ++i) second += (double)widen(a[5 * k_size + weight_k[i]]) * (double)widen(weights[i]);
  for (size_t i = 0; i < y.size(); ++i) {
    const double first = -(-product(7, 0, split) + product(7, split, k_size) + 0.5);
    const double expected = i == 7 ? first : i == 29 ? second : (double)widen(clean[i]);
    CHECK_NEAR((double)widen(y[i]), expected, tolerance, (double)i);
  }
  CHECK((uint32_t)(bits[0] ^ bits[1]) == kSign && (uint32_t)(bits[2] ^ bits[3]) == kSign);
}

}  // namespace

TEST(fault_patches_reach_their_places_only) {
  check_patch<uint32_t>();
  check_patch<uint16_t>();
  check_patch<uint8_t>();
  const Patched<uint32_t> doubles({site(0, 0, 0, 1, 5), site(0, 0, 0, 1, 6, 1)}, 1, 2);  // both words of a value
  for (size_t i = 0; i < doubles.words.size(); ++i) CHECK(doubles.words[i] == (i == 2 ? 5 : i == 3 ? 6 : 0));
  const Patched<uint32_t> floats({site(0, 0, 0, 1, 5, 1)}, 1);  // no second word
  CHECK(floats.log[0] == -1);
}

TEST(faulty_sums_agree_with_loops_in_double_precision) {
  for (bool exact : {true, false}) {
    check_accumulate<float, float>(exact, 1e-5);
    check_accumulate<double, double>(exact, 1e-13);
    check_accumulate<bfloat16, float>(exact, 1.0 / 64);
    check_accumulate<float16, float>(exact, 1.0 / 512);
  }
}

TEST(faults_name_what_they_cannot_take) {
  rom_fault_patch_args patch{};
  patch.element_bytes = 3;
  CHECK(rom_fault_patch_cpu(&patch) == ROM_UNSUPPORTED);
  rom_fault_accumulate_args sums{};
  sums.a.dtype = ROM_INT32;
  CHECK(rom_fault_accumulate_cpu(&sums) == ROM_UNSUPPORTED);
}
