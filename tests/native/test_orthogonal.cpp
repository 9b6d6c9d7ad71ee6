// SPDX-License-Identifier: Apache-2.0
//
// The orthogonal kernels, called as any C program would: against the definitions of the maps in double precision, and
// their gradients against differences. Every tensor has its exact size, so that a sanitizer sees a step past its end.
#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "rom/orthogonal.h"

namespace {

struct Shape {
  int64_t batch, n, k;
  int64_t size() const { return batch * n * k; }
};

template <class T>
using Values = std::vector<T>;

template <class T>
rom_tensor tensor(Values<T>& data, int64_t batch, int64_t n, int64_t k) {
  return {data.data(), {batch, n, k}, {n * k, k, 1}, 3, sizeof(T) == 8 ? ROM_FLOAT64 : ROM_FLOAT32};
}
template <class T>
rom_tensor signs_tensor(Values<T>& data, const Shape& shape) {
  return {data.data(), {shape.batch, shape.k}, {shape.k, 1}, 2, sizeof(T) == 8 ? ROM_FLOAT64 : ROM_FLOAT32};
}

template <class T>
Values<T> random_values(int64_t count, double scale, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  Values<T> values(count);
  for (T& value : values) value = (T)(float)(scale * normal(generator));
  return values;
}

// Fills in the workspace the kernel asks for and runs it.
template <class Args>
void run(Args& args, int64_t threads, int64_t (*size)(const Args*), rom_status (*kernel)(const Args*)) {
  args.launch.threads = threads;
  std::vector<char> workspace(size(&args));
  args.workspace.data = workspace.data();
  CHECK(kernel(&args) == ROM_OK);
}

// Each map as a pair of functions of plain arrays. `saved` is what its forward hands to its backward besides q.
template <class T>
struct Cayley {
  static void forward(const Shape& s, int64_t threads, Values<T>& x, Values<T>& signs, Values<T>& q, Values<T>&) {
    rom_cayley_forward_args a{};
    a.x = tensor(x, s.batch, s.n, s.k), a.q = tensor(q, s.batch, s.n, s.k), a.signs = signs_tensor(signs, s);
    run(a, threads, rom_cayley_forward_workspace_cpu, rom_cayley_forward_cpu);
  }
  static void backward(const Shape& s, int64_t threads, Values<T>& g, Values<T>& x, Values<T>& signs, Values<T>& q,
                       Values<T>&, Values<T>& grad_x) {
    rom_cayley_backward_args a{};
    a.grad = tensor(g, s.batch, s.n, s.k), a.x = tensor(x, s.batch, s.n, s.k), a.signs = signs_tensor(signs, s);
    a.q = tensor(q, s.batch, s.n, s.k), a.grad_x = tensor(grad_x, s.batch, s.n, s.k);
    run(a, threads, rom_cayley_backward_workspace_cpu, rom_cayley_backward_cpu);
  }
  // |(I - S) Q - (I + S) [I; 0]| with S = (L - L^T) / 2, L the part of [x 0] below the diagonal.
  static double deviation(int64_t n, int64_t k, const T* x, const std::vector<double>& q) {
    const auto s = [&](int64_t i, int64_t j) {
      return i > j ? (j < k ? x[i * k + j] / 2.0 : 0.0) : i < j && i < k ? -x[j * k + i] / 2.0 : 0.0;
    };
    double worst = 0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) {
        double value = q[i * k + j] - s(i, j) - (i == j);
        for (int64_t l = 0; l < n; ++l) value -= s(i, l) * q[l * k + j];
        worst = std::fmax(worst, std::fabs(value));
      }
    return worst;
  }
};

template <class T>
struct Householder {
  static void forward(const Shape& s, int64_t threads, Values<T>& x, Values<T>& signs, Values<T>& q, Values<T>& saved) {
    rom_householder_forward_args a{};
    a.x = tensor(x, s.batch, s.n, s.k), a.q = tensor(q, s.batch, s.n, s.k), a.signs = signs_tensor(signs, s);
    a.inverse = tensor(saved, s.batch, s.k, s.k);
    run(a, threads, rom_householder_forward_workspace_cpu, rom_householder_forward_cpu);
  }
  static void backward(const Shape& s, int64_t threads, Values<T>& g, Values<T>& x, Values<T>& signs, Values<T>&,
                       Values<T>& saved, Values<T>& grad_x) {
    rom_householder_backward_args a{};
    a.grad = tensor(g, s.batch, s.n, s.k), a.x = tensor(x, s.batch, s.n, s.k), a.signs = signs_tensor(signs, s);
    a.inverse = tensor(saved, s.batch, s.k, s.k), a.grad_x = tensor(grad_x, s.batch, s.n, s.k);
    run(a, threads, rom_householder_backward_workspace_cpu, rom_householder_backward_cpu);
  }
  // |Q - H_1 ... H_k [I; 0]|, one reflection after the other.
  static double deviation(int64_t n, int64_t k, const T* x, const std::vector<double>& q) {
    std::vector<double> product(n * k, 0.0), v(n);
    for (int64_t j = 0; j < k; ++j) product[j * k + j] = 1;
    for (int64_t r = k - 1; r >= 0; --r) {
      double squares = 0;
      for (int64_t i = 0; i < n; ++i) {
        v[i] = i < r ? 0.0 : i == r ? 1.0 : (double)x[i * k + r];
        squares += v[i] * v[i];
      }
      for (int64_t j = 0; j < k; ++j) {
        double dot = 0;
        for (int64_t i = r; i < n; ++i) dot += v[i] * product[i * k + j];
        for (int64_t i = r; i < n; ++i) product[i * k + j] -= 2 * dot / squares * v[i];
      }
    }
    double worst = 0;
    for (int64_t e = 0; e < n * k; ++e) worst = std::fmax(worst, std::fabs(product[e] - q[e]));
    return worst;
  }
};

double dot(const Values<double>& a, const Values<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// Q without its signs meets the definition. S has a norm of about `scale`.
template <template <class> class Map, class T>
void check_values(const Shape& s, int64_t threads, double scale, double tolerance) {
  Values<T> x = random_values<T>(s.size(), scale / std::sqrt((double)s.n), 1);
  Values<T> signs = random_values<T>(s.batch * s.k, 1, 2), q(s.size()), saved(s.batch * s.k * s.k);
  for (T& sign : signs) sign = sign < 0 ? (T)-1 : (T)1;
  Map<T>::forward(s, threads, x, signs, q, saved);
  for (int64_t b = 0; b < s.batch; b += s.batch > 1 ? s.batch - 1 : 1) {
    std::vector<double> plain(s.n * s.k);
    for (int64_t e = 0; e < s.n * s.k; ++e) plain[e] = (double)q[b * s.n * s.k + e] * (double)signs[b * s.k + e % s.k];
    const double found = Map<T>::deviation(s.n, s.k, x.data() + b * s.n * s.k, plain);
    CHECK_NEAR(found, 0.0, tolerance, (double)s.n);
  }
}

// <G, Q(x + h d) - Q(x - h d)> / 2 h against <grad, d>, and the float kernel against the double one.
template <template <class> class Map>
void check_gradients(const Shape& s, int64_t threads, double scale, double tolerance, double tolerance_of_float) {
  Values<double> x = random_values<double>(s.size(), scale / std::sqrt((double)s.n), 3);
  Values<double> g = random_values<double>(s.size(), 1, 4), d = random_values<double>(s.size(), 1, 5);
  Values<double> signs(s.batch * s.k, -1.0), q(s.size()), saved(s.batch * s.k * s.k), grad(s.size());
  const double h = 1e-6 * scale;
  double difference = 0;
  for (double side : {1.0, -1.0}) {
    Values<double> moved = x;
    for (int64_t e = 0; e < s.size(); ++e) moved[e] += side * h * d[e];
    Map<double>::forward(s, threads, moved, signs, q, saved);
    difference += side * dot(g, q) / (2 * h);
  }
  Map<double>::forward(s, threads, x, signs, q, saved);
  Map<double>::backward(s, threads, g, x, signs, q, saved, grad);
  const double size = std::sqrt(dot(grad, grad));
  CHECK_NEAR(dot(grad, d), difference, tolerance * (1 + size), (double)s.n);

  Values<float> x32(x.begin(), x.end()), g32(g.begin(), g.end()), signs32(signs.begin(), signs.end());
  Values<float> q32(s.size()), saved32(s.batch * s.k * s.k), grad32(s.size());
  Map<float>::forward(s, threads, x32, signs32, q32, saved32);
  Map<float>::backward(s, threads, g32, x32, signs32, q32, saved32, grad32);
  double apart = 0;
  for (int64_t e = 0; e < s.size(); ++e) apart += std::pow((double)grad32[e] - grad[e], 2);
  CHECK_NEAR(std::sqrt(apart), 0.0, tolerance_of_float * size, (double)s.n);
}

// Lanes, registers, rows, blocks of 64; with odd sizes and incomplete groups.
const std::vector<Shape> kShapes = {{1, 1, 1},   {21, 5, 5},  {9, 12, 4},  {67, 16, 16},
                                    {5, 11, 11}, {3, 17, 17}, {2, 40, 30}, {1, 150, 140}};

}  // namespace

TEST(cayley_meets_its_definition) {
  for (const Shape& shape : kShapes)
    for (int64_t threads : {1, 3}) {
      check_values<Cayley, float>(shape, threads, 1, 2e-5);
      check_values<Cayley, double>(shape, threads, 1, 1e-13);
    }
  for (const Shape& shape : {Shape{21, 6, 6}, Shape{20, 16, 16}, Shape{2, 40, 40}, Shape{1, 140, 140}}) {
    check_values<Cayley, float>(shape, 2, 30, 1e-3);  // pivoted
    check_values<Cayley, double>(shape, 2, 30, 1e-11);
  }
}

TEST(householder_meets_its_definition) {
  for (const Shape& shape : kShapes)
    for (int64_t threads : {1, 3}) {
      check_values<Householder, float>(shape, threads, 1, 2e-5);
      check_values<Householder, double>(shape, threads, 1, 1e-13);
    }
}

TEST(orthogonal_gradients_are_those_of_differences) {
  for (const Shape& shape : kShapes) {
    check_gradients<Cayley>(shape, 2, 1, 1e-7, 1e-5);
    check_gradients<Householder>(shape, 2, 1, 1e-7, 1e-5);
  }
  for (const Shape& shape : {Shape{21, 6, 6}, Shape{20, 16, 16}, Shape{2, 40, 40}})
    check_gradients<Cayley>(shape, 2, 100, 1e-6, 1e-3);  // the inverse is computed again
}

TEST(orthogonal_names_a_dtype_it_cannot_take) {
  rom_cayley_forward_args args{};
  args.x.dtype = ROM_INT32;
  CHECK(rom_cayley_forward_cpu(&args) == ROM_UNSUPPORTED);
  CHECK(std::string(rom_last_error()).find("dtype 4") != std::string::npos);
}
