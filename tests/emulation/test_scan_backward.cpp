// SPDX-License-Identifier: Apache-2.0
//
// csrc/cuda/scan_backward.cu on the CPU, through its C ABI, against the adjoint recurrence in float64.
//   usage: test_scan_backward [quick]   (quick: three small calls, for the sanitizers that slow threads down)
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/status.hpp"
#include "rom/scan.h"

namespace {
#include "core/scalar.hpp"

std::mt19937 generator(1);
int failures = 0;

template <class S>
constexpr int kDtype = std::is_same_v<S, float>      ? ROM_FLOAT32
                       : std::is_same_v<S, bfloat16> ? ROM_BFLOAT16
                       : std::is_same_v<S, float16>  ? ROM_FLOAT16
                                                     : ROM_INT32;

// A tensor whose last-but-one dimension has rows `gap` elements further apart than they are long.
template <class S>
struct Tensor {
  std::vector<int64_t> shape;
  int64_t pitch;
  std::vector<S> values;
  Tensor(std::vector<int64_t> shape_, int64_t gap = 0) : shape(shape_), pitch(shape.back() + gap) {
    const int64_t rows = std::accumulate(shape.begin(), shape.end() - 1, int64_t(1), std::multiplies<int64_t>());
    values.resize(static_cast<size_t>(rows * pitch));
    if constexpr (!std::is_same_v<S, int32_t>)
      for (S& value : values) value = narrow<S>(std::numeric_limits<float>::quiet_NaN());  // poison
  }
  Tensor& noise(float scale = 1, float mean = 0) {
    std::normal_distribution<float> normal(mean, scale);
    for (int64_t i = 0; i < size(); ++i) *at(i) = narrow<S>(normal(generator));
    return *this;
  }
  int64_t size() const { return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<int64_t>()); }
  S* at(int64_t i) { return &values[static_cast<size_t>(i / shape.back() * pitch + i % shape.back())]; }
  double operator()(int64_t i) { return static_cast<double>(widen(*at(i))); }
  rom_tensor view() {
    rom_tensor t{};
    t.data = values.data(), t.dtype = kDtype<S>, t.ndim = static_cast<int32_t>(shape.size());
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      t.size[i] = shape[i], t.stride[i] = stride;
      stride = i + 1 == shape.size() ? pitch : stride * shape[i];
    }
    return t;
  }
};

struct Case {
  int64_t batch, length, dim, state;
  int64_t groups = 1, rows = 0;  // rows: K of row_index, 0 without
  bool constant_B = false, constant_C = false, bare = false;
  std::vector<int32_t> cu_seqlens = {};
  bool aligned = false;  // rows start where four channels can be moved at once
};

// The gradients in float64, named as in rom_scan_backward_args.
struct Expected {
  std::vector<double> u, delta, A, B, C, D, z, delta_bias, initial_state;
};

template <class S>
void compare(const char* name, Tensor<S>& got, const std::vector<double>& expected, double tolerance) {
  double worst = 0, scale = 1e-30;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double want = expected[static_cast<size_t>(i)], error = std::fabs(got(i) - want);
    scale = std::fmax(scale, std::fabs(want));
    if (!(error <= worst || std::isnan(worst))) worst = error;  // a NaN stays
  }
  const bool good = worst / scale <= tolerance;
  if (!good) ++failures;
  std::printf("  %-14s %.1e%s\n", name, worst / scale, good ? "" : "  FAILED");
}

double softplus(double x) { return std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x))); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <class S, class G>
void run(const Case& c) {
  std::printf(
      "u %d, grad_out %d, (%ld, %ld, %ld, %ld), groups %ld, rows %ld, constant B %d C %d, bare %d, %zu bounds, "
      "aligned %d\n",
      kDtype<S>, kDtype<G>, (long)c.batch, (long)c.length, (long)c.dim, (long)c.state, (long)c.groups, (long)c.rows,
      c.constant_B, c.constant_C, c.bare, c.cu_seqlens.size(), c.aligned);
  const int64_t tokens = c.batch * c.length, N = c.state,
                sequences = c.cu_seqlens.empty() ? c.batch : (int64_t)c.cu_seqlens.size() - 1;
  const std::vector<int64_t> activations = {c.batch, c.length, c.dim}, by_time = {c.batch, c.length, c.groups, N},
                             constant = {c.dim, N};
  const int64_t gap = c.aligned ? 4 : 1;
  const std::vector<int64_t> named = c.rows ? std::vector<int64_t>{tokens * c.rows, c.dim} : activations;
  Tensor<S> u(activations, 3 * gap), delta(activations, gap), z(named, 2 * gap), grad_u(activations),
      grad_delta(activations), grad_z(named);
  Tensor<G> grad_out(named, gap);
  Tensor<S> B_t(by_time), C_t(by_time), grad_B_t(by_time), grad_C_t(by_time);
  Tensor<float> B_c(constant), C_c(constant), grad_B_c(constant), grad_C_c(constant), A(constant), grad_A(constant);
  Tensor<float> D({c.dim}), bias({c.dim}), grad_D({c.dim}), grad_bias({c.dim});
  Tensor<float> grad_final({sequences, c.dim, N}), initial({sequences, c.dim, N}), grad_initial({sequences, c.dim, N});
  Tensor<int32_t> index({tokens, c.rows ? c.rows : 1}), cu({sequences + 1});
  u.noise(), delta.noise(1, c.bare ? 1 : -1), z.noise(), grad_out.noise(), B_t.noise(), C_t.noise(), B_c.noise(),
      C_c.noise();
  A.noise(), D.noise(), bias.noise(0.3f), grad_final.noise(), initial.noise();
  for (float& a : A.values) a = -0.02f - std::fabs(a);
  if (c.bare)  // without softplus steps must not be negative
    for (int64_t i = 0; i < delta.size(); ++i) *delta.at(i) = narrow<S>(static_cast<float>(std::fabs(delta(i))));
  if (c.bare) std::fill(initial.values.begin(), initial.values.end(), 0.f);
  std::iota(index.values.begin(), index.values.end(), 0);
  std::shuffle(index.values.begin(), index.values.end(), generator);
  std::copy(c.cu_seqlens.begin(), c.cu_seqlens.end(), cu.values.begin());

  // The rows of a token: (token, k) of the tables.
  const int64_t K = c.rows ? c.rows : 1;
  const auto row = [&](int64_t token, int64_t k) {
    return c.rows ? (int64_t)index.values[(size_t)(token * K + k)] : token;
  };
  const auto gathered = [&](auto& table, int64_t token, int64_t d) {
    double total = 0;
    for (int64_t k = 0; k < K; ++k) total += table(row(token, k) * c.dim + d);
    return total;
  };
  const auto place = [&](bool is_constant, int64_t token, int64_t d, int64_t n) {
    return is_constant ? d * N + n : (token * c.groups + d / (c.dim / c.groups)) * N + n;
  };
  const auto B = [&](int64_t token, int64_t d, int64_t n) {
    return c.constant_B ? B_c(d * N + n) : B_t(place(false, token, d, n));
  };
  const auto C = [&](int64_t token, int64_t d, int64_t n) {
    return c.constant_C ? C_c(d * N + n) : C_t(place(false, token, d, n));
  };

  // Checkpoints as scan.cuh lays them out: [slot][quad][channel][4].
  const int64_t quads = (N + 3) / 4, tiles = (c.length + ROM_SCAN_TILE - 1) / ROM_SCAN_TILE;
  const int64_t slots = c.cu_seqlens.empty() ? c.batch * tiles : c.length / ROM_SCAN_TILE + sequences;
  Tensor<float> checkpoints({slots, quads, c.dim, 4});

  const auto zeros = [](int64_t count) { return std::vector<double>(static_cast<size_t>(count)); };
  Expected e{zeros(u.size()),
             zeros(u.size()),
             zeros(A.size()),
             zeros(c.constant_B ? A.size() : B_t.size()),
             zeros(c.constant_C ? A.size() : C_t.size()),
             zeros(c.dim),
             zeros(z.size()),
             zeros(c.dim),
             zeros(initial.size())};
  for (int64_t s = 0; s < sequences; ++s)
    for (int64_t d = 0; d < c.dim; ++d) {
      const int64_t begin = c.cu_seqlens.empty() ? s * c.length : c.cu_seqlens[(size_t)s];
      const int64_t length = c.cu_seqlens.empty() ? c.length : c.cu_seqlens[(size_t)s + 1] - begin;
      const int64_t slot = c.cu_seqlens.empty() ? s * tiles : begin / ROM_SCAN_TILE + s;
      const auto step = [&](int64_t t) {
        const double x = delta((begin + t) * c.dim + d) + (c.bare ? 0 : bias(d));
        return c.bare ? x : softplus(x);
      };
      std::vector<double> h(static_cast<size_t>((length + 1) * N)), carry(static_cast<size_t>(N));
      const auto H = [&](int64_t t, int64_t n) -> double& { return h[static_cast<size_t>(t * N + n)]; };
      for (int64_t n = 0; n < N; ++n) H(0, n) = initial((s * c.dim + d) * N + n);
      for (int64_t t = 0; t < length; ++t) {
        if (t % ROM_SCAN_TILE == 0)
          for (int64_t n = 0; n < quads * 4; ++n)
            *checkpoints.at((((slot + t / ROM_SCAN_TILE) * quads + n / 4) * c.dim + d) * 4 + n % 4) =
                n < N ? static_cast<float>(H(t, n)) : 0;
        for (int64_t n = 0; n < N; ++n)
          H(t + 1, n) =
              std::exp(step(t) * A(d * N + n)) * H(t, n) + step(t) * B(begin + t, d, n) * u((begin + t) * c.dim + d);
      }
      for (int64_t n = 0; n < N; ++n) carry[(size_t)n] = c.bare ? 0 : grad_final((s * c.dim + d) * N + n);
      for (int64_t t = length - 1; t >= 0; --t) {
        const int64_t token = begin + t, i = token * c.dim + d;
        const double dt = step(t), dout = gathered(grad_out, token, d), z_t = c.bare ? 0 : gathered(z, token, d);
        const double silu = c.bare ? 1 : z_t * sigmoid(z_t), skip = c.bare ? 0 : D(d), dy = dout * silu;
        double y = skip * u(i), through_B = 0, through_A = 0;
        for (int64_t n = 0; n < N; ++n) {
          const double a = std::exp(dt * A(d * N + n)), g = dy * C(token, d, n) + carry[(size_t)n];
          y += H(t + 1, n) * C(token, d, n);
          e.C[(size_t)place(c.constant_C, token, d, n)] += dy * H(t + 1, n);
          e.B[(size_t)place(c.constant_B, token, d, n)] += g * dt * u(i);
          through_B += g * B(token, d, n);
          carry[(size_t)n] = a * g;
          through_A += a * g * H(t, n) * A(d * N + n);
          e.A[(size_t)(d * N + n)] += a * g * H(t, n) * dt;
        }
        const double slope = c.bare ? 1 : sigmoid(delta(i) + bias(d));
        e.u[(size_t)i] = dt * through_B + skip * dy;
        e.delta[(size_t)i] = (u(i) * through_B + through_A) * slope;
        e.D[(size_t)d] += dy * u(i);
        e.delta_bias[(size_t)d] += e.delta[(size_t)i];
        const double dz = dout * y * (sigmoid(z_t) + silu * (1 - sigmoid(z_t)));
        for (int64_t k = 0; k < K && !c.bare; ++k) e.z[(size_t)(row(token, k) * c.dim + d)] = dz;
      }
      for (int64_t n = 0; n < N; ++n) e.initial_state[(size_t)((s * c.dim + d) * N + n)] = carry[(size_t)n];
    }

  rom_scan_backward_args a{};
  a.delta_softplus = !c.bare;
  a.u = u.view(), a.delta = delta.view(), a.A = A.view(), a.checkpoints = checkpoints.view(),
  a.grad_out = grad_out.view();
  a.B = c.constant_B ? B_c.view() : B_t.view(), a.C = c.constant_C ? C_c.view() : C_t.view();
  a.grad_u = grad_u.view(), a.grad_delta = grad_delta.view(), a.grad_A = grad_A.view();
  a.grad_B = c.constant_B ? grad_B_c.view() : grad_B_t.view(),
  a.grad_C = c.constant_C ? grad_C_c.view() : grad_C_t.view();
  if (!c.cu_seqlens.empty()) a.cu_seqlens = cu.view();
  if (c.rows) a.row_index = index.view();
  if (!c.bare) {
    a.D = D.view(), a.z = z.view(), a.delta_bias = bias.view(), a.grad_final_state = grad_final.view();
    a.grad_D = grad_D.view(), a.grad_z = grad_z.view(), a.grad_delta_bias = grad_bias.view();
    a.grad_initial_state = grad_initial.view();
  }
  Tensor<float> workspace({rom_scan_backward_workspace_cuda(&a) / 4 + 1});
  a.workspace = workspace.view();
  if (const rom_status status = rom_scan_backward_cuda(&a); status != ROM_OK) {
    std::printf("  status %d: %s  FAILED\n", status, rom_last_error());
    ++failures;
  }
  const double exact = 4e-6, stored = sizeof(S) == 2 ? 4e-3 : exact;  // half an ulp of 8 bits
  compare("grad_u", grad_u, e.u, stored);
  compare("grad_delta", grad_delta, e.delta, stored);
  compare("grad_A", grad_A, e.A, exact);
  c.constant_B ? compare("grad_B", grad_B_c, e.B, exact) : compare("grad_B", grad_B_t, e.B, stored);
  c.constant_C ? compare("grad_C", grad_C_c, e.C, exact) : compare("grad_C", grad_C_t, e.C, stored);
  if (c.bare) return;
  compare("grad_D", grad_D, e.D, exact);
  compare("grad_z", grad_z, e.z, stored);
  compare("grad_bias", grad_bias, e.delta_bias, exact);
  compare("grad_initial", grad_initial, e.initial_state, exact);
}

}  // namespace

int main(int count, char** arguments) {
  // Two tiles and a part of a third, a full block of channels and a part of the next.
  run<float, float>({.batch = 1, .length = 41, .dim = 69, .state = 16});
  // More than 16 states: finish() returns before its shuffles, which are barriers here and would hide a missing one.
  run<bfloat16, float>({.batch = 1, .length = 11, .dim = 6, .state = 17, .rows = 2, .cu_seqlens = {0, 0, 9, 11}});
  run<bfloat16, bfloat16>({.batch = 1, .length = 37, .dim = 68, .state = 16, .aligned = true});
  if (count > 1 && !std::strcmp(arguments[1], "quick")) return failures != 0;
  run<float, float>({.batch = 2, .length = 66, .dim = 24, .state = 20, .groups = 2, .aligned = true});
  run<float, float>({.batch = 1, .length = 35, .dim = 20, .state = 16, .bare = true, .aligned = true});
  run<float16, float>({.batch = 1, .length = 70, .dim = 12, .state = 8, .rows = 2, .aligned = true});
  run<bfloat16, float>(
      {.batch = 1, .length = 90, .dim = 8, .state = 6, .cu_seqlens = {0, 40, 40, 90}, .aligned = true});
  for (const int64_t length : {0, 1, 7, 33, 129})
    run<float, float>({.batch = 2, .length = length, .dim = 13, .state = 16});
  for (const int64_t state : {1, 5, 40}) run<float, float>({.batch = 1, .length = 35, .dim = 70, .state = state});
  run<float, float>({.batch = 1, .length = 70, .dim = 9, .state = 16, .bare = true});
  run<float, float>({.batch = 2, .length = 9, .dim = 21, .state = 20, .groups = 3, .rows = 1});
  run<float, float>({.batch = 1, .length = 40, .dim = 11, .state = 6, .constant_B = true});
  run<bfloat16, bfloat16>({.batch = 2, .length = 34, .dim = 12, .state = 17, .groups = 2, .constant_C = true});
  run<float, float>(
      {.batch = 2, .length = 33, .dim = 5, .state = 3, .constant_B = true, .constant_C = true, .bare = true});
  run<float16, float16>({.batch = 1, .length = 100, .dim = 66, .state = 16, .cu_seqlens = {0, 0, 1, 34, 34, 99, 100}});
  run<float16, float>({.batch = 1, .length = 37, .dim = 20, .state = 16, .rows = 2});
  run<float, float>({.batch = 300, .length = 2, .dim = 3, .state = 2});  // several sequences a segment
  run<float, float>({.batch = 0, .length = 3, .dim = 3, .state = 2});
  run<float, float>({.batch = 2, .length = 3, .dim = 0, .state = 2});
  std::printf("%d failures\n", failures);
  return failures != 0;
}
