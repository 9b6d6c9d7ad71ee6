// SPDX-License-Identifier: Apache-2.0
//
// csrc/cuda/norm.cu on the CPU, through its C ABI, against a double loop.
//   usage: test_norm [quick]   (quick: one shape, for the sanitizers that slow threads down)
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/status.hpp"
#include "rom/norm.h"

namespace {
#include "core/scalar.hpp"

std::mt19937 generator(1);
int failures = 0;

template <class S>
constexpr int kDtype = std::is_same_v<S, float>      ? ROM_FLOAT32
                       : std::is_same_v<S, bfloat16> ? ROM_BFLOAT16
                       : std::is_same_v<S, float16>  ? ROM_FLOAT16
                                                     : ROM_FLOAT64;

// A tensor of (rows, dim), or (dim) when rows is 0, filled with noise or poison. Rows are `gap` elements apart.
template <class S>
struct Tensor {
  int64_t rows, dim, stride;
  std::vector<S> values;
  Tensor(int64_t rows, int64_t dim, bool noise, int64_t gap = 0)
      : rows(rows), dim(dim), stride(dim + gap), values(static_cast<size_t>((rows ? rows : 1) * stride)) {
    std::normal_distribution<float> normal;
    using T = decltype(widen(S{}));
    const float poison = std::numeric_limits<float>::quiet_NaN();
    for (S& value : values) value = narrow<S>(static_cast<T>(noise ? normal(generator) : poison));
  }
  double at(int64_t r, int64_t i) const { return widen(values[static_cast<size_t>(r * stride + i)]); }
  rom_tensor view() {
    rom_tensor t{};
    t.data = values.data();
    t.dtype = kDtype<S>;
    t.ndim = rows ? 2 : 1;
    t.size[0] = rows ? rows : dim;
    t.size[1] = rows ? dim : 0;
    t.stride[0] = rows ? stride : 1;
    t.stride[1] = 1;
    return t;
  }
};

template <class S, class Expected>
void compare(const char* name, const Tensor<S>& got, double tolerance, Expected expected) {
  double worst = 0, scale = 1e-30;
  for (int64_t r = 0; r < (got.rows ? got.rows : 1); ++r)
    for (int64_t i = 0; i < got.dim; ++i) {
      const double want = expected(r, i), error = std::fabs(got.at(r, i) - want);
      scale = std::fmax(scale, std::fabs(want));
      if (!(error <= worst || std::isnan(worst))) worst = error;  // a NaN stays
    }
  const bool good = worst / scale <= tolerance;
  if (!good) ++failures;
  std::printf("  %-14s %.1e%s\n", name, worst / scale, good ? "" : "  FAILED");
}

void check(rom_status status) {
  if (status == ROM_OK) return;
  std::printf("  status %d: %s  FAILED\n", status, rom_last_error());
  ++failures;
}

template <class X, class R>
void run(int64_t rows, int64_t dim, bool residual, int64_t gap) {
  using T = decltype(widen(X{}));
  std::printf("x %d, stream %d, (%ld, %ld), residual %d, gap %ld\n", kDtype<X>, kDtype<R>, (long)rows, (long)dim,
              residual, (long)gap);
  const double tolerance = sizeof(X) == 2 ? 8e-3 : sizeof(X) == 4 ? 2e-6 : 1e-14, eps = 1e-5;
  Tensor<X> x(rows, dim, true, gap), out(rows, dim, false, gap), grad_out(rows, dim, true, gap),
      grad_x(rows, dim, false, gap);
  Tensor<R> stream(rows, dim, true, gap), sum(rows, dim, false, gap), grad_sum(rows, dim, true, gap),
      grad_stream(rows, dim, false, gap);
  Tensor<T> weight(0, dim, true), rstd(0, rows, false), grad_weight(0, dim, false);

  rom_norm_forward_args f{};
  f.eps = eps;
  f.x = x.view(), f.weight = weight.view(), f.out = out.view(), f.rstd = rstd.view();
  if (residual) f.residual = stream.view(), f.sum = sum.view();
  check(rom_norm_forward_cuda(&f));
  auto total = [&](int64_t r, int64_t i) { return x.at(r, i) + (residual ? stream.at(r, i) : 0); };
  auto inverse = [&](int64_t r) {
    double squares = 0;
    for (int64_t i = 0; i < dim; ++i) squares += total(r, i) * total(r, i);
    return 1 / std::sqrt(squares / (double)dim + eps);
  };
  compare("out", out, tolerance, [&](int64_t r, int64_t i) { return total(r, i) * inverse(r) * weight.at(0, i); });
  compare("rstd", rstd, tolerance, [&](int64_t, int64_t r) { return inverse(r); });
  if (residual) compare("sum", sum, tolerance, total);

  rom_norm_backward_args b{};
  b.sum = residual ? sum.view() : x.view();
  b.weight = weight.view(), b.rstd = rstd.view(), b.grad_out = grad_out.view();
  b.grad_x = grad_x.view(), b.grad_weight = grad_weight.view();
  if (residual) b.grad_sum = grad_sum.view(), b.grad_residual = grad_stream.view();
  Tensor<double> workspace(0, (rom_norm_backward_workspace_cuda(&b) + 7) / 8, false);
  b.workspace = workspace.view();
  check(rom_norm_backward_cuda(&b));
  auto xhat = [&](int64_t r, int64_t i) { return (residual ? sum.at(r, i) : x.at(r, i)) * rstd.at(0, r); };
  std::vector<double> mean(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < dim; ++i)
      mean[static_cast<size_t>(r)] += grad_out.at(r, i) * weight.at(0, i) * xhat(r, i) / (double)dim;
  auto gradient = [&](int64_t r, int64_t i) {
    const double g = grad_out.at(r, i) * weight.at(0, i) - xhat(r, i) * mean[static_cast<size_t>(r)];
    return g * rstd.at(0, r) + (residual ? grad_sum.at(r, i) : 0);
  };
  compare("grad_x", grad_x, tolerance, gradient);
  if (residual) compare("grad_residual", grad_stream, tolerance, gradient);
  compare("grad_weight", grad_weight, sizeof(T) == 8 ? 1e-14 : 2e-6, [&](int64_t, int64_t i) {
    double sum_of_rows = 0;
    for (int64_t r = 0; r < rows; ++r) sum_of_rows += grad_out.at(r, i) * xhat(r, i);
    return sum_of_rows;
  });
}

}  // namespace

int main(int count, char** arguments) {
  run<float, float>(19, 200, true, 0);  // two blocks of rows, 16-byte loads, two warps
  if (count > 1 && !std::strcmp(arguments[1], "quick")) return failures != 0;
  run<float, float>(3, 37, false, 3);         // single elements, less than a full second warp
  run<bfloat16, bfloat16>(17, 264, true, 0);  // 8 elements per load
  run<bfloat16, float>(5, 40, true, 8);
  run<float16, float>(2, 13, true, 0);
  run<float16, float16>(4, 1100, false, 0);  // several steps per thread
  run<double, double>(18, 34, true, 0);
  run<float, float>(2, 12300, true, 0);  // a line of grad_weight that does not fit shared memory
  std::printf("%d failures\n", failures);
  return failures != 0;
}
