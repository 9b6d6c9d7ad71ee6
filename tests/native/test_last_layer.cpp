// SPDX-License-Identifier: Apache-2.0
//
// Flips of a last layer against softmax and argmax of every faulty vector, in double. Every array has its exact size,
// so that a sanitizer sees a step past its end.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.hpp"
#include "rom/last_layer.h"

namespace {
#include "core/scalar.hpp"

constexpr int64_t kInputs = 3;

template <class S>
constexpr rom_dtype kDtype = ROM_FLOAT32;
template <>
constexpr rom_dtype kDtype<bfloat16> = ROM_BFLOAT16;
template <>
constexpr rom_dtype kDtype<float16> = ROM_FLOAT16;

template <class T>
rom_tensor matrix(std::vector<T>& data, int64_t rows, int64_t cols, rom_dtype dtype) {
  return {data.data(), {rows, cols}, {cols, 1}, 2, dtype};
}

template <class S>
S flipped(S value, int64_t bit) {
  uint32_t word = 0;
  memcpy(&word, &value, sizeof(S));
  word ^= 1u << bit;
  memcpy(&value, &word, sizeof(S));
  return value;
}

// The sums of rows, and what adds one faulty vector of logits to them.
struct Sums {
  std::vector<double> loss;
  std::vector<int64_t> counts;
  Sums(int64_t rows, int64_t bits) : loss(rows * bits), counts(rows * bits * 6) {}

  static double entropy(const std::vector<float>& t, int64_t label) {
    double most = t[0], total = 0;
    for (float x : t) most = x > most ? x : most;
    for (float x : t) total += std::exp(x - most);
    return most + std::log(total) - t[label];
  }
  static int64_t top(const std::vector<float>& t) {
    int64_t best = 0;
    for (int64_t k = 1; k < (int64_t)t.size(); ++k)
      if (t[k] > t[best] || (t[k] != t[k] && t[best] == t[best])) best = k;
    return best;
  }
  void add(int64_t at, const std::vector<float>& golden, const std::vector<float>& faulty, int64_t label) {
    const int64_t before = top(golden), after = top(faulty);
    bool finite = true;
    for (float x : faulty) finite = finite && std::isfinite(x);
    const bool masked = memcmp(golden.data(), faulty.data(), golden.size() * sizeof(float)) == 0;
    const int outcome = !finite ? 4 : masked ? 0 : before == after ? 1 : before == label ? 3 : 2;
    ++counts[6 * at + outcome];
    counts[6 * at + 5] += before != after;
    if (finite) loss[at] += std::fabs(entropy(faulty, label) - entropy(golden, label));
  }
  void check(const Sums& expected) const {
    CHECK(counts == expected.counts);
    for (size_t i = 0; i < loss.size(); ++i) CHECK_NEAR(loss[i], expected.loss[i], 2e-5, (double)i);
  }
};

template <class S>
std::vector<S> draw(std::mt19937& random, int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<S> out(n);
  for (S& x : out) x = narrow<S>(2 * normal(random));
  return out;
}
std::vector<int64_t> draw_labels(std::mt19937& random, int64_t images, int64_t classes) {
  std::vector<int64_t> out(images);
  for (int64_t& label : out) label = (int64_t)(random() % (uint64_t)classes);
  return out;
}

template <class Args>
void run(Args& a, Sums& got, int64_t rows, int64_t bits, int64_t (*workspace)(const Args*),
         rom_status (*kernel)(const Args*)) {
  a.launch.threads = 2;
  a.scale = 1;
  a.low = -INFINITY, a.high = INFINITY, a.nan_to = NAN;
  std::vector<char> scratch((size_t)workspace(&a));
  a.loss = matrix(got.loss, rows, bits, ROM_FLOAT64);
  a.counts = {got.counts.data(), {rows, bits, 6}, {bits * 6, 6, 1}, 3, ROM_INT64};
  a.workspace = {scratch.data(), {(int64_t)scratch.size()}, {1}, 1, ROM_UINT8};
  CHECK(kernel(&a) == ROM_OK);
}

template <class S>
void check_logits(int64_t images, int64_t classes, bool by_image) {
  std::mt19937 random(3);
  const int64_t bits = 8 * sizeof(S), rows = by_image ? images : classes;
  std::vector<S> logits = draw<S>(random, images * classes);
  std::vector<int64_t> labels = draw_labels(random, images, classes);
  Sums got(rows, bits), expected(rows, bits);
  for (int64_t b = 0; b < images; ++b) {
    std::vector<float> golden(classes);
    for (int64_t k = 0; k < classes; ++k) golden[k] = widen(logits[b * classes + k]);
    for (int64_t k = 0; k < classes; ++k)
      for (int64_t bit = 0; bit < bits; ++bit) {
        std::vector<float> faulty = golden;
        faulty[k] = widen(flipped(logits[b * classes + k], bit));
        expected.add((by_image ? b : k) * bits + bit, golden, faulty, labels[b]);
      }
  }
  rom_logit_flips_args a{};
  a.by_image = by_image;
  a.logits = matrix(logits, images, classes, kDtype<S>);
  a.labels = {labels.data(), {images}, {1}, 1, ROM_INT64};
  run(a, got, rows, bits, rom_logit_flips_workspace_cpu, rom_logit_flips_cpu);
  got.check(expected);
}

template <class S>
void check_weights(int64_t images, int64_t classes, bool by_input) {
  std::mt19937 random(4);
  const int64_t bits = 8 * sizeof(S), rows = by_input ? kInputs : classes;
  std::vector<S> weight = draw<S>(random, classes * kInputs);
  std::vector<float> features = draw<float>(random, kInputs * images), sums = draw<float>(random, images * classes);
  std::vector<int64_t> labels = draw_labels(random, images, classes);
  Sums got(rows, bits), expected(rows, bits);
  for (int64_t b = 0; b < images; ++b) {
    std::vector<float> golden(classes);
    for (int64_t k = 0; k < classes; ++k) golden[k] = widen(narrow<S>(sums[b * classes + k]));
    for (int64_t k = 0; k < classes; ++k)
      for (int64_t e = 0; e < kInputs; ++e)
        for (int64_t bit = 0; bit < bits; ++bit) {
          const S w = weight[k * kInputs + e];
          const float delta = widen(flipped(w, bit)) - widen(w);
          std::vector<float> faulty = golden;
          faulty[k] = widen(narrow<S>(std::fma(delta, features[e * images + b], sums[b * classes + k])));
          expected.add((by_input ? e : k) * bits + bit, golden, faulty, labels[b]);
        }
  }
  rom_weight_flips_args a{};
  a.by_input = by_input;
  a.weight = matrix(weight, classes, kInputs, kDtype<S>);
  a.features = matrix(features, kInputs, images, ROM_FLOAT32);
  a.sums = matrix(sums, images, classes, ROM_FLOAT32);
  a.labels = {labels.data(), {images}, {1}, 1, ROM_INT64};
  run(a, got, rows, bits, rom_weight_flips_workspace_cpu, rom_weight_flips_cpu);
  got.check(expected);
}

}  // namespace

TEST(logit_flips_agree_with_every_faulty_vector) {
  for (bool by_image : {false, true}) {
    check_logits<float>(1, 1, by_image);
    check_logits<float>(35, 7, by_image);
    check_logits<float>(16, 65, by_image);
    check_logits<bfloat16>(21, 5, by_image);
    check_logits<float16>(21, 5, by_image);
  }
}

TEST(weight_flips_agree_with_every_faulty_vector) {
  for (bool by_input : {false, true}) {
    check_weights<float>(19, 4, by_input);
    check_weights<bfloat16>(19, 4, by_input);
    check_weights<float16>(33, 3, by_input);
  }
}

TEST(last_layers_name_what_they_cannot_take) {
  rom_logit_flips_args logits{};
  logits.logits.dtype = ROM_FLOAT64;
  CHECK(rom_logit_flips_cpu(&logits) == ROM_UNSUPPORTED);
  rom_weight_flips_args weights{};
  weights.weight.dtype = ROM_INT32;
  CHECK(rom_weight_flips_cpu(&weights) == ROM_UNSUPPORTED);
}
