// SPDX-License-Identifier: Apache-2.0
//
// Selective scan, forward. See scan.hpp for the layout. Per block and tile: a prologue over (step, channel) computes
// delta and delta * u; the states advance kStates at a time, held in registers over the whole tile; an epilogue gates
// and stores. The exponential dominates: 6 of the 9 operations per (step, channel, state).
#include "cpu/kernel.hpp"
#include "rom/scan.h"

namespace {
#include "cpu/simd.hpp"
//
#include "cpu/staged.hpp"
//
#include "cpu/scan.hpp"

// One step of a block's tile. `delta_u` holds u until prepare().
template <class T>
struct alignas(64) Step {
  T delta[lanes<T>], delta_u[lanes<T>], y[lanes<T>], z[lanes<T>];
};
template <class T>
constexpr int kStride = sizeof(Step<T>) / sizeof(T);

constexpr int kAhead = 3;  // u, delta, z

template <class S, bool kFull>
void prepare(const Problem& p, int steps, Channels c, const RowStarts<const S>& delta_rows,
             const RowStarts<const S>& u_rows, Step<Compute<S>>* tile) {
  using T = Compute<S>;
  const Vec<T> bias = get_parameter<T>(p.delta_bias, c), D = get_parameter<T>(p.D, c);
  const auto value = [&](const S* row) {
    return kFull ? load(row + c.channel) : load_partial(row + c.channel, c.count);
  };
  for (int t = 0; t < steps; t += kRows) {
    Staged<Vec<T>, kRows> delta;
    ROM_EACH(kRows) delta.v[i] = value(delta_rows.at[t + i]) + bias;
    if (p.softplus) delta = softplus(delta).value;
    ROM_EACH(kRows) {
      const Vec<T> u = value(u_rows.at[t + i]);
      store(tile[t + i].delta, delta.v[i]);
      store(tile[t + i].delta_u, delta.v[i] * u);
      store(tile[t + i].y, D * u);
    }
  }
}

// h = exp2(delta A) h + delta u B;  y += C h, over one tile. A comes multiplied by log2(e).
template <bool kByTime, class T>
void advance(int64_t states, int steps, const T* A, T* h_block, Coefficients<T> B, Coefficients<T> C, Step<T>* tile,
             Ahead* ahead) {
  for (int64_t n0 = 0; n0 < states; n0 += kStates) {
    Staged<Vec<T>, kStates> h, a_log;
    ROM_EACH(kStates) {
      h.v[i] = load(h_block + (n0 + i) * lanes<T>);
      a_log.v[i] = load(A + (n0 + i) * lanes<T>);
    }
    Ahead cursor = ahead[n0 / kStates % kAhead];
    const T* B_t = B.values + n0 * (kByTime ? 1 : lanes<T>);
    const T* C_t = C.values + n0 * (kByTime ? 1 : lanes<T>);
    for (int t = 0; t < steps; ++t, B_t += B.step, C_t += C.step) {
      const Staged<Vec<T>, kStates> a = exp2(a_log * load(tile[t].delta));
      const Vec<T> delta_u = load(tile[t].delta_u);
      ROM_EACH(kStates) h.v[i] = fma(a.v[i], h.v[i], delta_u * coefficient<kByTime>(B_t, i));
      Vec<T> y = load(tile[t].y);
      ROM_EACH(kStates) y = fma(h.v[i], coefficient<kByTime>(C_t, i), y);
      store(tile[t].y, y);
      cursor.step();
    }
    ahead[n0 / kStates % kAhead] = cursor;
    ROM_EACH(kStates) store(h_block + (n0 + i) * lanes<T>, h.v[i]);
  }
}

// out = y SiLU(z), from row to row.
template <class S, class O>
void gate(const Problem& p, int steps, Channels c, const Step<Compute<S>>* tile, const RowStarts<const S>& z_rows,
          const RowStarts<O>& out_rows) {
  using T = Compute<S>;
  for (int t = 0; t < steps; t += kRows) {
    Staged<Vec<T>, kRows> y, z;
    // The tail writes the last row again, with its own value.
    ROM_EACH(kRows) y.v[i] = load(tile[t + i < steps ? t + i : steps - 1].y);
    if (p.z.data) {
      ROM_EACH(kRows) z.v[i] = load(z_rows.at[t + i] + c.channel);
      y = y * (z * sigmoid(z));
    }
    ROM_EACH(kRows) stream(out_rows.at[t + i] + c.channel, y.v[i]);
  }
}
// The same where a step has several rows, or a block is not full.
template <class S, class O>
void gate_gathered(const Problem& p, const rom_tensor& out, const Rows& rows, Channels c, Step<Compute<S>>* tile) {
  using T = Compute<S>;
  if (p.z.data) {
    gather<S>(p.z, rows, c, tile->z, kStride<T>);
    for (int t = 0; t < rows.steps; ++t) {
      const Vec<T> z = load(tile[t].z);
      store(tile[t].y, load(tile[t].y) * (z * sigmoid(z)));
    }
  }
  scatter<O>(out, rows, c, tile->y, kStride<T>);
}

template <class S, bool kByTime>
struct Worker {
  using T = Compute<S>;
  T *A, *h, *B, *C;

  static int64_t bytes(const Problem& p, char* start, Worker* worker) {
    Scratch scratch(start);
    Worker out;
    out.A = scratch.take<T>(p.chunk_blocks * p.states * lanes<T>);
    out.h = scratch.take<T>(p.chunk_blocks * p.states * lanes<T>);
    out.B = scratch.take<T>(CoefficientTile<S, kByTime>::size(p));
    out.C = scratch.take<T>(CoefficientTile<S, kByTime>::size(p));
    if (worker) *worker = out;
    return scratch.used;
  }
};

// O: the storage type of out, S or the compute type.
template <class S, class O, bool kByTime>
void forward_chunk(const rom_scan_forward_args& a, const Problem& p, const Sequence& s, const Chunk& chunk,
                   Worker<S, kByTime> mine) {
  using T = Compute<S>;
  const int64_t block_values = p.states * lanes<T>;
  const T *A = (const T*)p.A.data, *initial = states_of<T>(a.initial_state, p, s.index);
  for (int64_t i = 0; i < chunk.blocks; ++i) {
    to_block(p, A, chunk.first_block + i, (T)1.44269504088896340736, mine.A + i * block_values);
    to_block(p, initial, chunk.first_block + i, (T)1, mine.h + i * block_values);
  }
  CoefficientTile<S, kByTime> B(p, p.B, p.B_by_time, mine.B), C(p, p.C, p.C_by_time, mine.C);
  B.start_chunk(chunk), C.start_chunk(chunk);
  for (int64_t first = 0; first < s.length; first += kTile) {
    const int steps = (int)smaller(kTile, s.length - first);
    const Rows rows = rows_of(s, first, steps);
    if (a.checkpoints.data) {
      T* checkpoint = (T*)a.checkpoints.data + ((s.slot + first / kTile) * p.blocks + chunk.first_block) * block_values;
      __builtin_memcpy(checkpoint, mine.h, sizeof(T) * (size_t)(chunk.blocks * block_values));
    }
    Ahead ahead[kAhead];
    const Rows next = rows_of(s, first + kTile, (int)smaller(kTile, s.length - first - kTile));
    const int64_t channel = channels_of<T>(p, chunk.first_block).channel, channels = chunk.blocks * lanes<T>;
    ahead[0].template start<S>(p.u, next, channel, channels);
    ahead[1].template start<S>(p.delta, next, channel, channels);
    if (next.steps > 0) ahead[2].template start<S>(p.z, indexed(p, next), channel, channels);
    B.start_tile(s, first, steps, chunk.group), C.start_tile(s, first, steps, chunk.group);
    const RowStarts<const S> delta_rows(p.delta, rows), u_rows(p.u, rows), z_rows(p.z, indexed(p, rows));
    const RowStarts<O> out_rows(a.out, indexed(p, rows));
    const bool one_row = indexed(p, rows).k == 1;
    for (int64_t i = 0; i < chunk.blocks; ++i) {
      const Channels c = channels_of<T>(p, chunk.first_block + i);
      const bool full = c.count == lanes<T>;
      Step<T> tile[kTile];
      full ? prepare<S, true>(p, steps, c, delta_rows, u_rows, tile)
           : prepare<S, false>(p, steps, c, delta_rows, u_rows, tile);
      advance<kByTime>(p.states, steps, mine.A + i * block_values, mine.h + i * block_values, B.of_block(i),
                       C.of_block(i), tile, ahead);
      full&& one_row ? gate(p, steps, c, tile, z_rows, out_rows)
                     : gate_gathered<S, O>(p, a.out, indexed(p, rows), c, tile);
    }
  }
  T* final_state = states_of<T>(a.final_state, p, s.index);
  for (int64_t i = 0; i < chunk.blocks; ++i)
    from_block(p, mine.h + i * block_values, chunk.first_block + i, final_state);
}

template <class S, bool kByTime>
void forward(const rom_scan_forward_args& a) {
  using T = Compute<S>;
  const Problem p = problem_of<Compute<S>>(a);
  const int64_t bytes = Worker<S, kByTime>::bytes(p, nullptr, nullptr);
  parallel_for(p.sequences * p.chunks, a.launch.threads, [&](int64_t task, int64_t worker) {
    FlushSubnormals flush;
    Worker<S, kByTime> mine;
    Worker<S, kByTime>::bytes(p, (char*)a.workspace.data + worker * bytes, &mine);
    const Sequence sequence = sequence_of(p, task / p.chunks);
    const Chunk chunk = chunk_of(p, task % p.chunks);
    a.out.dtype == p.u.dtype ? forward_chunk<S, S, kByTime>(a, p, sequence, chunk, mine)
                             : forward_chunk<S, T, kByTime>(a, p, sequence, chunk, mine);
    stream_end();
  });
}

}  // namespace

ROM_CPU_WORKSPACE(rom_scan_forward, rom_scan_forward_args) {
  int64_t bytes = 0;
  const bool by_time = a.B.ndim == 4 && a.C.ndim == 4;
  with_storage_type(a.u.dtype, [&]<class S>(Type<S>) {
    const Problem p = problem_of<Compute<S>>(a);
    bytes = by_time ? Worker<S, true>::bytes(p, nullptr, nullptr) : Worker<S, false>::bytes(p, nullptr, nullptr);
  });
  return bytes * a.launch.threads;
}

ROM_CPU_KERNEL(rom_scan_forward, rom_scan_forward_args) {
  const bool by_time = a.B.ndim == 4 && a.C.ndim == 4;
  const bool known =
      with_storage_type(a.u.dtype, [&]<class S>(Type<S>) { by_time ? forward<S, true>(a) : forward<S, false>(a); });
  return known ? ROM_OK : rom_fail(ROM_UNSUPPORTED, "dtype %d of u is not supported", a.u.dtype);
}
