// SPDX-License-Identifier: Apache-2.0
//
// Selective scan, backward. Per tile (last to first), block and kStates states: `replay` runs the tile again from its
// checkpoint and parks a_t and h_t in L1 (cheaper than a second exponential), `sweep` goes back through them with the
// carry and the gradient of A in registers:
//
//   g_t = C_t dy_t + carry_t                    gradient of h_t
//   dC_t += dy_t h_t;   dB_t += g_t delta_t u_t;   through_B_t += g_t B_t        (sums over channels; over states)
//   carry_{t-1} = a_t g_t;   w_t = carry_{t-1} h_{t-1};   dA += w_t delta_t;   through_A_t += w_t A
//   du_t = delta_t through_B_t + D dy_t;   ddelta_t = (through_A_t + u_t through_B_t) softplus'
//
// dB and dC gather in vectors, are summed over lanes once per tile and kPartial channels, and written as one partial;
// gradients of parameters as one partial per segment of sequences. Both are added in index order at the end.
#include "cpu/kernel.hpp"
#include "rom/scan.h"

namespace {
#include "cpu/simd.hpp"
//
#include "cpu/staged.hpp"
//
#include "cpu/scan.hpp"

constexpr int64_t kMostSegments = 16;
constexpr int kAhead = 4;  // u, delta, grad_out, z

// One step of a block's tile; interleaved, so that a step is one run of cache lines. `gate` holds z until prepare().
template <class T>
struct alignas(64) Step {
  T delta[lanes<T>], delta_u[lanes<T>], dy[lanes<T>], through_B[lanes<T>], through_A[lanes<T>], y[lanes<T>];
  T u[lanes<T>], slope[lanes<T>], gate[lanes<T>];
};
template <class T>
constexpr int kStride = sizeof(Step<T>) / sizeof(T);
// The states before a step, and its decays.
template <class T>
struct alignas(64) Moment {
  T h[kStates][lanes<T>], a[kStates][lanes<T>];
};
// Where gradients of B or C gather, as vectors: per step, or with step 0 for one that is constant over time.
template <class T>
struct Gather {
  T* values;
  int64_t step;
};

// The rows of a tile, looked up once for all its blocks. G: the storage type of grad_out, S or the compute type.
template <class S, class G>
struct TileRows {
  Rows plain, named;  // those of z, grad_out and grad_z may be named by row_index
  RowStarts<const S> delta, u, z;
  RowStarts<const G> grad_out;
  RowStarts<S> grad_u, grad_delta, grad_z;

  TileRows(const rom_scan_backward_args& a, const Problem& p, const Rows& rows)
      : plain(rows),
        named(indexed(p, rows)),
        delta(p.delta, plain),
        u(p.u, plain),
        z(p.z, named),
        grad_out(a.grad_out, named),
        grad_u(a.grad_u, plain),
        grad_delta(a.grad_delta, plain),
        grad_z(a.grad_z, named) {}
};

// Everything that depends on (step, channel) only; kDirect: from rows, else from what gather() left in the tile.
template <class S, class G, bool kDirect>
void prepare(const Problem& p, const TileRows<S, G>& rows, Channels c, Step<Compute<S>>* tile) {
  using T = Compute<S>;
  using Rows4 = Staged<Vec<T>, kRows>;
  const auto value = [&](const auto* row, const T* gathered) {
    if constexpr (kDirect)
      return load(row + c.channel);
    else
      return load(gathered);
  };
  const Vec<T> bias = get_parameter<T>(p.delta_bias, c), D = get_parameter<T>(p.D, c);
  for (int t = 0; t < rows.plain.steps; t += kRows) {
    Step<T>* at = tile + t;
    Rows4 delta, dy;
    ROM_EACH(kRows) delta.v[i] = value(rows.delta.at[t + i], at[i].delta) + bias;
    if (p.softplus) {
      const SoftplusResult<Rows4> both = softplus(delta);
      delta = both.value;
      ROM_EACH(kRows) store(at[i].slope, both.slope.v[i]);
    } else {
      ROM_EACH(kRows) store(at[i].slope, broadcast((T)1));
    }
    ROM_EACH(kRows) {
      const Vec<T> u = value(rows.u.at[t + i], at[i].u);
      store(at[i].u, u);
      store(at[i].delta, delta.v[i]);
      store(at[i].delta_u, delta.v[i] * u);
      store(at[i].y, D * u);
      store(at[i].through_A, broadcast((T)0));
      store(at[i].through_B, broadcast((T)0));
      dy.v[i] = value(rows.grad_out.at[t + i], at[i].dy);
    }
    if (p.z.data) {
      Rows4 z;
      ROM_EACH(kRows) z.v[i] = value(rows.z.at[t + i], at[i].gate);
      const Rows4 sigma = sigmoid(z), silu = z * sigma;
      const Rows4 gate = dy * (sigma + silu - silu * sigma);  // silu' = sigmoid (1 + z (1 - sigmoid))
      dy = dy * silu;
      ROM_EACH(kRows) store(at[i].gate, gate.v[i]);
    }
    ROM_EACH(kRows) store(at[i].dy, dy.v[i]);
  }
}

template <bool kByTime, class T>
ROM_INLINE void replay(int steps, const T* A, const T* checkpoint, const T* B, int64_t B_step, const T* C,
                       int64_t C_step, Step<T>* tile, Moment<T>* moments, Ahead& ahead) {
  Staged<Vec<T>, kStates> h, a_log;
  ROM_EACH(kStates) {
    h.v[i] = load(checkpoint + i * lanes<T>);
    a_log.v[i] = load(A + i * lanes<T>);
    store(moments[0].h[i], h.v[i]);
  }
  Ahead cursor = ahead;
  for (int t = 0; t < steps; ++t, B += B_step, C += C_step) {
    cursor.step();
    const Staged<Vec<T>, kStates> a = exp2(a_log * load(tile[t].delta));
    const Vec<T> delta_u = load(tile[t].delta_u);
    ROM_EACH(kStates) {
      store(moments[t].a[i], a.v[i]);
      h.v[i] = fma(a.v[i], h.v[i], delta_u * coefficient<kByTime>(B, i));
      store(moments[t + 1].h[i], h.v[i]);
    }
    Vec<T> y = load(tile[t].y);
    ROM_EACH(kStates) y = fma(h.v[i], coefficient<kByTime>(C, i), y);
    store(tile[t].y, y);
  }
  ahead = cursor;
}

template <bool kByTime, class T>
ROM_INLINE void sweep(int steps, const T* A, T* carry, T* grad_A, const T* B, int64_t B_step, const T* C,
                      int64_t C_step, Gather<T> grad_B, Gather<T> grad_C, Step<T>* tile, const Moment<T>* moments) {
  constexpr int W = lanes<T>;
  Vec<T> r[kStates], dA[kStates], a_log[kStates], h[kStates];
  ROM_EACH(kStates) {
    r[i] = load(carry + i * W);
    dA[i] = load(grad_A + i * W);
    a_log[i] = load(A + i * W);
    h[i] = load(moments[steps].h[i]);
  }
  for (int t = steps - 1; t >= 0; --t) {
    const T *B_t = B + t * B_step, *C_t = C + t * C_step;
    T *dB = grad_B.values + t * grad_B.step, *dC = grad_C.values + t * grad_C.step;
    const Vec<T> dy = load(tile[t].dy), delta_u = load(tile[t].delta_u), delta = load(tile[t].delta);
    Vec<T> through_A = load(tile[t].through_A), through_B = load(tile[t].through_B), g[kStates];
    ROM_EACH(kStates) g[i] = fma(dy, coefficient<kByTime>(C_t, i), r[i]);
    ROM_EACH(kStates) store(dC + i * W, fma(dy, h[i], load(dC + i * W)));
    ROM_EACH(kStates) r[i] = g[i] * load(moments[t].a[i]);
    ROM_EACH(kStates) store(dB + i * W, fma(g[i], delta_u, load(dB + i * W)));
    ROM_EACH(kStates) through_B = fma(g[i], coefficient<kByTime>(B_t, i), through_B);
    ROM_EACH(kStates) {
      h[i] = load(moments[t].h[i]);
      g[i] = r[i] * h[i];
    }
    ROM_EACH(kStates) dA[i] = fma(g[i], delta, dA[i]);
    ROM_EACH(kStates) through_A = fma(g[i], a_log[i], through_A);
    store(tile[t].through_A, through_A);
    store(tile[t].through_B, through_B);
  }
  ROM_EACH(kStates) {
    store(carry + i * W, r[i]);
    store(grad_A + i * W, dA[i]);
  }
}

// du, ddelta, dz to their rows (else in the place of through_B, through_A, gate, for scatter()); adds to the gradients
// of D and delta_bias. through_A was gathered with A log2(e).
template <class S, class G, bool kDirect>
void finish(const Problem& p, const TileRows<S, G>& rows, Channels c, Step<Compute<S>>* tile, Compute<S>* grad_D,
            Compute<S>* grad_bias) {
  using T = Compute<S>;
  const auto write = [&](S* row, T* kept, Vec<T> v) {
    if constexpr (kDirect)
      stream(row + c.channel, v);
    else
      store(kept, v);
  };
  const Vec<T> D = get_parameter<T>(p.D, c);
  Vec<T> dD = load(grad_D), dbias = load(grad_bias);
  for (int t = 0; t < rows.plain.steps; ++t) {
    Step<T>* at = tile + t;
    const Vec<T> u = load(at->u), dy = load(at->dy), through_B = load(at->through_B);
    const Vec<T> through_A = load(at->through_A) * (T)0.693147180559945309417232;
    const Vec<T> ddelta = fma(through_B, u, through_A) * load(at->slope);
    write(rows.grad_delta.at[t], at->through_A, ddelta);
    write(rows.grad_u.at[t], at->through_B, fma(dy, D, through_B * load(at->delta)));
    if (p.z.data) write(rows.grad_z.at[t], at->gate, load(at->gate) * load(at->y));
    dbias += ddelta;
    dD = fma(dy, u, dD);
  }
  store(grad_D, dD);
  store(grad_bias, dbias);
}

// ------------------------------------------------------------------------------------------------ sums over lanes
template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Indices<I...>;
};
// The sums of neighbours: [a0 + a1, a2 + a3, ..., b0 + b1, ...].
template <class V, int... I>
ROM_INLINE V fold(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}
// `count` vectors (a multiple of lanes) to as many scalars.
template <class T>
void sum_lanes(const T* vectors, int64_t count, T* sums) {
  constexpr int W = lanes<T>;
  for (int64_t first = 0; first < count; first += W, vectors += W * W) {
    Vec<T> v[W];
    ROM_EACH(W) v[i] = load(vectors + i * W);
    ROM_UNROLL
    for (int width = W; width > 1; width /= 2) ROM_UNROLL
    for (int i = 0; i < width / 2; ++i) v[i] = fold(v[2 * i], v[2 * i + 1], typename Count<W>::type{});
    store(sums + first, v[0]);
  }
}

// ------------------------------------------------------------------------------------------------ workspace
// Gradients of the parameters per block, as vectors: A [states], D, delta_bias; of B and C where they are constant.
struct Fields {
  int64_t D, bias, B, C, all;
  Fields(const Problem& p, bool by_time)
      : D(p.states), bias(p.states + 1), B(p.states + 2), C(B + p.states), all(by_time ? B : C + p.states) {}
};

template <class S, bool kByTime>
struct Workspace {
  using T = Compute<S>;
  T *A, *carry, *B, *C, *gather_B, *gather_C;  // per thread
  T* parameters;                               // [segment][block][field][lane]
  T *partial_B, *partial_C;                    // [partial][slot][state / kStates][step][kStates]

  static int64_t segments(const Problem& p) { return p.sequences > 0 ? smaller(p.sequences, kMostSegments) : 1; }
  static int64_t tile_values(const Problem& p) { return kTile * p.states; }

  // The pieces of one thread, or those all share (worker < 0).
  static int64_t cut(const Problem& p, char* start, bool shared, Workspace& out) {
    Scratch scratch(start);
    if (shared) {
      out.parameters = scratch.take<T>(segments(p) * p.blocks * Fields(p, kByTime).all * lanes<T>);
      const int64_t partial = p.partials * slots_of(p) * tile_values(p);
      out.partial_B = scratch.take<T>(p.B_by_time ? partial : 0);
      out.partial_C = scratch.take<T>(p.C_by_time ? partial : 0);
    } else {
      const int64_t chunk_values = p.chunk_blocks * p.states * lanes<T>;
      out.A = scratch.take<T>(chunk_values);
      out.carry = scratch.take<T>(chunk_values);
      out.B = scratch.take<T>(CoefficientTile<S, kByTime>::size(p));
      out.C = scratch.take<T>(CoefficientTile<S, kByTime>::size(p));
      out.gather_B = scratch.take<T>(p.B_by_time ? tile_values(p) * lanes<T> : 0);
      out.gather_C = scratch.take<T>(p.C_by_time ? tile_values(p) * lanes<T> : 0);
    }
    return scratch.used;
  }
  static int64_t bytes(const Problem& p, int64_t threads) {
    Workspace none{};
    return cut(p, nullptr, true, none) + threads * cut(p, nullptr, false, none);
  }
  Workspace(const Problem& p, char* start, int64_t worker) : Workspace() {
    const int64_t shared = cut(p, start, true, *this);
    if (worker >= 0) {
      Workspace none{};
      cut(p, start + shared + worker * cut(p, nullptr, false, none), false, *this);
    }
  }
  Workspace() = default;
};

// ------------------------------------------------------------------------------------------------ one unit of work
template <class S, class G, bool kByTime>
void backward_chunk(const rom_scan_backward_args& a, const Problem& p, const Sequence& s, const Chunk& chunk,
                    const Workspace<S, kByTime>& w, Compute<S>* parameters) {
  using T = Compute<S>;
  constexpr int W = lanes<T>;
  constexpr int kWidth = kByTime ? 1 : W;
  const int64_t block_values = p.states * W;
  const Fields fields(p, kByTime);
  const T* grad_final = states_of<T>(a.grad_final_state, p, s.index);
  for (int64_t i = 0; i < chunk.blocks; ++i)
    to_block(p, grad_final, chunk.first_block + i, (T)1, w.carry + i * block_values);
  CoefficientTile<S, kByTime> B(p, p.B, p.B_by_time, w.B), C(p, p.C, p.C_by_time, w.C);
  B.start_chunk(chunk), C.start_chunk(chunk);

  const int64_t tiles = divide_up(s.length, kTile);
  for (int64_t tile_index = tiles - 1; tile_index >= 0; --tile_index) {
    const int64_t first = tile_index * kTile, slot = s.slot + tile_index;
    const int steps = (int)smaller(kTile, s.length - first);
    const TileRows<S, G> rows(a, p, rows_of(s, first, steps));
    const T* checkpoints = (const T*)a.checkpoints.data + (slot * p.blocks + chunk.first_block) * block_values;
    const size_t gather_bytes = sizeof(T) * (size_t)(kTile * block_values);
    Ahead ahead[kAhead];
    if (tile_index > 0) {
      const Rows next = rows_of(s, first - kTile, kTile);
      const int64_t channel = channels_of<T>(p, chunk.first_block).channel, channels = chunk.blocks * W;
      ahead[0].template start<S>(p.u, next, channel, channels);
      ahead[1].template start<S>(p.delta, next, channel, channels);
      ahead[2].template start<G>(a.grad_out, indexed(p, next), channel, channels);
      ahead[3].template start<S>(p.z, indexed(p, next), channel, channels);
    }
    B.start_tile(s, first, steps, chunk.group), C.start_tile(s, first, steps, chunk.group);
    for (int64_t i = 0; i < chunk.blocks; ++i) {
      if (i % p.partial_blocks == 0) {
        if (p.B_by_time) __builtin_memset(w.gather_B, 0, gather_bytes);
        if (p.C_by_time) __builtin_memset(w.gather_C, 0, gather_bytes);
      }
      const Channels c = channels_of<T>(p, chunk.first_block + i);
      T* mine = parameters + i * fields.all * W;
      Step<T> tile[kTile];
      Moment<T> moments[kTile + 1];
      const bool direct = c.count == W && rows.named.k == 1;
      if (!direct) {
        gather<S>(p.delta, rows.plain, c, tile->delta, kStride<T>);
        gather<S>(p.u, rows.plain, c, tile->u, kStride<T>);
        if (p.z.data) gather<S>(p.z, rows.named, c, tile->gate, kStride<T>);
        gather<G>(a.grad_out, rows.named, c, tile->dy, kStride<T>);
      }
      direct ? prepare<S, G, true>(p, rows, c, tile) : prepare<S, G, false>(p, rows, c, tile);
      const Coefficients<T> B_i = B.of_block(i), C_i = C.of_block(i);
      for (int64_t n0 = 0; n0 < p.states; n0 += kStates) {
        const T *A_n = w.A + i * block_values + n0 * W, *B_n = B_i.values + n0 * kWidth,
                *C_n = C_i.values + n0 * kWidth;
        const Gather<T> gather_B = p.B_by_time ? Gather<T>{w.gather_B + n0 * kTile * W, kStates * W}
                                               : Gather<T>{mine + (fields.B + n0) * W, 0};
        const Gather<T> gather_C = p.C_by_time ? Gather<T>{w.gather_C + n0 * kTile * W, kStates * W}
                                               : Gather<T>{mine + (fields.C + n0) * W, 0};
        replay<kByTime>(steps, A_n, checkpoints + i * block_values + n0 * W, B_n, B_i.step, C_n, C_i.step, tile,
                        moments, ahead[n0 / kStates % kAhead]);
        sweep<kByTime>(steps, A_n, w.carry + i * block_values + n0 * W, mine + n0 * W, B_n, B_i.step, C_n, C_i.step,
                       gather_B, gather_C, tile, moments);
      }
      T *grad_D = mine + fields.D * W, *grad_bias = mine + fields.bias * W;
      direct ? finish<S, G, true>(p, rows, c, tile, grad_D, grad_bias)
             : finish<S, G, false>(p, rows, c, tile, grad_D, grad_bias);
      if (!direct) {
        scatter<S>(a.grad_u, rows.plain, c, tile->through_B, kStride<T>);
        scatter<S>(a.grad_delta, rows.plain, c, tile->through_A, kStride<T>);
        if (p.z.data) scatter<S>(a.grad_z, rows.named, c, tile->gate, kStride<T>);
      }
      if ((i + 1) % p.partial_blocks == 0 || i + 1 == chunk.blocks) {
        const int64_t values = w.tile_values(p), partial = partial_of(p, chunk, i);
        const int64_t at = (partial * slots_of(p) + slot) * values;
        if (p.B_by_time) sum_lanes(w.gather_B, values, w.partial_B + at);
        if (p.C_by_time) sum_lanes(w.gather_C, values, w.partial_C + at);
      }
    }
  }
  if (T* grad_initial = states_of<T>(a.grad_initial_state, p, s.index))
    for (int64_t i = 0; i < chunk.blocks; ++i)
      from_block(p, w.carry + i * block_values, chunk.first_block + i, grad_initial);
}

// ------------------------------------------------------------------------------------------------ sums over partials
// rows[0] += rows[1] + ... of `count` values each, `stride` apart, in order.
template <class T>
void add_rows(T* rows, int64_t many, int64_t stride, int64_t count) {
  for (int64_t k = 1; k < many; ++k)
    for (int64_t i = 0; i < count; ++i) rows[i] += rows[k * stride + i];
}

// grad_B or grad_C of one tile: the partials of a group (of all groups, where they share one B) added up.
template <class S>
void reduce_tile(const Problem& p, Compute<S>* partial, const rom_tensor& grad, const Sequence& s, int64_t slot) {
  using T = Compute<S>;
  const int64_t first = (slot - s.slot) * kTile, values = kTile * p.states, groups = grad.size[2];
  const int64_t partials = groups == 1 ? p.partials : p.group_partials, stride = slots_of(p) * values;
  for (int64_t group = 0; group < groups; ++group) {
    T* total = partial + group * partials * stride + slot * values;
    add_rows(total, partials, stride, values);  // none with dim 0: the gradient is zero
    for (int64_t t = 0; t < smaller(kTile, s.length - first); ++t) {
      S* out = row<S>(grad, s.batch, s.begin + first + t) + group * grad.stride[2];
      for (int64_t n = 0; n < p.state; ++n)
        out[n] = narrow<S>(partials ? total[(n / kStates * kTile + t) * kStates + n % kStates] : (T)0);
    }
  }
}

// The sequence whose tiles include `slot`: the last one that starts at or before it.
Sequence sequence_at(const Problem& p, int64_t slot) {
  int64_t low = 0, high = p.sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (sequence_of(p, middle).slot <= slot ? low : high) = middle;
  }
  return sequence_of(p, low);
}

template <class T>
void put_lanes(const rom_tensor& t, Channels c, const T* values) {
  if (t.data) __builtin_memcpy((T*)t.data + c.channel, values, sizeof(T) * (size_t)c.count);
}

template <class S, bool kByTime>
void backward(const rom_scan_backward_args& a) {
  using T = Compute<S>;
  using Space = Workspace<S, kByTime>;
  const Problem p = problem_of<T>(a);
  const Fields fields(p, kByTime);
  char* workspace = (char*)a.workspace.data;
  const int64_t segments = Space::segments(p), record = fields.all * lanes<T>;
  parallel_for(segments * p.chunks, a.launch.threads, [&](int64_t task, int64_t worker) {
    FlushSubnormals flush;
    const Space mine(p, workspace, worker);
    const Chunk chunk = chunk_of(p, task % p.chunks);
    const int64_t segment = task / p.chunks;
    T* parameters = mine.parameters + (segment * p.blocks + chunk.first_block) * record;
    __builtin_memset(parameters, 0, sizeof(T) * (size_t)(chunk.blocks * record));
    for (int64_t i = 0; i < chunk.blocks; ++i)
      to_block(p, (const T*)p.A.data, chunk.first_block + i, (T)1.44269504088896340736,
               mine.A + i * p.states * lanes<T>);
    for (int64_t i = segment * p.sequences / segments; i < (segment + 1) * p.sequences / segments; ++i)
      a.grad_out.dtype == p.u.dtype ? backward_chunk<S, S, kByTime>(a, p, sequence_of(p, i), chunk, mine, parameters)
                                    : backward_chunk<S, T, kByTime>(a, p, sequence_of(p, i), chunk, mine, parameters);
    stream_end();
  });
  const Space shared(p, workspace, -1);
  parallel_for(p.sequences > 0 ? slots_of(p) : 0, a.launch.threads, [&](int64_t slot, int64_t) {
    const Sequence s = sequence_at(p, slot);
    if ((slot - s.slot) * kTile >= s.length) return;
    if (p.B_by_time) reduce_tile<S>(p, shared.partial_B, a.grad_B, s, slot);
    if (p.C_by_time) reduce_tile<S>(p, shared.partial_C, a.grad_C, s, slot);
  });
  parallel_for(p.blocks, a.launch.threads, [&](int64_t block, int64_t) {
    T* total = shared.parameters + block * record;
    add_rows(total, segments, p.blocks * record, record);
    const Channels c = channels_of<T>(p, block);
    from_block(p, total, block, (T*)a.grad_A.data);
    put_lanes(a.grad_D, c, total + fields.D * lanes<T>);
    put_lanes(a.grad_delta_bias, c, total + fields.bias * lanes<T>);
    if (!p.B_by_time) from_block(p, total + fields.B * lanes<T>, block, (T*)a.grad_B.data);
    if (!p.C_by_time) from_block(p, total + fields.C * lanes<T>, block, (T*)a.grad_C.data);
  });
}

}  // namespace

ROM_CPU_WORKSPACE(rom_scan_backward, rom_scan_backward_args) {
  int64_t bytes = 0;
  const bool by_time = a.B.ndim == 4 && a.C.ndim == 4;
  with_storage_type(a.u.dtype, [&]<class S>(Type<S>) {
    const Problem p = problem_of<Compute<S>>(a);
    bytes = by_time ? Workspace<S, true>::bytes(p, a.launch.threads) : Workspace<S, false>::bytes(p, a.launch.threads);
  });
  return bytes;
}

ROM_CPU_KERNEL(rom_scan_backward, rom_scan_backward_args) {
  const bool by_time = a.B.ndim == 4 && a.C.ndim == 4;
  const bool known =
      with_storage_type(a.u.dtype, [&]<class S>(Type<S>) { by_time ? backward<S, true>(a) : backward<S, false>(a); });
  return known ? ROM_OK : rom_fail(ROM_UNSUPPORTED, "dtype %d of u is not supported", a.u.dtype);
}
