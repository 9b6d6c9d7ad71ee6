// SPDX-License-Identifier: Apache-2.0
//
// What the forward and backward convolution share: tasks, sequences, and where an input row comes from. Included inside
// the anonymous namespace, after simd.hpp.
#pragma once

constexpr int64_t kChannels = 512;  // a task's channel block: 2 KB of a row, its buffers stay in L1
constexpr int64_t kStep = 4;        // rows per inner step: their taps overlap, so 4 outputs cost 7 loads instead of 16

// Channels c... of one position i of a state (sequences, dim, width).
template <class T>
ROM_INLINE T* column(const rom_tensor& state, int64_t sequence, int64_t c, int64_t i) {
  return (T*)state.data + (sequence * state.size[1] + c) * state.size[2] + i;
}
template <class T, class Part>
ROM_INLINE Vec<T> get_column(const rom_tensor& state, int64_t sequence, int64_t c, int64_t i, Part part) {
  T values[lanes<T>] = {};
  const T* from = column<T>(state, sequence, c, i);
  for (int lane = 0; lane < count_of(part, lanes<T>); ++lane) values[lane] = from[lane * state.size[2]];
  return load(values);
}
template <class T, class Part>
ROM_INLINE void add_to_column(const rom_tensor& state, int64_t sequence, int64_t c, int64_t i, Vec<T> v, Part part) {
  T* to = column<T>(state, sequence, c, i);
  for (int lane = 0; lane < count_of(part, lanes<T>); ++lane) to[lane * state.size[2]] += v[lane];
}

struct Sequence {
  int64_t index, batch, start, end;  // its time steps are [start, end) of this batch row
};

// The fields forward and backward arguments have in common.
template <class X>
struct Input {
  using T = Compute<X>;
  const rom_tensor &x, &weight, &bias, &initial, &cu_seqlens, &index;
  int64_t batch, length, dim, width, per_step;  // per_step: rows of a table that make one step, 0 without a table

  template <class Args>
  explicit Input(const Args& a)
      : x(a.x), weight(a.weight), bias(a.bias), initial(a.initial_state), cu_seqlens(a.cu_seqlens), index(a.row_index) {
    const rom_tensor& steps = index.ndim ? index : x;
    batch = steps.size[0], length = steps.size[1], dim = weight.size[1], width = weight.size[0];
    per_step = index.ndim ? index.size[2] : 0;
  }

  int64_t sequences() const { return cu_seqlens.data ? cu_seqlens.size[0] - 1 : batch; }
  Sequence sequence(int64_t i) const {
    const int32_t* bounds = (const int32_t*)cu_seqlens.data;
    return bounds ? Sequence{i, 0, bounds[i], bounds[i + 1]} : Sequence{i, i, 0, length};
  }
  // Where row k of step t lies in x, in elements; `like` is x or a tensor of its shape.
  int64_t offset(const rom_tensor& like, int64_t b, int64_t t, int64_t k) const {
    if (!per_step) return b * like.stride[0] + t * like.stride[1];
    return ((const int32_t*)index.data)[(b * length + t) * per_step + k] * like.stride[0];
  }
  const X* row(int64_t b, int64_t t, int64_t k) const { return (const X*)x.data + offset(x, b, t, k); }
};

// x_t of a sequence, from before its start too (t >= start - width).
template <class X, class Part>
ROM_INLINE Vec<Compute<X>> tap(const Input<X>& in, const Sequence& q, int64_t t, int64_t c, Part part) {
  using T = Compute<X>;
  if (t < q.start) {
    if (!in.initial.data) return broadcast((T)0);
    return get_column<T>(in.initial, q.index, c, in.width + t - q.start, part);
  }
  Vec<T> total = get(in.row(q.batch, t, 0) + c, part);
  for (int64_t k = 1; k < in.per_step; ++k) total += get(in.row(q.batch, t, k) + c, part);
  return total;
}

// A task is a range of time and a block of channels. Fixed by the shape alone: so is the order of every sum.
struct Task {
  int64_t batch, chunk, begin, end, c0, c1;
};
struct Partition {
  int64_t rows = 128, chunks, blocks, length, dim, tasks;

  Partition(int64_t batch, int64_t length_, int64_t dim_) : length(length_), dim(dim_) {
    while (rows < length && batch * ((length + rows - 1) / rows) > 256) rows *= 2;  // bounds the partial sums' memory
    chunks = (length + rows - 1) / rows;
    blocks = (dim + kChannels - 1) / kChannels;
    tasks = batch * chunks * blocks;
  }
  Task task(int64_t i) const {
    const int64_t c0 = i % blocks * kChannels, chunk = i / blocks % chunks, begin = chunk * rows;
    return {i / blocks / chunks,
            chunk,
            begin,
            begin + rows < length ? begin + rows : length,
            c0,
            c0 + kChannels < dim ? c0 + kChannels : dim};
  }
};

// f(sequence, begin, end) for every sequence that has steps [begin, end) in the task.
template <class X, class F>
ROM_INLINE void each_sequence(const Input<X>& in, const Task& task, F f) {
  const int64_t first = in.cu_seqlens.data ? 0 : task.batch, last = in.cu_seqlens.data ? in.sequences() : first + 1;
  for (int64_t i = first; i < last; ++i) {
    const Sequence q = in.sequence(i);
    const int64_t begin = q.start > task.begin ? q.start : task.begin, end = q.end < task.end ? q.end : task.end;
    if (begin < end) f(q, begin, end);
  }
}

// Waking a thread costs about as much as 32 K elements.
ROM_INLINE int64_t threads_for(const rom_launch& launch, int64_t elements) {
  const int64_t useful = 1 + elements / 32768;
  return launch.threads < useful ? launch.threads : useful;
}

template <class F>
bool with_width(int64_t width, F f) {
  switch (width) {
    case 2: f.template operator()<2>(); return true;
    case 3: f.template operator()<3>(); return true;
    case 4: f.template operator()<4>(); return true;
    default: return false;
  }
}
ROM_INLINE rom_status unsupported(const rom_tensor& x, int64_t width) {
  return rom_fail(ROM_UNSUPPORTED, "width %lld (2, 3 and 4 are) or dtype %d of x is not supported", (long long)width,
                  x.dtype);
}
