// SPDX-License-Identifier: Apache-2.0
//
// What the emulation tests of the decode steps share: tensors of up to four dimensions with gaps between rows, filled
// with noise or with NaN, and their comparison with an expected value per element.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/status.hpp"
#include "rom/abi.h"

namespace {
#include "core/scalar.hpp"

std::mt19937 generator(1);
int failures = 0;

template <class S>
constexpr int kCode = std::is_same_v<S, float>      ? ROM_FLOAT32
                      : std::is_same_v<S, bfloat16> ? ROM_BFLOAT16
                      : std::is_same_v<S, float16>  ? ROM_FLOAT16
                      : std::is_same_v<S, int32_t>  ? ROM_INT32
                                                    : ROM_FLOAT64;
template <class S>
using Wide = decltype(widen(S{}));

template <class S>
struct Tensor {
  std::vector<int64_t> size, stride;
  std::vector<S> values;
  // Rows of the last dimension are `gap` elements apart. Its strides may be changed before it is viewed.
  Tensor(std::vector<int64_t> sizes, bool noise, int64_t gap = 0) : size(sizes), stride(sizes.size(), 1) {
    int64_t all = size.back() + gap;
    for (size_t i = size.size() - 1; i-- > 0; all *= size[i]) stride[i] = all;
    std::normal_distribution<float> normal;
    const float poison = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 0; i < all; ++i) values.push_back(narrow<S>(Wide<S>(noise ? normal(generator) : poison)));
  }
  int64_t offset(std::initializer_list<int64_t> at) const {
    int64_t sum = 0, i = 0;
    for (int64_t x : at) sum += x * stride[static_cast<size_t>(i++)];
    return sum;
  }
  S& raw(std::initializer_list<int64_t> at) { return values[static_cast<size_t>(offset(at))]; }
  double at(std::initializer_list<int64_t> at) const { return widen(values[static_cast<size_t>(offset(at))]); }
  rom_tensor view() {
    rom_tensor t{};
    t.data = values.data(), t.dtype = kCode<S>, t.ndim = static_cast<int32_t>(size.size());
    for (size_t i = 0; i < size.size(); ++i) t.size[i] = size[i], t.stride[i] = stride[i];
    return t;
  }
};

inline rom_tensor view(std::vector<int32_t>& indices) {
  rom_tensor t{};
  t.data = indices.data(), t.dtype = ROM_INT32, t.ndim = 1, t.size[0] = static_cast<int64_t>(indices.size());
  t.stride[0] = 1;
  return t;
}

// Collects the worst deviation; a NaN is one unless it is expected.
struct Comparison {
  double worst = 0, scale = 1e-30;
  void add(double got, double want) {
    if (std::isnan(want) && std::isnan(got)) return;
    const double error = std::fabs(got - want);
    scale = std::fmax(scale, std::fabs(want));
    if (!(error <= worst)) worst = error;
  }
  void report(const char* name, double tolerance) const {
    const bool good = worst / scale <= tolerance;
    if (!good) ++failures;
    std::printf("  %-8s %.1e%s\n", name, worst / scale, good ? "" : "  FAILED");
  }
};

inline void check(rom_status status) {
  if (status == ROM_OK) return;
  std::printf("  status %d: %s  FAILED\n", status, rom_last_error());
  ++failures;
}

// Where a result of storage S may be from one computed in double.
template <class S>
constexpr double kTolerance = sizeof(S) == 2   ? 8e-3
                              : sizeof(S) == 4 ? 4e-6
                                               : 1e-13;

inline double silu(double x) { return x / (1 + std::exp(-x)); }
}  // namespace
