// SPDX-License-Identifier: Apache-2.0
//
// Selective scan, backward: launches of scan_backward.cuh's kernel, one per 16 states, and the sums over its partials.
//
// Two kinds of partials, both in the workspace and both added in index order by sum_parts: of dB and dC, one per block
// of channels; of the parameters' gradients, one per segment of the sequences. Neither depends on the device, nor the
// grid on what cu_seqlens says, so a call can be captured in a CUDA graph.
#include "cuda/scan_backward.cuh"

namespace {

// Blocks along the sequences, each with a partial of 72 bytes per channel: enough to fill a GPU from 64 channels on.
constexpr int64_t kMostSegments = 256;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ------------------------------------------------------------------------------------------------ sums over partials
// out[group][row][i] = sum over k of in[group * group_parts + k][row][i] for i < width.
struct Sums {
  const float* in;
  int64_t part_stride, row_stride, group_parts, parts;  // parts of one group; its first is group * group_parts
  rom_tensor out;
  int64_t out_row, out_group, out_offset;
  int64_t rows, width;
};
template <class S>
__global__ void __launch_bounds__(256) sum_parts(const Sums a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, row = i / a.width, column = i % a.width;
  if (row >= a.rows) return;
  const float* in = a.in + blockIdx.y * a.group_parts * a.part_stride + row * a.row_stride + column;
  float total = 0;
#pragma unroll 8
  for (int64_t k = 0; k < a.parts; ++k) total += in[k * a.part_stride];
  static_cast<S*>(a.out.data)[row * a.out_row + blockIdx.y * a.out_group + a.out_offset + column] = rounded<S>(total);
}
template <class S>
void launch_sums(const Sums& s, int64_t groups, void* stream) {
  const int64_t blocks = divide_up(s.rows * s.width, 256);
  if (blocks > 0 && groups > 0 && s.out.data)
    ROM_LAUNCH(sum_parts<S>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups)), 256, 0, stream, s);
}

bool general(const Problem<float>& p) { return !p.B.by_time || !p.C.by_time || p.state > kStates; }

// ------------------------------------------------------------------------------------------------ workspace
// Pieces of the workspace in floats; with a null start they only count.
struct Workspace {
  int64_t used = 0;
  float* start;
  explicit Workspace(void* memory) : start(static_cast<float*>(memory)) {}
  float* take(int64_t count) {
    float* const out = start ? start + used : nullptr;
    used += divide_up(count, 4) * 4;  // 16 bytes
    return out;
  }
};

// Whether the kernel may move `lanes` neighbours of every row at once, by RowPointers.
bool in_packs(const rom_tensor& t, int64_t lanes) {
  const int64_t most = int64_t(1) << 32;
  for (int i = 0; t.data && i + 1 < t.ndim; ++i)
    if (t.size[i] > 1 && (t.stride[i] >= most || t.size[i] * 8 >= most)) return false;
  return rows_aligned(t, lanes);
}

// What a call launches: all but first_state, and how it cuts the workspace.
Backward backward_of(const rom_scan_backward_args& args, Workspace& workspace) {
  Backward a{};
  a.problem = problem_of<float>(args);
  const Problem<float>& p = a.problem;
  a.checkpoints = static_cast<float*>(args.checkpoints.data);
  a.grad_final_state = static_cast<const float*>(args.grad_final_state.data);
  a.grad_out = rows_of(args.grad_out);
  a.grad_u = rows_of(args.grad_u), a.grad_delta = rows_of(args.grad_delta), a.grad_z = rows_of(args.grad_z);
  a.grad_initial_state = static_cast<float*>(args.grad_initial_state.data);
  a.gate = p.z.data && !p.row_index ? p.z : p.u;
  a.aligned = p.group_dim % 4 == 0;
  for (const rom_tensor* t :
       {&args.u, &args.delta, &args.z, &args.grad_out, &args.grad_u, &args.grad_delta, &args.grad_z})
    a.aligned = a.aligned && in_packs(*t, 4);
  const int64_t lanes = args.u.dtype == ROM_FLOAT32 ? 4 : 8;
  a.coefficients_aligned = p.state % lanes == 0 && in_packs(args.B, lanes) && in_packs(args.C, lanes);
  a.segments = static_cast<int>(smaller(p.sequences, kMostSegments));
  a.group_blocks = static_cast<int>(divide_up(p.group_dim, kChannels));
  a.tokens = args.u.size[0] * p.length;
  if (p.B.by_time || p.C.by_time) a.coefficients = workspace.take(p.groups * a.group_blocks * a.tokens * 2 * kStates);
  a.parameters = workspace.take(a.segments * Parameters(p.dim, general(p)).size);
  if (p.state > kStates) a.through = workspace.take(kSums * a.tokens * p.dim);
  return a;
}

// ------------------------------------------------------------------------------------------------ one call
// grad_B or grad_C of this launch's states; `offset` of their partials, for dC 16 behind dB.
template <class S>
void sum_coefficient(const Backward& a, const Coefficient& source, const rom_tensor& grad, int64_t by_time_offset,
                     int64_t constant_offset, void* stream) {
  const Problem<float>& p = a.problem;
  const int64_t width = smaller(kStates, p.state - a.first_state);
  if (!source.by_time) {
    const Sums sums{a.parameters + constant_offset,
                    Parameters(p.dim, general(p)).size,
                    kStates,
                    0,
                    a.segments,
                    grad,
                    p.state,
                    0,
                    a.first_state,
                    p.dim,
                    width};
    return launch_sums<float>(sums, 1, stream);
  }
  const int64_t groups = grad.size[2], blocks = p.groups / groups * a.group_blocks;  // one group: all add to it
  const Sums sums{a.coefficients + by_time_offset,
                  a.tokens * 2 * kStates,
                  2 * kStates,
                  blocks,
                  p.dim ? blocks : 0,
                  grad,
                  groups * p.state,
                  p.state,
                  a.first_state,
                  a.tokens,
                  width};
  launch_sums<S>(sums, groups, stream);
}

template <class S, class G, bool kGeneral>
rom_status launch(const rom_scan_backward_args& args, const Backward& a) {
  const Problem<float>& p = a.problem;
  void* const stream = args.launch.stream;
  const dim3 grid(static_cast<unsigned>(p.groups * a.group_blocks), static_cast<unsigned>(a.segments));
  allow_shared(scan_backward<S, G, kGeneral>, sizeof(Shared<kGeneral>));
  if (cudaGetLastError() != cudaSuccess)
    return rom_fail(ROM_UNSUPPORTED, "scan_backward: a block needs %d KiB of shared memory, more than this GPU has",
                    static_cast<int>(sizeof(Shared<kGeneral>) / 1024));
  if (grid.x > 0 && grid.y > 0)
    ROM_LAUNCH((scan_backward<S, G, kGeneral>), grid, kThreads, sizeof(Shared<kGeneral>), stream, a);
  const Parameters at(p.dim, kGeneral);
  sum_coefficient<S>(a, p.B, args.grad_B, 0, at.B, stream);
  sum_coefficient<S>(a, p.C, args.grad_C, kStates, at.C, stream);
  const int64_t width = smaller(kStates, p.state - a.first_state);
  launch_sums<float>(
      {a.parameters, at.size, kStates, 0, a.segments, args.grad_A, p.state, 0, a.first_state, p.dim, width}, 1, stream);
  if (a.first_state + kStates < p.state) return launch_status("scan_backward");
  launch_sums<float>({a.parameters + at.D, at.size, 1, 0, a.segments, args.grad_D, 1, 0, 0, p.dim, 1}, 1, stream);
  launch_sums<float>({a.parameters + at.delta_bias, at.size, 1, 0, a.segments, args.grad_delta_bias, 1, 0, 0, p.dim, 1},
                     1, stream);
  return launch_status("scan_backward");
}

template <class S, class G>
rom_status backward(const rom_scan_backward_args& args) {
  Workspace workspace(args.workspace.data);
  Backward a = backward_of(args, workspace);
  rom_status status = ROM_OK;
  for (; a.first_state < a.problem.state && status == ROM_OK; a.first_state += kStates)
    status = general(a.problem) ? launch<S, G, true>(args, a) : launch<S, G, false>(args, a);
  return status;
}

}  // namespace

extern "C" int64_t rom_scan_backward_workspace_cuda(const rom_scan_backward_args* args) {
  Workspace none(nullptr);
  backward_of(*args, none);
  return none.used * static_cast<int64_t>(sizeof(float));
}

extern "C" rom_status rom_scan_backward_cuda(const rom_scan_backward_args* args) {
  const int u = args->u.dtype, out = args->grad_out.dtype;
  if (u == ROM_FLOAT32 && out == u) return backward<float, float>(*args);
  if (u == ROM_BFLOAT16 && out == u) return backward<bfloat16, bfloat16>(*args);
  if (u == ROM_BFLOAT16 && out == ROM_FLOAT32) return backward<bfloat16, float>(*args);
  if (u == ROM_FLOAT16 && out == u) return backward<float16, float16>(*args);
  if (u == ROM_FLOAT16 && out == ROM_FLOAT32) return backward<float16, float>(*args);
  return rom_fail(ROM_UNSUPPORTED, "dtypes %d (u) and %d (grad_out) are not supported together", u, out);
}
