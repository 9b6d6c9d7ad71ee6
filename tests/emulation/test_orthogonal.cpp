// SPDX-License-Identifier: Apache-2.0
//
// csrc/cuda/orthogonal_*.cu on the CPU, against the maps' definitions in double: Cayley by a pivoted solve,
// Householder reflection by reflection. Gradients against central differences along random directions.
//   usage: test_orthogonal [quick]   (QUICK compiles only the two instances that `quick` runs)
#include <algorithm>

#ifdef QUICK
#include "cuda/orthogonal_cayley.cuh"
#include "cuda/orthogonal_householder.cuh"
#else
#include "rom/orthogonal.h"
#endif
#include "tensors.hpp"

namespace {

// start(args) launches a kernel, bytes(args) is its workspace.
#ifdef QUICK
#define KERNEL(map, direction, Kernel)                                                  \
  rom_status start(const rom_##map##_##direction##_args* a) {                           \
    a->x.size[2] <= 32 ? launch<Kernel, float, 32>(*a) : launch<Kernel, float, 64>(*a); \
    return launch_status("");                                                           \
  }                                                                                     \
  int64_t bytes(const rom_##map##_##direction##_args* a) { return workspace<Kernel>(a->x); }
#else
#define KERNEL(map, direction, Kernel)                                                                    \
  rom_status start(const rom_##map##_##direction##_args* a) { return rom_##map##_##direction##_cuda(a); } \
  int64_t bytes(const rom_##map##_##direction##_args* a) { return rom_##map##_##direction##_workspace_cuda(a); }
#endif
KERNEL(cayley, forward, CayleyForward)
KERNEL(cayley, backward, CayleyBackward)
KERNEL(householder, forward, HouseholderForward)
KERNEL(householder, backward, HouseholderBackward)

using Matrix = std::vector<double>;  // row by row

// X = A^-1 B by elimination with pivoting; A is n x n, B n x m.
Matrix solve(Matrix a, Matrix b, int n, int m) {
  for (int p = 0; p < n; ++p) {
    int best = p;
    for (int i = p + 1; i < n; ++i)
      if (std::fabs(a[i * n + p]) > std::fabs(a[best * n + p])) best = i;
    std::swap_ranges(&a[p * n], &a[p * n] + n, &a[best * n]);
    std::swap_ranges(&b[p * m], &b[p * m] + m, &b[best * m]);
    for (int i = 0; i < n; ++i) {
      if (i == p) continue;
      const double factor = a[i * n + p] / a[p * n + p];
      for (int c = p; c < n; ++c) a[i * n + c] -= factor * a[p * n + c];
      for (int c = 0; c < m; ++c) b[i * m + c] -= factor * b[p * m + c];
    }
  }
  for (int i = 0; i < n; ++i)
    for (int c = 0; c < m; ++c) b[i * m + c] /= a[i * n + i];
  return b;
}

// The first k columns of (I + A/2) (I - A/2)^-1 with A = L - L^T, L = tril([x 0]).
Matrix cayley(const Matrix& x, int n, int k) {
  Matrix left(n * n), right(n * k);
  auto lower = [&](int r, int c) { return r > c && c < k ? x[r * k + c] / 2 : 0; };
  for (int r = 0; r < n; ++r)
    for (int c = 0; c < n; ++c) {
      const double half = lower(r, c) - lower(c, r);
      left[r * n + c] = (r == c) - half;
      if (c < k) right[r * k + c] = (r == c) + half;
    }
  return solve(left, right, n, k);  // the two commute
}

Matrix householder(const Matrix& x, int n, int k) {
  Matrix q(n * k);
  for (int c = 0; c < k; ++c) q[c * k + c] = 1;
  for (int j = k - 1; j >= 0; --j) {
    auto v = [&](int r) { return r > j ? x[r * k + j] : r == j ? 1.0 : 0.0; };
    double square = 0;
    for (int r = j; r < n; ++r) square += v(r) * v(r);
    for (int c = 0; c < k; ++c) {
      double dot = 0;
      for (int r = j; r < n; ++r) dot += v(r) * q[r * k + c];
      for (int r = j; r < n; ++r) q[r * k + c] -= 2 / square * dot * v(r);
    }
  }
  return q;
}

template <class S>
Matrix matrix_of(const Tensor<S>& t, int64_t b) {
  Matrix m;
  for (int64_t r = 0; r < t.size[1]; ++r)
    for (int64_t c = 0; c < t.size[2]; ++c) m.push_back(t.at({b, r, c}));
  return m;
}

double orthogonality_error(const Matrix& q, int n, int k) {
  double worst = 0;
  for (int i = 0; i < k; ++i)
    for (int j = 0; j < k; ++j) {
      double dot = i == j ? -1 : 0;
      for (int r = 0; r < n; ++r) dot += q[r * k + i] * q[r * k + j];
      if (!(std::fabs(dot) <= worst)) worst = std::fabs(dot);
    }
  return worst;
}

template <class S>
void test(bool is_cayley, int64_t batch, int n, int k, double scale = 1, bool signed_columns = true) {
  using T = Wide<S>;
  std::printf("%s, dtype %d, (%ld, %d, %d), scale %g\n", is_cayley ? "cayley" : "householder", kCode<S>, (long)batch, n,
              k, scale);
  Tensor<S> x({batch, n, k}, true), q(x.size, false), grad(x.size, true), grad_x(x.size, false);
  Tensor<T> signs({batch, k}, true), inverse({batch, k, k}, false);
  for (S& value : x.values) value = narrow<S>(Wide<S>(scale * widen(value) / std::sqrt((double)n)));
  std::vector<double> memory;
  auto scratch = [&](int64_t bytes) {
    memory.assign(static_cast<size_t>(bytes / 8 + 1), std::numeric_limits<double>::quiet_NaN());
    rom_tensor t{};
    t.data = memory.data();
    return t;
  };
  auto call = [&](auto forward, auto backward) {
    forward.x = backward.x = x.view(), forward.inverse = backward.inverse = inverse.view();
    forward.q = q.view(), backward.grad = grad.view(), backward.grad_x = grad_x.view();
    if (signed_columns) forward.signs = backward.signs = signs.view();
    forward.workspace = scratch(bytes(&forward));
    check(start(&forward));
    backward.workspace = scratch(bytes(&backward));
    check(start(&backward));
  };
  is_cayley ? call(rom_cayley_forward_args{}, rom_cayley_backward_args{})
            : call(rom_householder_forward_args{}, rom_householder_backward_args{});

  Comparison values, gradients, zeros;
  double orthogonality = 0;
  std::normal_distribution<double> normal;
  for (int64_t b = 0; b < batch; ++b) {
    const Matrix at = matrix_of(x, b);
    auto map = [&](const Matrix& m) {
      Matrix result = is_cayley ? cayley(m, n, k) : householder(m, n, k);
      for (int i = 0; i < n * k; ++i)
        if (signed_columns && signs.at({b, i % k}) < 0) result[i] = -result[i];
      return result;
    };
    const Matrix expected = map(at), got = matrix_of(q, b), g = matrix_of(grad, b), gx = matrix_of(grad_x, b);
    for (int i = 0; i < n * k; ++i) values.add(got[i], expected[i]);
    orthogonality = std::fmax(orthogonality, orthogonality_error(got, n, k));
    for (int direction = 0; direction < 3; ++direction) {
      Matrix above = at, below = at, step(n * k);
      double along = 0, difference = 0, size = 0;
      for (int i = 0; i < n * k; ++i) {
        step[i] = normal(generator);
        above[i] += 1e-5 * step[i], below[i] -= 1e-5 * step[i];
        along += gx[i] * step[i];
        size += gx[i] * gx[i];
      }
      const Matrix q_above = map(above), q_below = map(below);
      for (int i = 0; i < n * k; ++i) difference += g[i] * (q_above[i] - q_below[i]) / 2e-5;
      gradients.scale = std::fmax(gradients.scale, std::sqrt(size));
      gradients.add(along, difference);
    }
    for (int r = 0; r < k; ++r)
      for (int c = r; c < k; ++c) zeros.add(gx[r * k + c], 0);
  }
  values.report("q", kTolerance<S>);
  // The differences are good to 1e-8 or so, and a large A loses its share of digits.
  gradients.report("grad_x", (sizeof(S) == 8 ? 1e-7 : kTolerance<S>)*(scale > 1 ? 4 : 1));
  zeros.report("zeros", 0);
  std::printf("  max |Q^T Q - I| %.1e\n", orthogonality);
}

template <class S>
void both(int64_t batch, int n, int k, double scale = 1, bool signed_columns = true) {
  test<S>(true, batch, n, k, scale, signed_columns);
  test<S>(false, batch, n, k, scale, signed_columns);
}

}  // namespace

int main(int count, char**) {
  both<float>(5, 20, 20);            // a warp each, and a block that is not full
  both<float>(1, 200, 17);           // parts of rows
  both<float>(2, 70, 40);            // a block of 64 threads; rows in two stages
  test<float>(true, 1, 40, 37, 60);  // pivoting
  if (count > 1) return failures != 0;
  both<float>(3, 7, 7);
  both<float>(1, 1, 1);
  both<float>(9, 16, 16, 1, false);
  test<float>(true, 6, 12, 9, 30);
  both<bfloat16>(3, 33, 13);
  both<float16>(2, 40, 40);
  both<double>(2, 9, 5);
  both<double>(1, 300, 40);
  test<double>(true, 2, 33, 33, 1e3);
  both<float>(1, 128, 128);
  both<float>(2, 150, 90);
  both<float>(1, 600, 70);
  test<float>(true, 1, 100, 100, 30);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
