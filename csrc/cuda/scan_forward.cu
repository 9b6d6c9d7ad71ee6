// SPDX-License-Identifier: Apache-2.0
//
// Selective scan, forward: which kernel takes a call.
#include "cuda/scan_forward.cuh"
#include "cuda/scan_forward_plain.cuh"
#include "cuda/scan_forward_split.cuh"

namespace {

constexpr int64_t kEnoughWarps = 1024;  // two per scheduler of an H200; a constant, or devices would differ in bits

// Lanes per channel where channels are few, and the chunks to cut the length into; 1 where that is not done.
constexpr int few_lanes(int state) { return state <= 8 ? 2 : 4; }
int64_t chunks_of_call(const Problem<float>& p) {
  return p.B.by_time && p.C.by_time && p.state <= 16 ? chunks_of(p, few_lanes(p.state)) : 1;
}
template <class K>
void launch_few(const rom_scan_forward_args& a) {
  static_assert(K::kLanes == few_lanes(K::kStates));
  const int64_t chunks = chunks_of_call(problem_of<float>(a));
  chunks > 1 ? launch_split<K>(a, chunks) : launch_tiled<K>(a);
}

// The fewest lanes per channel that give enough warps. One lane per channel only for 16-bit storage: with float32 its
// tiles would fill an SM's shared memory with four warps.
template <class S>
void launch_forward(const rom_scan_forward_args& a) {
  const Problem<float> p = problem_of<float>(a);
  if (!p.B.by_time || !p.C.by_time || p.state > 128) return launch_plain<S>(a);
  const auto enough = [&](int lanes) { return p.sequences * p.dim * lanes >= kEnoughWarps * 32 * kLaneChannels; };
  if constexpr (sizeof(S) == 2)
    if (p.state <= 16 && enough(1))
      return p.state <= 8 ? launch_tiled<Shape<S, 1, 8, 2>>(a) : launch_tiled<Shape<S, 1, 16, 2>>(a);
  if (p.state <= 8) return launch_few<Shape<S, 2, 4, 4>>(a);
  if (p.state <= 16) return enough(2) ? launch_tiled<Shape<S, 2, 8, 4>>(a) : launch_few<Shape<S, 4, 4, 4>>(a);
  if (p.state <= 32) return enough(2) ? launch_tiled<Shape<S, 2, 16, 4>>(a) : launch_tiled<Shape<S, 8, 4, 4>>(a);
  if (p.state <= 64) return launch_tiled<Shape<S, 4, 16, 4>>(a);
  launch_tiled<Shape<S, 8, 16, 4>>(a);
}

template <>
void launch_forward<double>(const rom_scan_forward_args& a) {
  launch_plain<double>(a);
}

}  // namespace

extern "C" int64_t rom_scan_forward_workspace_cuda(const rom_scan_forward_args* args) {
  if (args->u.dtype == ROM_FLOAT64) return 0;
  const Problem<float> p = problem_of<float>(*args);
  return split_floats(p, chunks_of_call(p)) * static_cast<int64_t>(sizeof(float));
}

extern "C" rom_status rom_scan_forward_cuda(const rom_scan_forward_args* args) {
  const rom_scan_forward_args& a = *args;
  const int64_t sequences = a.cu_seqlens.data ? a.cu_seqlens.size[0] - 1 : a.u.size[0];
  if (sequences == 0 || a.u.size[2] == 0) return ROM_OK;
  const bool known = with_storage_type(a.u.dtype, [&]<class S>(Type<S>) { launch_forward<S>(a); });
  if (!known) return rom_fail(ROM_UNSUPPORTED, "dtype %d of u is not supported", a.u.dtype);
  return launch_status("scan_forward");
}
