// SPDX-License-Identifier: Apache-2.0
//
// Causal depthwise convolution, forward. Memory-bound: rows are walked whole, a few at a time, as memory wants them.
#include "cpu/kernel.hpp"
#include "rom/conv.h"

namespace {
#include "cpu/simd.hpp"
//
#include "cpu/conv.hpp"

// out_r of kStep rows from kStep + W - 1 rows of inputs, oldest first, all of them inside the sequence.
template <class X, int W>
ROM_INLINE void step(const Input<X>& in, const X* const* taps, X* const* outs, const Task& task, bool silu) {
  using T = Compute<X>;
  const T *weight = (const T*)in.weight.data, *bias = (const T*)in.bias.data;
  each_vector<T>(task.c0, task.c1, [&](int64_t c, auto part) {
    Vec<T> w[W], x[kStep + W - 1];
    ROM_UNROLL
    for (int k = 0; k < W; ++k) w[k] = get(weight + k * in.dim + c, part);
    ROM_UNROLL
    for (int i = 0; i < kStep + W - 1; ++i) x[i] = get(taps[i] + c, part);
    const Vec<T> b = bias ? get(bias + c, part) : broadcast((T)0);
    ROM_UNROLL
    for (int r = 0; r < kStep; ++r) {
      Vec<T> pre = b;
      ROM_UNROLL
      for (int k = 0; k < W; ++k) pre = fma(w[k], x[r + k], pre);
      put(outs[r] + c, silu ? pre * sigmoid(pre) : pre, part);
    }
  });
}

// One row from anywhere: at a sequence's start, of several table rows, left over.
template <class X, int W>
void row(const Input<X>& in, const Sequence& q, int64_t t, X* out, const Task& task, bool silu) {
  using T = Compute<X>;
  const T *weight = (const T*)in.weight.data, *bias = (const T*)in.bias.data;
  each_vector<T>(task.c0, task.c1, [&](int64_t c, auto part) {
    Vec<T> pre = bias ? get(bias + c, part) : broadcast((T)0);
    ROM_UNROLL
    for (int k = 0; k < W; ++k) pre = fma(get(weight + k * in.dim + c, part), tap(in, q, t - W + 1 + k, c, part), pre);
    put(out + c, silu ? pre * sigmoid(pre) : pre, part);
  });
}

template <class X, int W>
void forward(const rom_conv_forward_args& a) {
  const Input<X> in(a);
  const Partition partition(in.batch, in.length, in.dim);
  const int64_t threads = threads_for(a.launch, in.batch * in.length * in.dim);
  parallel_for(partition.tasks, threads, [&](int64_t i, int64_t) {
    FlushSubnormals flush;
    const Task task = partition.task(i);
    auto out = [&](int64_t t) { return (X*)a.out.data + (task.batch * in.length + t) * in.dim; };
    each_sequence(in, task, [&](const Sequence& q, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end;) {
        if (in.per_step > 1 || t - W + 1 < q.start || t + kStep > end) {
          row<X, W>(in, q, t, out(t), task, a.silu);
          ++t;
          continue;
        }
        const X* taps[kStep + W - 1];
        X* outs[kStep];
        for (int r = 0; r < kStep + W - 1; ++r) taps[r] = in.row(q.batch, t - W + 1 + r, 0);
        for (int r = 0; r < kStep; ++r) outs[r] = out(t + r);
        step<X, W>(in, taps, outs, task, a.silu);
        t += kStep;
      }
    });
  });
}

// The last W inputs of every sequence, those before its start included.
template <class X>
void final_state(const rom_conv_forward_args& a) {
  using T = Compute<X>;
  const Input<X> in(a);
  const int64_t threads = threads_for(a.launch, in.sequences() * in.dim * in.width);
  parallel_for(in.sequences(), threads, [&](int64_t i, int64_t) {
    const Sequence q = in.sequence(i);
    each_vector<T>(0, in.dim, [&](int64_t c, auto part) {
      for (int64_t k = 0; k < in.width; ++k) {
        const Vec<T> v = tap(in, q, q.end - in.width + k, c, part);
        T* to = column<T>(a.final_state, i, c, k);
        for (int lane = 0; lane < count_of(part, lanes<T>); ++lane) to[lane * in.width] = v[lane];
      }
    });
  });
}

}  // namespace

ROM_CPU_KERNEL(rom_conv_forward, rom_conv_forward_args) {
  bool known = false;
  with_storage_type(a.x.dtype, [&]<class X>(Type<X>) {
    known = with_width(a.weight.size[0], [&]<int W>() { forward<X, W>(a); });
    if (known && a.final_state.data) final_state<X>(a);
  });
  return known ? ROM_OK : unsupported(a.x, a.weight.size[0]);
}
