// SPDX-License-Identifier: Apache-2.0
//
// The scan's backward pass, the phases that go by rows of memory: prepare() before the recurrence of
// scan_backward_sweep.cuh, finish() and write_rows() after it.
#pragma once
#include "cuda/scan_backward_call.cuh"

namespace {

// ------------------------------------------------------------------------------------------------ patches
// A lane's share of the rows of a tile: four steps of each of four channels.
struct Patch {
  Quad channel[4];
};
struct PatchPlace {
  const Problem<float>& p;
  const Channels& c;
  const Tile& tile;
  PatchLane lane;
  bool whole;  // it lies inside the model and the tile, and memory allows to move four channels at once

  __device__ PatchPlace(const Backward& a, const Channels& c, const Tile& tile) : p(a.problem), c(c), tile(tile) {
    whole = a.aligned && lane.channel + 4 <= c.count && lane.step + 4 <= tile.steps;
  }
};
// One field of a patch's channels in shared memory.
struct PatchField {
  Quad* first;
  template <bool kGeneral>
  __device__ PatchField(Shared<kGeneral>& shared, const PatchLane& lane, StepField field)
      : first(&shared.step[lane.channel][field * kTileQuads + lane.step / 4]) {}
  __device__ __forceinline__ Quad& operator[](int channel) const { return first[channel * kPitch]; }
};

__device__ __forceinline__ void get(const PatchField& field, Patch& to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to.channel[i] = field[i];
}

// f(row, r) for the four rows of a whole patch.
template <class S, class F>
__device__ __forceinline__ void each_row(const PatchPlace& at, const Rows& t, F f) {
  const RowPointers<S> rows(t.data, t.batch, t.step, batch_of(at.p, at.tile), at.tile.begin + at.lane.step,
                            at.c.first + at.lane.channel);
#pragma unroll
  for (int r = 0; r < 4; ++r) f(rows[r], r);
}
// The same where a row_index chooses the rows: for all rows of the four steps.
template <class S, class F>
__device__ __forceinline__ void each_indexed_row(const PatchPlace& at, const Rows& t, F f) {
  const int32_t* number = row_numbers(at.p, from(at.p, at.tile, at.lane.step), 0);
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll 1
    for (int k = 0; k < at.p.rows_per_step; ++k)
      f(row<S>(t, static_cast<int64_t>(*number++)) + (at.c.first + at.lane.channel), r);
}
// f(element, i) for those elements of any patch that exist, i = 4 * channel + step; if `indexed`, for those of all
// rows.
template <class S, class F>
__device__ __forceinline__ void each_element(const PatchPlace& at, const Rows& t, bool indexed, F f) {
#pragma unroll 1
  for (int r = 0; r < 4 && at.lane.step + r < at.tile.steps; ++r) {
    const Sequence s = from(at.p, at.tile, at.lane.step + r);
    const int32_t* numbers = row_numbers(at.p, s, 0);
#pragma unroll 1
    for (int k = 0; k < (indexed ? at.p.rows_per_step : 1); ++k) {
      S* const first = (indexed ? row<S>(t, static_cast<int64_t>(numbers[k])) : row<S>(t, s, 0)) + at.c.first;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (at.lane.channel + i < at.c.count) f(first + at.lane.channel + i, i * 4 + r);
    }
  }
}

template <class S>
__device__ __forceinline__ void load_rows(const PatchPlace& at, const Rows& t, Patch& to) {
  each_row<const S>(at, t, [&](const S* row, int r) {
    float four[4];
    load_four(row, four);
#pragma unroll
    for (int i = 0; i < 4; ++i) to.channel[i].at[r] = four[i];
  });
}
template <class S>
__device__ __forceinline__ void gather_rows(const PatchPlace& at, const Rows& t, Patch& to) {
  to = Patch{};
  each_indexed_row<const S>(at, t, [&](const S* row, int r) {
    float four[4];
    load_four(row, four);
#pragma unroll
    for (int i = 0; i < 4; ++i) to.channel[i].at[r] += four[i];
  });
}
template <class S>
__device__ __forceinline__ void store_rows(const PatchPlace& at, const Rows& t, bool indexed, const PatchField& field) {
  Patch patch;
  get(field, patch);
  const auto store = [&](S* row, int r) {
    const Quad(&c)[4] = patch.channel;
    const float four[4] = {c[0].at[r], c[1].at[r], c[2].at[r], c[3].at[r]};
    store_pack(row, four);
  };
  indexed ? each_indexed_row<S>(at, t, store) : each_row<S>(at, t, store);
}
// The same for any patch, and by way of its field: the sum over a step's rows, zero where nothing is.
template <class S>
__device__ __forceinline__ void load_elements(const PatchPlace& at, const Rows& t, bool indexed,
                                              const PatchField& field, Patch& to) {
#pragma unroll 1
  for (int i = 0; i < 4; ++i) field[i] = Quad{};
  each_element<const S>(at, t, indexed, [&](const S* x, int i) { field[i / 4].at[i % 4] += read(*x); });
  get(field, to);
}
template <class S>
__device__ __forceinline__ void store_elements(const PatchPlace& at, const Rows& t, bool indexed,
                                               const PatchField& field) {
  each_element<S>(at, t, indexed, [&](S* x, int i) { *x = rounded<S>(field[i / 4].at[i % 4]); });
}

// ------------------------------------------------------------------------------------------------ prepare
struct Inputs {
  Patch u, delta, dy, z;
};
template <class S, class G, bool kGeneral>
__device__ __forceinline__ void load_inputs(const Backward& a, const PatchPlace& at, Shared<kGeneral>& shared,
                                            Inputs& to) {
  const bool indexed = at.p.row_index;
  if (at.whole && !indexed) {
    load_rows<S>(at, at.p.u, to.u);
    load_rows<S>(at, at.p.delta, to.delta);
    load_rows<G>(at, a.grad_out, to.dy);
    load_rows<S>(at, a.gate, to.z);
  } else if (at.whole) {
    load_rows<S>(at, at.p.u, to.u);
    load_rows<S>(at, at.p.delta, to.delta);
    gather_rows<G>(at, a.grad_out, to.dy);
    if (at.p.z.data) gather_rows<S>(at, at.p.z, to.z);
  } else {
    const auto field = [&](StepField f) { return PatchField(shared, at.lane, f); };
    load_elements<S>(at, at.p.u, false, field(kU), to.u);
    load_elements<S>(at, at.p.delta, false, field(kDelta), to.delta);
    load_elements<G>(at, a.grad_out, indexed, field(kGradY), to.dy);
    if (at.p.z.data) load_elements<S>(at, at.p.z, indexed, field(kGate), to.z);
  }
}
// What follows from them. kCommon: there are a gate and softplus.
template <bool kCommon, bool kGeneral>
__device__ __forceinline__ void prepare_fields(const PatchPlace& at, Inputs& in, Shared<kGeneral>& shared) {
  const auto field = [&](StepField f) { return PatchField(shared, at.lane, f); };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float bias = shared.step[at.lane.channel + i][kStepFields * kTileQuads].at[kBias];
    const Quad &u = in.u.channel[i], &z = in.z.channel[i];
    Quad &delta = in.delta.channel[i], &dy = in.dy.channel[i], delta_u, slope, gate;
    if (kCommon || at.p.z.data) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float sigma = sigmoid(z.at[r]), silu = z.at[r] * sigma;
        gate.at[r] = dy.at[r] * fmaf(silu, 1.f - sigma, sigma);  // silu' = sigma (1 + z (1 - sigma))
        dy.at[r] *= silu;
      }
      field(kGate)[i] = gate;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) delta.at[r] += bias, slope.at[r] = 1;
    if (kCommon || at.p.softplus) {
#pragma unroll
      for (int r = 0; r < 4; ++r) slope.at[r] = sigmoid(delta.at[r]), delta.at[r] = softplus(delta.at[r]);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) delta_u.at[r] = delta.at[r] * u.at[r];
    field(kDelta)[i] = delta;
    field(kDeltaU)[i] = delta_u;
    field(kGradY)[i] = dy;
    field(kU)[i] = u;
    field(kSlope)[i] = slope;
  }
}
// Everything that depends on (step, channel) only. Beyond the tile's end delta, delta u, dy and softplus' are zero,
// which leaves states, carries and sums as they are.
template <class S, class G, bool kGeneral>
__device__ __forceinline__ void prepare(const Backward& a, const Channels& c, const Tile& tile,
                                        Shared<kGeneral>& shared) {
  const PatchPlace at(a, c, tile);
  Inputs in;
  in.z = Patch{};  // never left from one tile to the next: it would take 16 registers all the while
  load_inputs<S, G>(a, at, shared, in);
  if (at.p.z.data && at.p.softplus)
    prepare_fields<true>(at, in, shared);
  else
    prepare_fields<false>(at, in, shared);
  if (at.whole) return;
#pragma unroll 1
  for (int r = tile.steps > at.lane.step ? tile.steps - at.lane.step : 0; r < 4; ++r)
#pragma unroll 1
    for (int i = 0; i < 4; ++i)
      for (const StepField f : {kDelta, kDeltaU, kGradY, kSlope}) PatchField(shared, at.lane, f)[i].at[r] = 0;
}

// ------------------------------------------------------------------------------------------------ finish
// The sum over the four quads of states.
template <bool kGeneral>
__device__ __forceinline__ Quad add_quads(const Shared<kGeneral>& shared, Sum sum, const SumLane& lane) {
  const auto part = [&](int quad) {
    return shared
        .scratch[sum_row(lane.channel / kStrip, sum, lane.half)][sum_column(lane.warp, lane.channel % kStrip, quad)];
  };
  Quad total = part(0);
#pragma unroll
  for (int quad = 1; quad < 4; ++quad) add(total, part(quad));
  return total;
}
// More than 16 states: adds what earlier launches found for a sum over states, and keeps the result for the next.
__device__ __forceinline__ void add_earlier(const Backward& a, Sum sum, int64_t token, int channel, int left,
                                            Quad& total) {
  float* at = a.through + (sum * a.tokens + token) * a.problem.dim + channel;
#pragma unroll
  for (int r = 0; r < 4; ++r, at += a.problem.dim) {
    if (r >= left) break;
    if (a.first_state > 0) total.at[r] += *at;
    *at = total.at[r];
  }
}

// The gradients of 8 steps of u, delta and z, to the fields.
template <bool kGeneral>
__device__ __forceinline__ void finish(const Backward& a, const Channels& c, const Tile& tile, int part,
                                       Shared<kGeneral>& shared) {
  const SumLane lane;
  Quad S_t = add_quads(shared, kS, lane), E = add_quads(shared, kE, lane), Y = add_quads(shared, kY, lane);
  if constexpr (kGeneral) {
    const int begin = part * kSteps + lane.half * 4, left = lane.in_block() < c.count ? tile.steps - begin : 0;
    if (a.through) {
      const int64_t token = token_of(a.problem, tile, begin);
      add_earlier(a, kS, token, c.first + lane.in_block(), left, S_t);
      add_earlier(a, kE, token, c.first + lane.in_block(), left, E);
      add_earlier(a, kY, token, c.first + lane.in_block(), left, Y);
    }
    if (a.first_state + kStates < a.problem.state) return;
  }
  Quad* const fields = &shared.step[lane.in_block()][part * 2 + lane.half];
  float* const channel = shared.step[lane.in_block()][kStepFields * kTileQuads].at;
  const auto field = [&](StepField f) -> Quad& { return fields[f * kTileQuads]; };
  const Quad delta = field(kDelta), dy = field(kGradY), u = field(kU), slope = field(kSlope), gate = field(kGate);
  const float D = channel[kD];
  Quad du, ddelta, dz;
  float dD, dbias;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    du.at[r] = fmaf(D, dy.at[r], delta.at[r] * S_t.at[r]);
    ddelta.at[r] = fmaf(u.at[r], S_t.at[r], E.at[r] * 0.693147180559945309f) * slope.at[r];  // ln 2: A has log2(e)
    dz.at[r] = fmaf(D, u.at[r], Y.at[r]) * gate.at[r];
    dD = r ? fmaf(dy.at[r], u.at[r], dD) : dy.at[r] * u.at[r];
    dbias = r ? dbias + ddelta.at[r] : ddelta.at[r];
  }
  field(kGradU) = du;
  field(kGradDelta) = ddelta;
  field(kGradZ) = dz;
  dD += __shfl_xor_sync(0xffffffffu, dD, kWarpChannels);
  dbias += __shfl_xor_sync(0xffffffffu, dbias, kWarpChannels);
  if (lane.half == 0) channel[kGradD] += dD, channel[kGradBias] += dbias;
}

// A tile's gradients from the fields to memory.
template <class S, bool kGeneral>
__device__ __forceinline__ void write_rows(const Backward& a, const Channels& c, const Tile& tile,
                                           Shared<kGeneral>& shared) {
  const PatchPlace at(a, c, tile);
  const bool gated = a.problem.z.data, indexed = a.problem.row_index;
  const PatchField du(shared, at.lane, kGradU), ddelta(shared, at.lane, kGradDelta), dz(shared, at.lane, kGradZ);
  if (at.whole) {
    store_rows<S>(at, a.grad_u, false, du);
    store_rows<S>(at, a.grad_delta, false, ddelta);
    if (gated) store_rows<S>(at, a.grad_z, indexed, dz);
  } else {
    store_elements<S>(at, a.grad_u, false, du);
    store_elements<S>(at, a.grad_delta, false, ddelta);
    if (gated) store_elements<S>(at, a.grad_z, indexed, dz);
  }
}

}  // namespace
