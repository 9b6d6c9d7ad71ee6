/* SPDX-License-Identifier: Apache-2.0 */
#ifndef ROM_NORM_H
#define ROM_NORM_H
#include "rom/abi.h"
#ifdef __cplusplus
extern "C" {
#endif

/* sum = x + residual;  rstd = 1 / sqrt(mean(sum^2) + eps);  out = sum * rstd * weight, row by row.
 * All tensors of (rows, dim) have unit stride along dim. rstd is (rows) in the compute type. */
typedef struct {
  rom_launch launch;
  double eps;
  rom_tensor x, residual, weight; /* residual may be absent */
  rom_tensor out, sum, rstd;      /* sum may be absent: then it is x itself (and residual must be absent) */
} rom_norm_forward_args;

/* From grad_out and grad_sum (may be absent) to grad_x (dtype of x), grad_residual (may be absent: same values in the
 * dtype of sum) and grad_weight (compute type). */
typedef struct {
  rom_launch launch;
  rom_tensor sum, weight, rstd, grad_out, grad_sum;
  rom_tensor grad_x, grad_residual, grad_weight;
  rom_tensor workspace;
} rom_norm_backward_args;

rom_status rom_norm_forward_cpu(const rom_norm_forward_args* args);
rom_status rom_norm_backward_cpu(const rom_norm_backward_args* args);
int64_t rom_norm_backward_workspace_cpu(const rom_norm_backward_args* args);
rom_status rom_norm_forward_cuda(const rom_norm_forward_args* args);
rom_status rom_norm_backward_cuda(const rom_norm_backward_args* args);
int64_t rom_norm_backward_workspace_cuda(const rom_norm_backward_args* args);

#ifdef __cplusplus
}
#endif
#endif
