// SPDX-License-Identifier: Apache-2.0
//
// What the scan's forward and backward share: how the work is cut, how states are laid out, how rows are found.
// Include after simd.hpp and staged.hpp, inside the anonymous namespace.
//
// Lanes are channels, so B[t, n] and C[t, n] are broadcasts and only their gradients need a sum over lanes. Time runs
// in tiles of kTile steps outside, blocks of one vector of channels inside: a row of u, delta, z is used up while its
// pages are in the TLB. State-like arrays (A, h, checkpoints, carries, gradients of A) are blocked
// [block][state][lane]: one block is contiguous, and no power-of-two stride folds them onto a few cache sets. A block
// never spans two groups; the last one of a group may be partial, and states are padded to kStates with zeros.
constexpr int kTile = ROM_SCAN_TILE;
constexpr int kStates = 4;     // states held in registers at a time
constexpr int kRows = 4;       // time steps whose softplus and SiLU advance together
constexpr int kPartial = 192;  // channels per partial sum of dB and dC

// The tensors forward and backward share, by the names of rom/scan.h.
struct Problem {
  rom_tensor u, delta, A, B, C, D, z, delta_bias, cu_seqlens, row_index;
  bool softplus, B_by_time, C_by_time;
  int64_t batch, length, dim, state, groups, sequences;
  int64_t states;          // padded
  int64_t group_dim;       // channels per group
  int64_t group_blocks;    // blocks per group
  int64_t partial_blocks;  // blocks per partial sum of dB and dC
  int64_t chunk_blocks;    // blocks per unit of work, a multiple of that
  int64_t group_partials, group_chunks, partials, chunks, blocks;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T, class Args>
Problem problem_of(const Args& a) {
  Problem p{};
  p.u = a.u, p.delta = a.delta, p.A = a.A, p.B = a.B, p.C = a.C, p.D = a.D, p.z = a.z, p.delta_bias = a.delta_bias;
  p.cu_seqlens = a.cu_seqlens, p.row_index = a.row_index, p.softplus = a.delta_softplus != 0;
  p.B_by_time = a.B.ndim == 4, p.C_by_time = a.C.ndim == 4;
  p.batch = a.u.size[0], p.length = a.u.size[1], p.dim = a.u.size[2], p.state = a.A.size[1];
  p.groups = p.B_by_time ? a.B.size[2] : 1;
  if (p.C_by_time && a.C.size[2] > p.groups) p.groups = a.C.size[2];
  p.sequences = a.cu_seqlens.data ? a.cu_seqlens.size[0] - 1 : p.batch;
  p.states = divide_up(p.state, kStates) * kStates;
  p.group_dim = p.dim / p.groups;
  p.group_blocks = divide_up(p.group_dim, lanes<T>);
  p.blocks = p.groups * p.group_blocks;
  // dB and dC are sums over channels: one partial sum per kPartial channels, whatever the number of threads, so that
  // results do not depend on it. The unit of work does: the wider, the better it reads memory (1536 channels at once
  // instead of 384 save 7 % at (1, 2048, 1536, 16)), so there are only as many units as keep all threads busy.
  p.group_partials = divide_up(p.group_blocks, kPartial / lanes<T>);
  p.partial_blocks = p.group_partials ? divide_up(p.group_blocks, p.group_partials) : 1;
  p.group_partials = divide_up(p.group_blocks, p.partial_blocks);
  const int64_t tasks = p.sequences * p.groups > 0 ? p.sequences * p.groups : 1, threads = a.launch.threads;
  int64_t units = divide_up(threads, tasks);
  if (tasks * units < 4 * threads && tasks * units % threads != 0) units *= 2;
  p.chunk_blocks = divide_up(p.group_partials, units) * p.partial_blocks;
  p.group_chunks = divide_up(p.group_blocks, p.chunk_blocks > 0 ? p.chunk_blocks : 1);
  p.partials = p.groups * p.group_partials;
  p.chunks = p.groups * p.group_chunks;
  return p;
}

// Steps [begin, begin + length) of one batch entry. Its tiles' checkpoints start at slot `slot`: with packed sequences
// a bound that needs no running sum over them, so up to one slot per sequence stays unused.
struct Sequence {
  int64_t index, batch, begin, length, slot;
};
Sequence sequence_of(const Problem& p, int64_t i) {
  if (!p.cu_seqlens.data) return {i, i, 0, p.length, i * divide_up(p.length, kTile)};
  const int32_t* cu = (const int32_t*)p.cu_seqlens.data;
  return {i, 0, cu[i], cu[i + 1] - cu[i], cu[i] / kTile + i};
}
[[maybe_unused]] int64_t slots_of(const Problem& p) {
  return p.cu_seqlens.data ? p.length / kTile + p.sequences : p.sequences * divide_up(p.length, kTile);
}

// Neighbouring channel blocks of one group: the unit of work together with one or more sequences.
struct Chunk {
  int64_t index, group, first_block, blocks;
};
Chunk chunk_of(const Problem& p, int64_t i) {
  const int64_t group = i / p.group_chunks, first = i % p.group_chunks * p.chunk_blocks;
  return {i, group, group * p.group_blocks + first, smaller(p.chunk_blocks, p.group_blocks - first)};
}
// The partial sum that a block of a chunk adds to.
[[maybe_unused]] int64_t partial_of(const Problem& p, const Chunk& chunk, int64_t block) {
  return chunk.group * p.group_partials + (chunk.first_block - chunk.group * p.group_blocks + block) / p.partial_blocks;
}
// The channels of a block: [channel, channel + count), count <= lanes.
struct Channels {
  int64_t channel;
  int count;
};
template <class T>
Channels channels_of(const Problem& p, int64_t block) {
  const int64_t group = block / p.group_blocks, first = block % p.group_blocks * lanes<T>;
  return {group * p.group_dim + first, (int)smaller(lanes<T>, p.group_dim - first)};
}

// ------------------------------------------------------------------------------------------------ rows
template <class S>
ROM_INLINE Vec<Compute<S>> get(const S* p, int count) {
  return __builtin_expect(count == lanes<Compute<S>>, 1) ? load(p) : load_partial(p, count);
}
template <class S>
ROM_INLINE void put(S* p, Vec<Compute<S>> v, int count) {
  if (__builtin_expect(count == lanes<Compute<S>>, 1))
    store(p, v);
  else
    store_partial(p, v, count);
}

template <class S>
ROM_INLINE S* row(const rom_tensor& t, int64_t batch, int64_t step) {
  return (S*)t.data + batch * t.stride[0] + step * t.stride[1];
}
// The rows of a tile: `steps` of one batch entry from `begin` on, or the rows of z and out that row_index names.
struct Rows {
  int64_t batch, begin;
  int steps;
  const int32_t* index;  // [step][k], or null
  int64_t k;
};
Rows rows_of(const Sequence& s, int64_t first, int steps) { return {s.batch, s.begin + first, steps, nullptr, 1}; }
Rows indexed(const Problem& p, Rows rows) {
  if (!p.row_index.data) return rows;
  rows.k = p.row_index.size[1];
  rows.index = (const int32_t*)p.row_index.data + (rows.batch * p.length + rows.begin) * rows.k;
  return rows;
}
// f(row) for the row of a step, or each of its k rows.
template <class S, class F>
ROM_INLINE void each_row(const Rows& rows, const rom_tensor& t, int step, F f) {
  if (!rows.index) return f(row<S>(t, rows.batch, rows.begin + step));
  for (int64_t i = 0; i < rows.k; ++i) f((S*)t.data + rows.index[step * rows.k + i] * t.stride[0]);
}
// Rows of a block, widened, to a field of its tile: to[step * stride], with zeros up to a multiple of kRows. The
// arithmetic then sees whole vectors of the compute type, whatever the storage type, strides and row_index.
template <class S>
void gather(const rom_tensor& t, const Rows& rows, Channels c, Compute<S>* to, int stride) {
  using T = Compute<S>;
  for (int i = 0; i < rows.steps; ++i) {
    Vec<T> total = broadcast((T)0);
    each_row<const S>(rows, t, i, [&](const S* r) { total += get(r + c.channel, c.count); });
    store(to + i * stride, total);
  }
  for (int i = rows.steps; i % kRows != 0; ++i) store(to + i * stride, broadcast((T)0));
}
// The way back: a field of the tile to rows, the same to each of the k rows of a step.
template <class S>
void scatter(const rom_tensor& t, const Rows& rows, Channels c, const Compute<S>* from, int stride) {
  for (int i = 0; i < rows.steps; ++i)
    each_row<S>(rows, t, i, [&](S* r) {
      const Vec<Compute<S>> v = load(from + i * stride);
      __builtin_expect(c.count == lanes<Compute<S>>, 1) ? stream(r + c.channel, v) : put(r + c.channel, v, c.count);
    });
}

// Where the rows of a tile start, looked up once for all its blocks; the last is repeated up to a multiple of kRows.
// Only for one row per step: with more, blocks are gathered and scattered.
template <class S>
struct RowStarts {
  S* at[kTile];
  RowStarts(const rom_tensor& t, const Rows& rows) {
    if (!t.data || rows.k > 1) return;
    for (int i = 0; i < divide_up(rows.steps, kRows) * kRows; ++i)
      each_row<S>(rows, t, i < rows.steps ? i : rows.steps - 1, [&](S* r) { at[i] = r; });
  }
};

// Touches a chunk's part of the next tile's rows line by line while this tile's blocks are computed: memory sees whole
// rows in order, where the blocks themselves walk down columns, a page per step.
class Ahead {
  const char *at_ = nullptr, *base_ = nullptr;
  const int32_t* index_ = nullptr;
  int64_t row_ = 0, rows_ = 0, left_ = 0, lines_ = 0, stride_ = 0;

 public:
  template <class S>
  void start(const rom_tensor& t, const Rows& rows, int64_t channel, int64_t channels) {
    constexpr int64_t size = sizeof(S);
    row_ = 0, rows_ = t.data && rows.steps > 0 ? rows.steps * rows.k : 0;
    if (!rows_) return;
    base_ = (const char*)t.data + channel * size, index_ = rows.index;
    if (!index_) base_ += (rows.batch * t.stride[0] + rows.begin * t.stride[1]) * size;
    stride_ = t.stride[index_ ? 0 : 1] * size;
    left_ = lines_ = divide_up(channels * size, 64);
    at_ = base_ + (index_ ? index_[0] * stride_ : 0);
  }
  inline __attribute__((always_inline)) void step() {
    if (row_ >= rows_) return;
    __builtin_prefetch(at_, 0, 2);
    at_ += 64;
    if (--left_ > 0) return;
    if (++row_ < rows_) at_ = base_ + (index_ ? index_[row_] : row_) * stride_;
    left_ = lines_;
  }
};
template <class T>
ROM_INLINE Vec<T> get_parameter(const rom_tensor& t, Channels c) {
  return t.data ? get((const T*)t.data + c.channel, c.count) : broadcast((T)0);
}

// ------------------------------------------------------------------------------------------------ blocked arrays
// (dim, state) rows -> [state][lane] of one block, times `factor`; a null source gives zeros.
template <class T>
void to_block(const Problem& p, const T* rows, int64_t block, T factor, T* out) {
  __builtin_memset(out, 0, sizeof(T) * (size_t)(p.states * lanes<T>));
  const Channels c = channels_of<T>(p, block);
  if (!rows) return;
  for (int i = 0; i < c.count; ++i)
    for (int64_t n = 0; n < p.state; ++n) out[n * lanes<T> + i] = rows[(c.channel + i) * p.state + n] * factor;
}
template <class T>
void from_block(const Problem& p, const T* block_values, int64_t block, T* rows) {
  const Channels c = channels_of<T>(p, block);
  for (int i = 0; i < c.count; ++i)
    for (int64_t n = 0; n < p.state; ++n) rows[(c.channel + i) * p.state + n] = block_values[n * lanes<T> + i];
}
template <class T>
T* states_of(const rom_tensor& t, const Problem& p, int64_t sequence) {
  return t.data ? (T*)t.data + sequence * p.dim * p.state : nullptr;
}

// ------------------------------------------------------------------------------------------------ B and C
// Values of B or C for one tile (or, constant over time, for one chunk), ready for the inner loops: time step t and
// state n are at values[t * step + n] as scalars when both vary with time (kByTime), else at [.. + n * lanes] as
// vectors, with step 0 for the one that is constant.
template <class T>
struct Coefficients {
  const T* values;
  int64_t step;
};
template <bool kByTime, class T>
ROM_INLINE Vec<T> coefficient(const T* values, int n) {
  if constexpr (kByTime)
    return broadcast(values[n]);
  else
    return load(values + n * lanes<T>);
}
// B or C of one chunk: room for a tile (or for the chunk's constants), and what the inner loops need of it.
template <class S, bool kByTime>
class CoefficientTile {
  using T = Compute<S>;
  static constexpr int kWidth = kByTime ? 1 : lanes<T>;
  const Problem& p_;
  const rom_tensor& source_;
  const bool by_time_;
  T* values_;

 public:
  static int64_t size(const Problem& p) {
    return (p.chunk_blocks > kTile ? p.chunk_blocks : kTile) * p.states * kWidth;
  }
  CoefficientTile(const Problem& p, const rom_tensor& source, bool by_time, T* values)
      : p_(p), source_(source), by_time_(by_time), values_(values) {}

  void start_chunk(const Chunk& chunk) {
    if (kByTime || by_time_) return;
    for (int64_t i = 0; i < chunk.blocks; ++i)
      to_block(p_, (const T*)source_.data, chunk.first_block + i, (T)1, values_ + i * p_.states * kWidth);
  }
  void start_tile(const Sequence& s, int64_t first, int steps, int64_t group) {
    if (!kByTime && !by_time_) return;
    T* out = values_;
    for (int i = 0; i < steps; ++i, out += p_.states * kWidth) {
      const S* row_values = row<const S>(source_, s.batch, s.begin + first + i);
      if (source_.size[2] > 1) row_values += group * source_.stride[2];
      for (int64_t n = 0; n < p_.states; ++n)
        for (int lane = 0; lane < kWidth; ++lane) out[n * kWidth + lane] = n < p_.state ? widen(row_values[n]) : (T)0;
    }
  }
  Coefficients<T> of_block(int64_t block_in_chunk) const {
    if (kByTime || by_time_) return {values_, p_.states * kWidth};
    return {values_ + block_in_chunk * p_.states * kWidth, 0};
  }
};

// ------------------------------------------------------------------------------------------------ scratch memory
// Cuts the workspace into 64-byte aligned pieces; with a null start it only counts.
struct Scratch {
  uintptr_t start;
  int64_t used = 0;
  explicit Scratch(const void* memory) : start((uintptr_t)memory) {}
  template <class T>
  T* take(int64_t count) {
    T* out = (T*)(start + (uintptr_t)used);
    used += divide_up(count * (int64_t)sizeof(T), 64) * 64;
    return out;
  }
};
