/* SPDX-License-Identifier: Apache-2.0 */
#ifndef ROM_SCAN_H
#define ROM_SCAN_H
#include "rom/abi.h"
#ifdef __cplusplus
extern "C" {
#endif

/* Time steps between two state checkpoints. A sequence of n steps has ceil(n / ROM_SCAN_TILE) of them. */
#define ROM_SCAN_TILE 32

/* delta' = softplus(delta + delta_bias);  h = exp(delta' A) h + delta' u B;  out = (sum_n C h + D u) * silu(z).
 *
 * u, delta (batch, length, dim) and z: one floating dtype, unit stride along dim, any other strides.
 * B, C (batch, length, groups, state) in the dtype of u, unit stride along state; or (dim, state) like A.
 * A (dim, state), D, delta_bias (dim): compute type (float32; float64 for float64), contiguous. D, z, delta_bias may be
 * absent. States (sequences, dim, state) are contiguous, compute type; initial_state may be absent.
 * cu_seqlens int32 (sequences + 1), or absent: then sequences is batch.
 * row_index int32 (batch * length, K), or absent: z and out are (rows, dim), step t reads the sum of K rows of z and
 * writes its output to these rows. Otherwise they are (batch, length, dim). out has u's dtype or the compute type.
 * checkpoints, absent unless a backward pass follows: rom_scan_checkpoints(...) values of the compute type. */
typedef struct {
  rom_launch launch;
  int64_t delta_softplus;
  rom_tensor u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, row_index;
  rom_tensor out, final_state, checkpoints;
  rom_tensor workspace;
} rom_scan_forward_args;

/* Inputs as above. grad_out is laid out like out (any strides but along dim), grad_final_state may be absent.
 * Outputs are contiguous: grad_u, grad_delta, grad_z (absent with z) in u's dtype; grad_B and grad_C in the dtype of B
 * and C; grad_A, grad_D, grad_delta_bias (absent with D, delta_bias) and grad_initial_state (may be absent) in the
 * compute type. */
typedef struct {
  rom_launch launch;
  int64_t delta_softplus;
  rom_tensor u, delta, A, B, C, D, z, delta_bias, cu_seqlens, row_index, checkpoints;
  rom_tensor grad_out, grad_final_state;
  rom_tensor grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_delta_bias, grad_initial_state;
  rom_tensor workspace;
} rom_scan_backward_args;

rom_status rom_scan_forward_cpu(const rom_scan_forward_args* args);
int64_t rom_scan_forward_workspace_cpu(const rom_scan_forward_args* args);
rom_status rom_scan_backward_cpu(const rom_scan_backward_args* args);
int64_t rom_scan_backward_workspace_cpu(const rom_scan_backward_args* args);
rom_status rom_scan_forward_cuda(const rom_scan_forward_args* args);
int64_t rom_scan_forward_workspace_cuda(const rom_scan_forward_args* args);
rom_status rom_scan_backward_cuda(const rom_scan_backward_args* args);
int64_t rom_scan_backward_workspace_cuda(const rom_scan_backward_args* args);

#ifdef __cplusplus
}
#endif
#endif
