// SPDX-License-Identifier: Apache-2.0
//
// Causal depthwise convolution, backward. With g_t = grad_out_t * act'(pre_t), pre recomputed from x:
//   grad_x_t = sum_j weight[W - 1 - j] g_{t + j}     grad_weight[k] = sum_t g_t x_{t - W + 1 + k}     grad_bias = sum_t
//   g_t
// Time runs forward; step t completes grad_x_{t - W + 1}, so only W - 1 rows of g are carried along.
#include "cpu/kernel.hpp"
#include "rom/conv.h"

namespace {
#include "cpu/simd.hpp"
//
#include "cpu/conv.hpp"

template <class V>
ROM_INLINE V silu_slope(V pre) {
  const V gate = sigmoid(pre);
  return gate + pre * gate * ((Scalar<V>)1 - gate);
}
template <class T, class Part>
ROM_INLINE void accumulate(T* sum, Vec<T> v, Part part) {
  put(sum, get(sum, part) + v, part);
}

template <class X, int W>
struct Backward {
  using T = Compute<X>;
  using V = Vec<T>;
  const rom_conv_backward_args& a;
  const Input<X>& in;
  const Task task;
  T* const partial;           // (W + 1, dim): this chunk's share of grad_weight and grad_bias
  T carry[W - 1][kChannels];  // g_{t - W + 1} ... g_{t - 1}

  const X* grad_out(int64_t t) const {
    return (const X*)a.grad_out.data + task.batch * a.grad_out.stride[0] + t * a.grad_out.stride[1];
  }
  X* grad_x(int64_t t, int64_t k) const { return (X*)a.grad_x.data + in.offset(a.grad_x, task.batch, t, k); }

  // Steps t ... t + kStep - 1, all taps and all finished rows inside this task's part of the sequence.
  void steps(int64_t t) {
    const X *taps[kStep + W - 1], *grads[kStep];
    X* outs[kStep];
    for (int r = 0; r < kStep + W - 1; ++r) taps[r] = in.row(task.batch, t - W + 1 + r, 0);
    for (int r = 0; r < kStep; ++r) grads[r] = grad_out(t + r), outs[r] = grad_x(t - W + 1 + r, 0);
    const T *weight = (const T*)in.weight.data, *bias = (const T*)in.bias.data;
    each_vector<T>(task.c0, task.c1, [&](int64_t c, auto part) {
      V w[W], x[kStep + W - 1], g[kStep + W - 1], sums[W], sum_g = broadcast((T)0);
      const V b = bias ? get(bias + c, part) : sum_g;
      ROM_UNROLL
      for (int k = 0; k < W; ++k) w[k] = get(weight + k * in.dim + c, part), sums[k] = sum_g;
      ROM_UNROLL
      for (int i = 0; i < kStep + W - 1; ++i) x[i] = get(taps[i] + c, part);
      ROM_UNROLL
      for (int j = 0; j < W - 1; ++j) g[j] = get(carry[j] + c - task.c0, part);
      ROM_UNROLL
      for (int r = 0; r < kStep; ++r) {
        V pre = b;
        ROM_UNROLL
        for (int k = 0; k < W; ++k) pre = fma(w[k], x[r + k], pre);
        const V grad = get(grads[r] + c, part), mine = a.silu ? grad * silu_slope(pre) : grad;
        g[W - 1 + r] = mine;
        sum_g += mine;
        ROM_UNROLL
        for (int k = 0; k < W; ++k) sums[k] = fma(mine, x[r + k], sums[k]);
        V done = w[W - 1] * g[r];
        ROM_UNROLL
        for (int j = 1; j < W; ++j) done = fma(w[W - 1 - j], g[r + j], done);
        put(outs[r] + c, done, part);
      }
      ROM_UNROLL
      for (int j = 0; j < W - 1; ++j) put(carry[j] + c - task.c0, g[kStep + j], part);
      ROM_UNROLL
      for (int k = 0; k < W; ++k) accumulate(partial + k * in.dim + c, sums[k], part);
      accumulate(partial + W * in.dim + c, sum_g, part);
    });
  }

  // Step t of the part [begin, end) of sequence q, inputs from anywhere. From `end` on it only completes rows: the sums
  // over those steps belong to the next task.
  void step(const Sequence& q, int64_t begin, int64_t end, int64_t t) {
    const T *weight = (const T*)in.weight.data, *bias = (const T*)in.bias.data;
    each_vector<T>(task.c0, task.c1, [&](int64_t c, auto part) {
      V mine = broadcast((T)0);
      if (t < q.end) {
        V x[W], pre = bias ? get(bias + c, part) : mine;
        ROM_UNROLL
        for (int k = 0; k < W; ++k) {
          x[k] = tap(in, q, t - W + 1 + k, c, part);
          pre = fma(get(weight + k * in.dim + c, part), x[k], pre);
        }
        mine = get(grad_out(t) + c, part);
        if (a.silu) mine *= silu_slope(pre);
        if (t < end) {
          ROM_UNROLL
          for (int k = 0; k < W; ++k) accumulate(partial + k * in.dim + c, mine * x[k], part);
          accumulate(partial + W * in.dim + c, mine, part);
        }
      }
      V done = get(weight + c, part) * mine;
      ROM_UNROLL
      for (int j = W - 2; j >= 0; --j) {  // each place of the carry takes its successor's value
        T* place = carry[j] + c - task.c0;
        const V g = get(place, part);
        done = fma(get(weight + (W - 1 - j) * in.dim + c, part), g, done);
        put(place, mine, part);
        mine = g;
      }
      finish(q, begin, t - W + 1, c, done, part);
    });
  }

  // Writes the gradient of input t: of x, or of the initial state where t lies before the sequence.
  template <class Part>
  void finish(const Sequence& q, int64_t begin, int64_t t, int64_t c, V grad, Part part) {
    if (t >= begin) {
      if (a.grad_final_state.data && t >= q.end - W)
        grad += get_column<T>(a.grad_final_state, q.index, c, W + t - q.end, part);
      put(grad_x(t, 0) + c, grad, part);
      for (int64_t k = 1; k < in.per_step; ++k) put(grad_x(t, k) + c, grad, part);
    } else if (begin == q.start && a.grad_initial_state.data) {
      add_to_column<T>(a.grad_initial_state, q.index, c, W + t - q.start, grad, part);
    }
  }

  void part_of_sequence(const Sequence& q, int64_t begin, int64_t end) {
    __builtin_memset(carry, 0, sizeof(carry));
    const int64_t inner_end = a.grad_final_state.data && q.end <= end ? q.end - 1 : end;
    for (int64_t t = begin; t < end + W - 1;) {
      if (in.per_step <= 1 && t - W + 1 >= begin && t + kStep <= inner_end) {
        steps(t);
        t += kStep;
      } else {
        step(q, begin, end, t++);
      }
    }
  }
};

// What the final state passes straight to the initial state, where a sequence is shorter than W; zero elsewhere.
template <class T>
void start_grad_initial(const rom_conv_backward_args& a, int64_t sequences, auto length_of) {
  const int64_t dim = a.weight.size[1], width = a.weight.size[0];
  T* to = (T*)a.grad_initial_state.data;
  const T* from = (const T*)a.grad_final_state.data;
  for (int64_t q = 0; q < sequences; ++q) {
    const int64_t length = length_of(q);
    for (int64_t i = q * dim * width; i < (q + 1) * dim * width; ++i)
      to[i] = from && i % width >= length ? from[i - length] : (T)0;
  }
}

template <class X, int W>
void backward(const rom_conv_backward_args& a) {
  using T = Compute<X>;
  const Input<X> in(a);
  if (a.grad_initial_state.data)
    start_grad_initial<T>(a, in.sequences(), [&](int64_t i) { return in.sequence(i).end - in.sequence(i).start; });

  const Partition partition(in.batch, in.length, in.dim);
  const int64_t threads = threads_for(a.launch, in.batch * in.length * in.dim), parts = in.batch * partition.chunks;
  T* partial = (T*)a.workspace.data;
  parallel_for(partition.tasks, threads, [&](int64_t i, int64_t) {
    FlushSubnormals flush;
    const Task task = partition.task(i);
    T* mine = partial + (task.batch * partition.chunks + task.chunk) * (W + 1) * in.dim;
    for (int k = 0; k <= W; ++k)
      __builtin_memset(mine + k * in.dim + task.c0, 0, (size_t)(task.c1 - task.c0) * sizeof(T));
    Backward<X, W> work{a, in, task, mine, {}};
    each_sequence(in, task,
                  [&](const Sequence& q, int64_t begin, int64_t end) { work.part_of_sequence(q, begin, end); });
  });
  // In the order of the chunks, row by row of (grad_weight, grad_bias).
  for (int k = 0; k <= W; ++k) {
    T* total = k < W ? (T*)a.grad_weight.data + k * in.dim : (T*)a.grad_bias.data;
    __builtin_memset(total, 0, (size_t)in.dim * sizeof(T));
    for (int64_t part = 0; part < parts; ++part) {
      const T* mine = partial + (part * (W + 1) + k) * in.dim;
      each_vector<T>(0, in.dim, [&](int64_t c, auto piece) { accumulate(total + c, get(mine + c, piece), piece); });
    }
  }
}

}  // namespace

ROM_CPU_WORKSPACE(rom_conv_backward, rom_conv_backward_args) {
  const rom_tensor& steps = a.row_index.ndim ? a.row_index : a.x;
  const Partition partition(steps.size[0], steps.size[1], a.weight.size[1]);
  const int64_t numbers = steps.size[0] * partition.chunks * (a.weight.size[0] + 1) * a.weight.size[1];
  return numbers * (a.x.dtype == ROM_FLOAT64 ? 8 : 4);
}

ROM_CPU_KERNEL(rom_conv_backward, rom_conv_backward_args) {
  bool known = false;
  with_storage_type(
      a.x.dtype, [&]<class X>(Type<X>) { known = with_width(a.weight.size[0], [&]<int W>() { backward<X, W>(a); }); });
  return known ? ROM_OK : unsupported(a.x, a.weight.size[0]);
}
