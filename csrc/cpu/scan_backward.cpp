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
// dB and dC gather in vectors per chunk, are summed over lanes once per tile and written as one partial per chunk;
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

// Everything that depends on (step, channel) only.
template <class T>
void prepare(const Problem& p, int steps, Channels c, Step<T>* tile) {
  using Rows4 = Staged<Vec<T>, kRows>;
  const Vec<T> bias = get_parameter<T>(p.delta_bias, c), D = get_parameter<T>(p.D, c);
  for (Step<T>* at = tile; at < tile + steps; at += kRows) {
    Rows4 delta;
    ROM_EACH(kRows) delta.v[i] = load(at[i].delta) + bias;
    if (p.softplus) {
      const SoftplusResult<Rows4> both = softplus(delta);
      delta = both.value;
      ROM_EACH(kRows) store(at[i].slope, both.slope.v[i]);
    } else {
      ROM_EACH(kRows) store(at[i].slope, broadcast((T)1));
    }
    ROM_EACH(kRows) {
      const Vec<T> u = load(at[i].u);
      store(at[i].delta, delta.v[i]);
      store(at[i].delta_u, delta.v[i] * u);
      store(at[i].y, D * u);
      store(at[i].through_A, broadcast((T)0));
      store(at[i].through_B, broadcast((T)0));
    }
    if (!p.z.data) continue;
    Rows4 z, dy;
    ROM_EACH(kRows) {
      z.v[i] = load(at[i].gate);
      dy.v[i] = load(at[i].dy);
    }
    const Rows4 sigma = sigmoid(z), silu = z * sigma;
    const Rows4 gate = dy * (sigma + silu - silu * sigma);  // silu' = sigmoid (1 + z (1 - sigmoid))
    dy = dy * silu;
    ROM_EACH(kRows) {
      store(at[i].gate, gate.v[i]);
      store(at[i].dy, dy.v[i]);
    }
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

// du, ddelta, dz in the place of through_B, through_A, gate; adds to the gradients of D and delta_bias. through_A was
// gathered with A log2(e).
template <class T>
void finish(const Problem& p, int steps, Channels c, Step<T>* tile, T* grad_D, T* grad_bias) {
  const Vec<T> D = get_parameter<T>(p.D, c);
  Vec<T> dD = load(grad_D), dbias = load(grad_bias);
  for (Step<T>* at = tile; at < tile + steps; ++at) {
    const Vec<T> u = load(at->u), dy = load(at->dy), through_B = load(at->through_B);
    const Vec<T> through_A = load(at->through_A) * (T)0.693147180559945309417232;
    const Vec<T> ddelta = fma(through_B, u, through_A) * load(at->slope);
    store(at->through_A, ddelta);
    store(at->through_B, fma(dy, D, through_B * load(at->delta)));
    if (p.z.data) store(at->gate, load(at->gate) * load(at->y));
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
  T *partial_B, *partial_C;                    // [chunk][slot][state / kStates][step][kStates]

  static int64_t segments(const Problem& p) { return p.sequences > 0 ? smaller(p.sequences, kMostSegments) : 1; }
  static int64_t tile_values(const Problem& p) { return kTile * p.states; }

  // The pieces of one thread, or those all share (worker < 0).
  static int64_t cut(const Problem& p, char* start, bool shared, Workspace& out) {
    Scratch scratch(start);
    if (shared) {
      out.parameters = scratch.take<T>(segments(p) * p.blocks * Fields(p, kByTime).all * lanes<T>);
      const int64_t partial = p.chunks * slots_of(p) * tile_values(p);
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
template <class S, bool kByTime>
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
    const Rows rows = rows_of(s, first, steps);
    const T* checkpoints = (const T*)a.checkpoints.data + (slot * p.blocks + chunk.first_block) * block_values;
    const size_t gather_bytes = sizeof(T) * (size_t)(kTile * block_values);
    if (p.B_by_time) __builtin_memset(w.gather_B, 0, gather_bytes);
    if (p.C_by_time) __builtin_memset(w.gather_C, 0, gather_bytes);
    Ahead ahead[kAhead];
    if (tile_index > 0) {
      const Rows next = rows_of(s, first - kTile, kTile);
      const int64_t channel = channels_of<T>(p, chunk.first_block).channel, channels = chunk.blocks * W;
      ahead[0].template start<S>(p.u, next, channel, channels);
      ahead[1].template start<S>(p.delta, next, channel, channels);
      if (a.grad_out.dtype == p.u.dtype)
        ahead[2].template start<S>(a.grad_out, indexed(p, next), channel, channels);
      else
        ahead[2].template start<T>(a.grad_out, indexed(p, next), channel, channels);
      ahead[3].template start<S>(p.z, indexed(p, next), channel, channels);
    }
    B.start_tile(s, first, steps, chunk.group), C.start_tile(s, first, steps, chunk.group);
    for (int64_t i = 0; i < chunk.blocks; ++i) {
      const Channels c = channels_of<T>(p, chunk.first_block + i);
      T* mine = parameters + i * fields.all * W;
      Step<T> tile[kTile];
      Moment<T> moments[kTile + 1];
      gather<S>(p.delta, rows, c, tile->delta, kStride<T>);
      gather<S>(p.u, rows, c, tile->u, kStride<T>);
      if (p.z.data) gather<S>(p.z, indexed(p, rows), c, tile->gate, kStride<T>);
      if (a.grad_out.dtype == p.u.dtype)
        gather<S>(a.grad_out, indexed(p, rows), c, tile->dy, kStride<T>);
      else
        gather<T>(a.grad_out, indexed(p, rows), c, tile->dy, kStride<T>);
      prepare(p, steps, c, tile);
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
      finish(p, steps, c, tile, mine + fields.D * W, mine + fields.bias * W);
      scatter<S>(a.grad_u, rows, c, tile->through_B, kStride<T>);
      scatter<S>(a.grad_delta, rows, c, tile->through_A, kStride<T>);
      if (p.z.data) scatter<S>(a.grad_z, indexed(p, rows), c, tile->gate, kStride<T>);
    }
    const int64_t values = w.tile_values(p), at = (chunk.index * slots_of(p) + slot) * values;
    if (p.B_by_time) sum_lanes(w.gather_B, values, w.partial_B + at);
    if (p.C_by_time) sum_lanes(w.gather_C, values, w.partial_C + at);
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

// grad_B or grad_C of one tile: the chunks of a group (of all groups, where they share one B) added up.
template <class S>
void reduce_tile(const Problem& p, Compute<S>* partial, const rom_tensor& grad, const Sequence& s, int64_t slot) {
  using T = Compute<S>;
  const int64_t first = (slot - s.slot) * kTile, values = kTile * p.states, groups = grad.size[2];
  const int64_t chunks = groups == 1 ? p.chunks : p.group_chunks, stride = slots_of(p) * values;
  for (int64_t group = 0; group < groups; ++group) {
    T* total = partial + group * chunks * stride + slot * values;
    add_rows(total, chunks, stride, values);  // none with dim 0: the gradient is zero
    for (int64_t t = 0; t < smaller(kTile, s.length - first); ++t) {
      S* out = row<S>(grad, s.batch, s.begin + first + t) + group * grad.stride[2];
      for (int64_t n = 0; n < p.state; ++n)
        out[n] = narrow<S>(chunks ? total[(n / kStates * kTile + t) * kStates + n % kStates] : (T)0);
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
      backward_chunk<S, kByTime>(a, p, sequence_of(p, i), chunk, mine, parameters);
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
