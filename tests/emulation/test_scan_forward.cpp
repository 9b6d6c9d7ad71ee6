// SPDX-License-Identifier: Apache-2.0
//
// csrc/cuda/scan_forward.cu on the CPU against a loop in float64. It includes the kernels, so that each of their shapes
// can be launched on problems that are far too small to choose it. With -DQUICK few of them are compiled and run.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/scan_forward.cuh"
#include "cuda/scan_forward_plain.cuh"
#include "cuda/scan_forward_split.cuh"

namespace {

std::mt19937 generator(1);
int failures = 0;

double normal(double scale = 1) { return std::normal_distribution<double>(0, scale)(generator); }

// A tensor of up to four dimensions, its rows (but not the groups within) `gap` elements apart, `offset` elements past
// an aligned address. All memory is NaN before it is filled.
template <class S>
struct Tensor {
  std::vector<int64_t> size;
  int64_t width, gap, offset;
  std::vector<S> memory;
  S* data;
  explicit Tensor(std::vector<int64_t> size, int64_t gap = 0, int64_t offset = 0, size_t row_dims = 1)
      : size(size), width(1), gap(gap), offset(offset) {
    for (size_t i = size.size() - row_dims; i < size.size(); ++i) width *= size[i];
    const int64_t rows = count() / (width > 0 ? width : 1);
    const auto nan = std::numeric_limits<float>::quiet_NaN();
    memory.assign(static_cast<size_t>(rows * (width + gap) + offset) + 32, narrow<S>(static_cast<Compute<S>>(nan)));
    data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / sizeof(S) + offset;
  }
  int64_t count() const { return std::accumulate(size.begin(), size.end(), int64_t(1), std::multiplies<int64_t>()); }
  S& operator[](int64_t i) { return data[width > 0 ? i / width * (width + gap) + i % width : 0]; }
  double at(int64_t i) { return widen((*this)[i]); }
  void fill(const std::function<double()>& value) {
    for (int64_t i = 0; i < count(); ++i) (*this)[i] = narrow<S>(static_cast<Compute<S>>(value()));
  }
  rom_tensor view() {
    rom_tensor t{};
    t.data = count() > 0 ? data : nullptr;
    t.dtype = kDtype<S>;
    t.ndim = static_cast<int32_t>(size.size());
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      t.size[i] = size[static_cast<size_t>(i)];
      t.stride[i] = stride;
      stride *= t.size[i];
      if (stride == width) stride += gap;
    }
    return t;
  }
  int untouched_gaps() {
    int bad = 0;
    for (int64_t r = 0; r < (gap ? count() / width : 0); ++r)
      for (int64_t i = 0; i < gap; ++i) bad += !std::isnan(widen(data[r * (width + gap) + width + i]));
    return bad;
  }
};

struct Case {
  int64_t batch, length, dim, state;
  int64_t groups = 1, rows = 0;  // rows: K of row_index, 0 for none
  std::vector<int32_t> cu = {};
  bool bare = false, constant_B = false, constant_C = false, checkpoints = true, growing = false;
  int64_t gap = 0, offset = 0;
};

void compare(const char* name, double worst, double scale, double tolerance) {
  const bool good = worst <= tolerance * std::fmax(scale, 1e-30);
  if (!good) ++failures;
  if (!good || std::getenv("VERBOSE")) std::printf("  %-12s %.1e%s\n", name, worst / scale, good ? "" : "  FAILED");
}

// Largest deviation and largest magnitude; a NaN stays.
struct Error {
  double worst = 0, scale = 0;
  void add(double got, double want) {
    const double error = std::fabs(got - want);
    if (!(error <= worst)) worst = error;
    scale = std::fmax(scale, std::fabs(want));
  }
};

// S: storage type, O: of out. `run`: the launch under test.
template <class S, class O = S, class Run>
void check(const Case& c, Run run) {
  using T = Compute<S>;
  std::printf("%zu bytes, (%ld, %ld, %ld, %ld), %ld groups, %ld rows, %zu cu, bare %d, constant %d%d, gap %ld\n",
              sizeof(S), (long)c.batch, (long)c.length, (long)c.dim, (long)c.state, (long)c.groups, (long)c.rows,
              c.cu.size(), c.bare, c.constant_B, c.constant_C, (long)c.gap);
  const int64_t steps = c.batch * c.length, sequences = c.cu.empty() ? c.batch : (int64_t)c.cu.size() - 1;
  const int64_t k = c.rows ? c.rows : 1,
                slots = c.cu.empty() ? c.batch * ((c.length + 31) / 32) : c.length / 32 + sequences;
  const std::vector<int64_t> activation = {c.batch, c.length, c.dim};
  const std::vector<int64_t> table = c.rows ? std::vector<int64_t>{steps * k, c.dim} : activation;
  const std::vector<int64_t> by_time = {c.batch, c.length, c.groups, c.state}, constant = {c.dim, c.state};
  Tensor<S> u(activation, c.gap, c.offset), delta(activation, c.gap, c.offset), z(table, c.gap, c.offset);
  Tensor<S> B(by_time, c.gap, c.offset, 2), C(by_time, c.gap, c.offset, 2);
  Tensor<T> A(constant), constant_B(constant), constant_C(constant), D({c.dim}), bias({c.dim});
  Tensor<T> initial({sequences, c.dim, c.state}), final_state({sequences, c.dim, c.state});
  Tensor<T> checkpoints({slots, c.dim, (c.state + 3) / 4 * 4});
  Tensor<O> out(table, c.gap, c.offset);
  for (Tensor<S>* t : {&u, &z, &B, &C}) t->fill([] { return normal(); });
  delta.fill([&] { return c.bare ? std::fabs(normal(0.3)) : normal(2); });
  int64_t entry = 0;
  A.fill([&] { return (c.growing ? 0.003 : -1.0) * (double)(entry++ % c.state + 1) * std::exp(normal(0.3)); });
  bias.fill([] { return normal(2) - 3; });
  for (Tensor<T>* t : {&constant_B, &constant_C, &D, &initial}) t->fill([] { return normal(); });
  std::vector<int32_t> index(static_cast<size_t>(steps * k));
  std::iota(index.begin(), index.end(), 0);
  std::shuffle(index.begin(), index.end(), generator);

  rom_scan_forward_args a{};
  a.delta_softplus = !c.bare;
  a.u = u.view(), a.delta = delta.view(), a.A = A.view();
  a.B = c.constant_B ? constant_B.view() : B.view(), a.C = c.constant_C ? constant_C.view() : C.view();
  if (!c.bare) a.D = D.view(), a.z = z.view(), a.delta_bias = bias.view(), a.initial_state = initial.view();
  if (!c.cu.empty()) a.cu_seqlens.data = (void*)c.cu.data(), a.cu_seqlens.size[0] = sequences + 1;
  if (c.rows) a.row_index.data = index.data(), a.row_index.size[0] = steps, a.row_index.size[1] = k;
  a.out = out.view(), a.final_state = final_state.view();
  if (c.checkpoints) a.checkpoints = checkpoints.view();
  run(a);
  if (launch_status("scan_forward") != ROM_OK) {
    std::printf("  %s  FAILED\n", rom_last_error());
    ++failures;
    return;
  }

  Error e_out, e_state, e_checkpoint;
  const int64_t group_dim = c.dim / c.groups, quads = (c.state + 3) / 4;
  for (int64_t s = 0; s < sequences; ++s)
    for (int64_t d = 0; d < c.dim; ++d) {
      const int64_t begin = c.cu.empty() ? s * c.length : c.cu[(size_t)s];
      const int64_t end = c.cu.empty() ? begin + c.length : c.cu[(size_t)s + 1];
      const int64_t slot = c.cu.empty() ? s * ((c.length + 31) / 32) : begin / 32 + s;
      std::vector<double> h(static_cast<size_t>(quads * 4));
      for (int64_t n = 0; n < c.state && !c.bare; ++n) h[(size_t)n] = initial.at((s * c.dim + d) * c.state + n);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t at = t * c.dim + d;
        for (int64_t n = 0; n < quads * 4 && c.checkpoints && (t - begin) % 32 == 0; ++n)
          e_checkpoint.add(checkpoints.at((((slot + (t - begin) / 32) * quads + n / 4) * c.dim + d) * 4 + n % 4),
                           h[(size_t)n]);
        const double x = delta.at(at) + (c.bare ? 0 : bias.at(d));
        const double dt = c.bare ? x : std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x)));
        double y = c.bare ? 0 : D.at(d) * u.at(at);
        for (int64_t n = 0; n < c.state; ++n) {
          const int64_t bc = (t * c.groups + d / group_dim) * c.state + n, own = d * c.state + n;
          const double b = c.constant_B ? constant_B.at(own) : B.at(bc),
                       w = c.constant_C ? constant_C.at(own) : C.at(bc);
          h[(size_t)n] = std::exp(dt * A.at(own)) * h[(size_t)n] + dt * u.at(at) * b;
          y += h[(size_t)n] * w;
        }
        double gate = 0;
        for (int64_t i = 0; i < k; ++i) gate += z.at(c.rows ? index[(size_t)(t * k + i)] * c.dim + d : at);
        if (!c.bare) y *= gate / (1 + std::exp(-gate));
        for (int64_t i = 0; i < k; ++i) e_out.add(out.at(c.rows ? index[(size_t)(t * k + i)] * c.dim + d : at), y);
      }
      for (int64_t n = 0; n < c.state; ++n) e_state.add(final_state.at((s * c.dim + d) * c.state + n), h[(size_t)n]);
    }
  const double exact = sizeof(T) == 8 ? 1e-13 : 3e-6;
  compare("out", e_out.worst, e_out.scale, sizeof(O) > 2 ? exact : std::is_same_v<O, bfloat16> ? 4e-3 : 5e-4);
  compare("final_state", e_state.worst, e_state.scale, exact);
  compare("checkpoints", e_checkpoint.worst, e_checkpoint.scale, exact);
  compare("gaps of out", out.untouched_gaps(), 1, 0);
}

// Three chunks, whatever the shape.
template <class K>
void split(rom_scan_forward_args a) {
  std::vector<float> workspace(static_cast<size_t>(split_floats(problem_of<float>(a), 3)), NAN);
  a.workspace.data = workspace.data();
  launch_split<K>(a, 3);
}

#if defined(QUICK)
void run() {
  const auto tiled = launch_tiled<Shape<float, 4, 4, 4>>;
  emulation::async_copies_at_issue = false;
  check<bfloat16>({.batch = 1, .length = 41, .dim = 136, .state = 16}, launch_tiled<Shape<bfloat16, 1, 16, 2>>);
  emulation::async_copies_at_issue = true;
  check<float>({.batch = 1, .length = 37, .dim = 37, .state = 5, .rows = 2}, tiled);
  check<float>({.batch = 1, .length = 35, .dim = 72, .state = 16, .cu = {0, 0, 33, 35}}, tiled);
  check<float>({.batch = 1, .length = 70, .dim = 11, .state = 6}, split<Shape<float, 4, 4, 4>>);
  check<float>({.batch = 1, .length = 9, .dim = 11, .state = 6, .constant_B = true}, launch_plain<float>);
}
#else
template <class S, int kLanes, int kLaneStates, int kWarps>
void shape(Case c) {
  for (const bool at_issue : {true, false}) {
    emulation::async_copies_at_issue = at_issue;
    check<S>(c, launch_tiled<Shape<S, kLanes, kLaneStates, kWarps>>);
  }
}

// Through the C ABI, which chooses the kernel.
void public_call(rom_scan_forward_args a) {
  std::vector<float> workspace(static_cast<size_t>(rom_scan_forward_workspace_cuda(&a)) / 4, NAN);
  a.workspace.data = workspace.data();
  if (rom_scan_forward_cuda(&a) != ROM_OK) ++failures;
}

void run() {
  // Every shape: steady state, tails in time, in channels and in states; the copies early and late.
  shape<bfloat16, 1, 8, 2>({.batch = 2, .length = 37, .dim = 136, .state = 8});
  shape<bfloat16, 1, 16, 2>({.batch = 1, .length = 70, .dim = 264, .state = 16});
  shape<float16, 1, 16, 2>({.batch = 1, .length = 50, .dim = 72, .state = 16, .growing = true});
  shape<bfloat16, 2, 8, 4>({.batch = 2, .length = 37, .dim = 200, .state = 16});
  shape<float, 2, 8, 4>({.batch = 1, .length = 33, .dim = 136, .state = 12});
  shape<float, 2, 4, 4>({.batch = 1, .length = 33, .dim = 140, .state = 8});
  shape<float, 4, 4, 4>({.batch = 2, .length = 49, .dim = 72, .state = 16});
  shape<float, 2, 16, 4>({.batch = 1, .length = 33, .dim = 132, .state = 32});
  shape<float, 8, 4, 4>({.batch = 1, .length = 33, .dim = 36, .state = 28});
  shape<bfloat16, 4, 16, 4>({.batch = 1, .length = 20, .dim = 72, .state = 64});
  shape<bfloat16, 8, 16, 4>({.batch = 1, .length = 33, .dim = 40, .state = 128});
  emulation::async_copies_at_issue = true;
  // What the public call accepts.
  for (const int64_t length : {0, 1, 7, 129}) check<float>({2, length, 20, 16}, public_call);
  for (const int64_t state : {1, 5, 40, 129, 256}) check<float>({1, 35, 18, state}, public_call);
  for (const int64_t rows : {1, 2, 3}) check<bfloat16>({1, 40, 32, 16, 1, rows}, public_call);
  check<bfloat16, float>({.batch = 1, .length = 40, .dim = 32, .state = 16, .rows = 2}, public_call);
  check<float16, float>({.batch = 1, .length = 40, .dim = 37, .state = 16}, public_call);
  check<float16>({.batch = 1, .length = 40, .dim = 37, .state = 3, .gap = 3, .offset = 1}, public_call);
  check<bfloat16>({.batch = 2, .length = 40, .dim = 32, .state = 16, .gap = 8}, public_call);  // aligned
  check<bfloat16>({.batch = 2, .length = 40, .dim = 32, .state = 16, .gap = 2}, public_call);  // in pairs only
  check<float>({.batch = 2, .length = 40, .dim = 96, .state = 16, .groups = 3}, public_call);
  check<float>({.batch = 1, .length = 40, .dim = 39, .state = 5, .groups = 3, .rows = 1}, public_call);
  check<float>({.batch = 1, .length = 40, .dim = 20, .state = 16, .bare = true, .checkpoints = false}, public_call);
  check<float>({.batch = 1, .length = 40, .dim = 20, .state = 16, .growing = true}, public_call);
  for (const bool constant_C : {false, true})
    check<float>({.batch = 1, .length = 40, .dim = 20, .state = 5, .constant_B = true, .constant_C = constant_C},
                 public_call);
  check<bfloat16>({.batch = 1, .length = 70, .dim = 20, .state = 16, .cu = {0, 0, 5, 38, 38, 70}}, public_call);
  check<float>({1, 67, 39, 5, 3, 2, {0, 64, 67}}, public_call);
  check<float>({.batch = 2, .length = 530, .dim = 20, .state = 16}, public_call);  // in four chunks
  check<bfloat16>({.batch = 2, .length = 100, .dim = 72, .state = 16, .groups = 3}, split<Shape<bfloat16, 4, 4, 4>>);
  check<float>({.batch = 1, .length = 100, .dim = 20, .state = 30, .rows = 2}, split<Shape<float, 8, 4, 4>>);
  check<float>({.batch = 1, .length = 70, .dim = 9, .state = 5, .bare = true}, split<Shape<float, 4, 4, 4>>);
  check<double>({.batch = 2, .length = 40, .dim = 21, .state = 16, .groups = 3}, public_call);
  check<double>({1, 67, 39, 5, 3, 2, {0, 0, 64, 67, 67}}, public_call);
  for (const Case& empty : {Case{0, 5, 4, 3}, Case{2, 5, 0, 3}}) check<float>(empty, public_call);
}
#endif

}  // namespace

int main() {
  run();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
