// SPDX-License-Identifier: Apache-2.0
//
// csrc/cuda/conv_update.cu on the CPU, through its C ABI, against a double loop.
//   usage: test_conv_update [quick]   (quick: a few shapes, for the sanitizers that slow threads down)
#include "rom/conv.h"
#include "tensors.hpp"

namespace {

struct Options {
  bool indices = false;         // 4 more slots than sequences; the second sequence is padding, the last out of range
  bool channels_inner = false;  // the state's channels are neighbours, as causal_conv1d keeps them
  bool silu = true, bias = true;
  int64_t gap = 0;  // behind each channel's window, and each row of x
};

// X: x and out; S: the state; P: weight and bias.
template <class X, class S, class P>
void run(int64_t batch, int64_t steps, int64_t dim, int64_t width, Options o = {}) {
  std::printf("x %d, state %d, weight %d, (%ld, %ld, %ld), width %ld\n", kCode<X>, kCode<S>, kCode<P>, (long)batch,
              (long)steps, (long)dim, (long)width);
  Tensor<X> x({batch, steps, dim}, true, o.gap), out(x.size, false);
  Tensor<S> state({batch + (o.indices ? 4 : 0), dim, width}, true, o.gap);
  Tensor<P> weight({dim, width}, true), bias({dim}, true);
  if (o.channels_inner) state.stride = {dim * width, 1, dim};
  std::vector<int32_t> slots;
  for (int64_t b = 0; b < batch; ++b) slots.push_back(static_cast<int32_t>(o.indices ? (b * 3 + 1) % (batch + 4) : b));
  if (o.indices) slots[1] = -1, slots.back() = static_cast<int32_t>(batch + 4);
  const Tensor<S> before = state;

  rom_conv_update_args a{};
  a.silu = o.silu;
  a.x = x.view(), a.conv_state = state.view(), a.weight = weight.view(), a.out = out.view();
  if (o.bias) a.bias = bias.view();
  if (o.indices) a.state_indices = view(slots);
  check(rom_conv_update_cuda(&a));

  Comparison outs, states;
  std::vector<int64_t> owner(static_cast<size_t>(state.size[0]), -1);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t slot = slots[static_cast<size_t>(b)];
    const bool owns = slot >= 0 && slot < state.size[0];
    if (owns) owner[static_cast<size_t>(slot)] = b;
    // Input number t of the sequence; the state holds the `width` before the first.
    auto input = [&](int64_t d, int64_t t) { return t < 0 ? before.at({slot, d, width + t}) : x.at({b, t, d}); };
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t d = 0; d < dim; ++d) {
        double sum = owns ? (o.bias ? bias.at({d}) : 0) : slot < 0 ? 0 : std::numeric_limits<double>::quiet_NaN();
        for (int64_t k = 0; owns && k < width; ++k) sum += weight.at({d, k}) * input(d, t - width + 1 + k);
        outs.add(out.at({b, t, d}), o.silu ? silu(sum) : sum);
      }
  }
  outs.report("out", kTolerance<X>);
  for (int64_t s = 0; s < state.size[0]; ++s)
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t k = 0; k < width; ++k) {
        const int64_t b = owner[static_cast<size_t>(s)], t = steps - width + k;
        states.add(state.at({s, d, k}), b < 0   ? before.at({s, d, k})
                                        : t < 0 ? before.at({s, d, width + t})
                                                : x.at({b, t, d}));
      }
  states.report("state", 0);
}

}  // namespace

int main(int count, char** arguments) {
  run<bfloat16, bfloat16, bfloat16>(3, 1, 200, 4, {.indices = true});  // whole windows; a second block, not full
  run<float, float, float>(2, 2, 5, 3, {.gap = 1});
  run<float16, float16, float16>(2, 1, 9, 4, {.channels_inner = true, .bias = false});
  run<double, double, double>(1, 2, 3, 2, {.silu = false});
  if (count > 1 && !std::strcmp(arguments[1], "quick")) return failures != 0;
  run<bfloat16, float, bfloat16>(2, 5, 7, 4);
  run<bfloat16, float, float>(2, 1, 7, 2, {.channels_inner = true});
  run<float16, float, float16>(2, 3, 7, 3, {.indices = true});
  run<float, float, float>(2500, 2, 1, 4);  // more sequences than blocks: a thread takes a second one
  std::printf("%d failures\n", failures);
  return failures != 0;
}
