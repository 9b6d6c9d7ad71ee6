/* SPDX-License-Identifier: Apache-2.0 */
#ifndef ROM_CONV_H
#define ROM_CONV_H
#include "rom/abi.h"
#ifdef __cplusplus
extern "C" {
#endif

/* out_t = act(bias + sum_k weight[k] * x_{t - width + 1 + k}), channel by channel, within each sequence.
 *   x (batch, length, dim), or with row_index (batch, length, K) int32 a table of rows: x_t = sum_k x[row_index[b, t,
 * k]] weight (width, dim), bias (dim) or absent: contiguous, in the compute type (float64 for float64, else float32)
 *   initial_state, final_state (sequences, dim, width) or absent: contiguous, compute type, newest input last
 *   cu_seqlens (sequences + 1) int32: boundaries of packed sequences, batch is 1; absent: one sequence per batch row
 * x, out and their gradients have unit stride along dim; out is contiguous. width is 2, 3 or 4. */
typedef struct {
  rom_launch launch;
  int64_t silu;
  rom_tensor x, weight, bias, initial_state, cu_seqlens, row_index;
  rom_tensor out, final_state;
} rom_conv_forward_args;

/* grad_x has x's shape and dtype (each row of a table gets the gradient of its step), the others the compute type.
 * Each row of a table must be named exactly once. grad_final_state and grad_initial_state may be absent. */
typedef struct {
  rom_launch launch;
  int64_t silu;
  rom_tensor x, weight, bias, initial_state, cu_seqlens, row_index;
  rom_tensor grad_out, grad_final_state;
  rom_tensor grad_x, grad_weight, grad_bias, grad_initial_state;
  rom_tensor workspace;
} rom_conv_backward_args;

/* The same on a state kept in place: x and out (batch, steps, dim) with unit stride along dim, conv_state (slots, dim,
 * width) of any strides in x's dtype or the compute type, weight here (dim, width) contiguous. weight and bias are in
 * the compute type; on CUDA each may be in x's type as well.
 * state_indices (batch) int32: slot of each row, negative is padding (out is 0, nothing else happens); may be absent.
 */
typedef struct {
  rom_launch launch;
  int64_t silu;
  rom_tensor x, conv_state, weight, bias, state_indices;
  rom_tensor out;
} rom_conv_update_args;

rom_status rom_conv_forward_cpu(const rom_conv_forward_args* args);
rom_status rom_conv_backward_cpu(const rom_conv_backward_args* args);
int64_t rom_conv_backward_workspace_cpu(const rom_conv_backward_args* args);
rom_status rom_conv_update_cpu(const rom_conv_update_args* args);
/* An index of no slot: out is NaN, nothing else happens. */
rom_status rom_conv_update_cuda(const rom_conv_update_args* args);

#ifdef __cplusplus
}
#endif
#endif
