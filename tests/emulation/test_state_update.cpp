// SPDX-License-Identifier: Apache-2.0
//
// csrc/cuda/state_update.cu on the CPU, through its C ABI, against a double loop.
//   usage: test_state_update [quick]   (quick: without the shape of 2500 blocks)
#include "rom/state_update.h"
#include "tensors.hpp"

namespace {

struct Options {
  int64_t groups = 1;            // of B; C has one. 0: both are constant over time, (dim, states)
  bool indices = false;          // 4 more slots than sequences; the second sequence is padding, the last out of range
  bool optional = true;          // D, z, delta_bias and softplus
  int64_t gap = 0, gap_row = 0;  // behind each channel's states; behind each row of the activations
};

// X: activations; S: B, C, D and delta_bias.
template <class X, class S>
void run(int64_t batch, int64_t steps, int64_t dim, int64_t states, Options o = {}) {
  using T = Wide<X>;
  std::printf("x %d, B %d, (%ld, %ld, %ld), states %ld, groups %ld\n", kCode<X>, kCode<S>, (long)batch, (long)steps,
              (long)dim, (long)states, (long)o.groups);
  const bool constant = o.groups == 0;
  Tensor<X> u({batch, steps, dim}, true, o.gap_row), delta(u.size, true), z(u.size, true, o.gap_row),
      out(u.size, false);
  Tensor<T> A({dim, states}, true), state({batch + (o.indices ? 4 : 0), dim, states}, true, o.gap);
  Tensor<S> D({dim}, true), bias({dim}, true);
  const std::vector<int64_t> rows{batch, steps, o.groups, states}, row{batch, steps, 1, states};
  const std::vector<int64_t> by_channel{1, 1, dim, states};
  Tensor<S> B(constant ? by_channel : rows, true), C(constant ? by_channel : row, true);
  for (Tensor<S>* t : {&B, &C})
    if (constant) t->size = {batch, steps, dim, states}, t->stride[0] = t->stride[1] = 0;
  for (T& a : A.values) a = -std::fabs(a);
  if (!o.optional)
    for (X& d : delta.values) d = narrow<X>(T(std::fabs(widen(d)) * T(0.1)));

  std::vector<int32_t> slots;
  for (int64_t b = 0; b < batch; ++b) slots.push_back(static_cast<int32_t>(o.indices ? (b * 3 + 1) % (batch + 4) : b));
  if (o.indices) slots[1] = -1, slots.back() = static_cast<int32_t>(batch + 4);
  const Tensor<T> before = state;

  rom_state_update_args a{};
  a.delta_softplus = o.optional;
  a.state = state.view(), a.u = u.view(), a.delta = delta.view(), a.A = A.view(), a.B = B.view(), a.C = C.view();
  a.out = out.view();
  if (o.optional) a.D = D.view(), a.z = z.view(), a.delta_bias = bias.view();
  if (o.indices) a.state_indices = view(slots);
  check(rom_state_update_cuda(&a));

  Comparison outs, states_after;
  Tensor<double> expected({state.size[0], dim, states}, false);
  for (int64_t s = 0; s < state.size[0]; ++s)
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t n = 0; n < states; ++n) expected.raw({s, d, n}) = before.at({s, d, n});
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t slot = slots[static_cast<size_t>(b)];
        if (slot < 0 || slot >= state.size[0]) {
          outs.add(out.at({b, t, d}), slot < 0 ? 0 : std::numeric_limits<double>::quiet_NaN());
          continue;
        }
        double dt = delta.at({b, t, d}), y = 0;
        if (o.optional) dt = std::log1p(std::exp(dt + bias.at({d})));
        for (int64_t n = 0; n < states; ++n) {
          double& h = expected.raw({slot, d, n});
          h = std::exp(dt * A.at({d, n})) * h + dt * u.at({b, t, d}) * B.at({b, t, d / (dim / B.size[2]), n});
          y += C.at({b, t, d / (dim / C.size[2]), n}) * h;
        }
        if (o.optional) y = (y + D.at({d}) * u.at({b, t, d})) * silu(z.at({b, t, d}));
        outs.add(out.at({b, t, d}), y);
      }
  outs.report("out", kTolerance<X>);
  for (int64_t s = 0; s < state.size[0]; ++s)
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t n = 0; n < states; ++n) states_after.add(state.at({s, d, n}), expected.at({s, d, n}));
  states_after.report("state", kTolerance<T>);
}

}  // namespace

int main(int count, char** arguments) {
  run<float, float>(3, 2, 70, 16, {.groups = 2, .indices = true});  // 8 states per lane; a second block, not full
  run<bfloat16, bfloat16>(2, 1, 3, 37, {.gap_row = 1});             // single elements
  run<bfloat16, float>(2, 3, 24, 16, {.groups = 3, .gap = 4});
  run<bfloat16, bfloat16>(3, 2, 33, 8, {.indices = true});
  run<float16, float16>(2, 2, 6, 256);             // a whole warp per channel
  run<float16, float>(1, 1, 5, 100, {.gap = 1});   // strides that forbid packs
  run<float, float>(2, 2, 5, 150, {.groups = 5});  // eight single elements per lane
  run<float, float>(2, 1, 130, 1, {.optional = false});
  run<float, float>(2, 3, 6, 16, {.groups = 0});
  run<double, double>(2, 2, 9, 16, {.groups = 0, .optional = false});
  run<double, double>(1, 1, 5, 150, {.indices = false});
  run<double, double>(1, 2, 3, 255);
  if (count > 1 && !std::strcmp(arguments[1], "quick")) return failures != 0;
  run<float, float>(2500, 1, 1, 4);  // more sequences than blocks: a thread takes a second one
  std::printf("%d failures\n", failures);
  return failures != 0;
}
