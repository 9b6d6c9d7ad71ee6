// SPDX-License-Identifier: Apache-2.0
//
// The norm kernels, called as any C program would, against loops in double precision.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "rom/norm.h"

namespace {
#include "core/scalar.hpp"

template <class S>
constexpr rom_dtype kDtype = ROM_FLOAT32;
template <>
constexpr rom_dtype kDtype<bfloat16> = ROM_BFLOAT16;
template <>
constexpr rom_dtype kDtype<float16> = ROM_FLOAT16;
template <>
constexpr rom_dtype kDtype<double> = ROM_FLOAT64;

template <class S>
rom_tensor matrix(std::vector<S>& data, int64_t rows, int64_t dim) {
  return {data.data(), {rows, dim}, {dim, 1}, 2, kDtype<S>};
}
template <class S>
rom_tensor vector(std::vector<S>& data) {
  return {data.data(), {(int64_t)data.size()}, {1}, 1, kDtype<S>};
}

template <class S, class T>
std::vector<S> random_values(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<S> values(count);
  for (S& value : values) value = narrow<S>((T)normal(generator));
  return values;
}

// S: storage type, T: compute type.
template <class S, class T>
void check_norm(int64_t rows, int64_t dim, int64_t threads, double tolerance) {
  const double eps = 1e-5;
  auto x = random_values<S, T>(rows * dim, 1), residual = random_values<S, T>(rows * dim, 2);
  auto grad_out = random_values<S, T>(rows * dim, 3), grad_sum = random_values<S, T>(rows * dim, 4);
  auto weight = random_values<T, T>(dim, 5);
  std::vector<S> out(rows * dim), sum(rows * dim), grad_x(rows * dim);
  std::vector<T> rstd(rows), grad_weight(dim);

  rom_norm_forward_args forward{};
  forward.launch.threads = threads;
  forward.eps = eps;
  forward.x = matrix(x, rows, dim);
  forward.residual = matrix(residual, rows, dim);
  forward.weight = vector(weight);
  forward.out = matrix(out, rows, dim);
  forward.sum = matrix(sum, rows, dim);
  forward.rstd = vector(rstd);
  CHECK(rom_norm_forward_cpu(&forward) == ROM_OK);

  rom_norm_backward_args backward{};
  backward.launch.threads = threads;
  backward.sum = matrix(sum, rows, dim);
  backward.weight = vector(weight);
  backward.rstd = vector(rstd);
  backward.grad_out = matrix(grad_out, rows, dim);
  backward.grad_sum = matrix(grad_sum, rows, dim);
  backward.grad_x = matrix(grad_x, rows, dim);
  backward.grad_weight = vector(grad_weight);
  std::vector<char> workspace(rom_norm_backward_workspace_cpu(&backward));
  backward.workspace.data = workspace.data();
  CHECK(rom_norm_backward_cpu(&backward) == ROM_OK);

  std::vector<double> expected_grad_weight(dim, 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    auto at = [&](std::vector<S>& values, int64_t i) { return (double)widen(values[r * dim + i]); };
    double squares = 0, dots = 0;
    for (int64_t i = 0; i < dim; ++i) squares += std::pow(at(x, i) + at(residual, i), 2);
    const double scale = 1 / std::sqrt(squares / (double)dim + eps);
    CHECK_NEAR((double)rstd[r], scale, tolerance, (double)r);
    for (int64_t i = 0; i < dim; ++i) {
      const double total = at(x, i) + at(residual, i), xhat = at(sum, i) * scale;
      CHECK_NEAR(at(sum, i), total, tolerance, (double)i);
      CHECK_NEAR(at(out, i), total * scale * (double)weight[i], tolerance, (double)i);
      expected_grad_weight[i] += at(grad_out, i) * xhat;
      dots += at(grad_out, i) * (double)weight[i] * xhat;
    }
    for (int64_t i = 0; i < dim; ++i) {
      const double g = at(grad_out, i) * (double)weight[i], xhat = at(sum, i) * scale;
      CHECK_NEAR(at(grad_x, i), (g - xhat * dots / (double)dim) * scale + at(grad_sum, i), 2 * tolerance, (double)i);
    }
  }
  for (int64_t i = 0; i < dim; ++i)
    CHECK_NEAR((double)grad_weight[i], expected_grad_weight[i], 4 * tolerance, (double)i);
}

}  // namespace

TEST(norm_agrees_with_loops_in_double_precision) {
  for (int64_t threads : {1, 3})
    for (auto [rows, dim] : {std::pair<int64_t, int64_t>{1, 1}, {5, 16}, {130, 37}, {3, 768}}) {
      check_norm<float, float>(rows, dim, threads, 2e-6);
      check_norm<double, double>(rows, dim, threads, 1e-13);
      check_norm<bfloat16, float>(rows, dim, threads, 1.0 / 128);
      check_norm<float16, float>(rows, dim, threads, 1.0 / 1024);
    }
}

TEST(norm_names_a_dtype_it_cannot_take) {
  rom_norm_forward_args args{};
  args.x.dtype = ROM_INT32;
  CHECK(rom_norm_forward_cpu(&args) == ROM_UNSUPPORTED);
  CHECK(std::string(rom_last_error()).find("dtypes 4") != std::string::npos);
}
