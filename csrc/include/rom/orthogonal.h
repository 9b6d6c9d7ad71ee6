/* SPDX-License-Identifier: Apache-2.0 */
#ifndef ROM_ORTHOGONAL_H
#define ROM_ORTHOGONAL_H
#include "rom/abi.h"
#ifdef __cplusplus
extern "C" {
#endif

/* Orthogonal maps of a batch of matrices. All tensors are contiguous and of one type, float32 or float64; x, q, grad
 * and grad_x are (batch, n, k) with n >= k, signs (batch, k) of +-1 may be absent; q's columns are multiplied by them.
 * The CUDA kernels take up to 128 columns (64 in float64), x, q, grad, grad_x and signs also in bfloat16 and float16,
 * each in its own type, and the rows of signs at any stride; of a sign they read only whether it is negative.
 *
 * cayley  q = [2 R - I; B R] with R = K^-1, K = I - (X1 - X1^T) / 2 + B^T B / 4, x = [X1; B], X1 without its upper
 * triangle and diagonal. Where |K - I| > 64 (Frobenius), K is inverted with pivoting. The backward kernel finds
 * R = (Q1 + I) / 2 in the q of the forward, signs included; where the trace of that is below k / 64, the rounding of Q1
 * would show, and R is computed from x again. CUDA: pivoting, and a Newton step, from 8 on; inverse (batch, k, k) is R,
 * in float32 or float64, and what the backward kernel reads instead of q. The CPU kernels do not look at inverse.
 *
 * householder  q = [I; 0] - V L^-1 V1^T with V = tril(x, -1) + [I; 0] and L = striu(V^T V) + diag(V^T V) / 2. inverse
 * (batch, k, k) is L^-1, for the backward kernel. */
typedef struct {
  rom_launch launch;
  rom_tensor x, signs;
  rom_tensor q, inverse;
  rom_tensor workspace;
} rom_cayley_forward_args;

typedef struct {
  rom_launch launch;
  rom_tensor grad, x, signs, q, inverse;
  rom_tensor grad_x;
  rom_tensor workspace;
} rom_cayley_backward_args;

typedef struct {
  rom_launch launch;
  rom_tensor x, signs;
  rom_tensor q, inverse;
  rom_tensor workspace;
} rom_householder_forward_args;

typedef struct {
  rom_launch launch;
  rom_tensor grad, x, signs, inverse;
  rom_tensor grad_x;
  rom_tensor workspace;
} rom_householder_backward_args;

rom_status rom_cayley_forward_cpu(const rom_cayley_forward_args* args);
rom_status rom_cayley_backward_cpu(const rom_cayley_backward_args* args);
rom_status rom_householder_forward_cpu(const rom_householder_forward_args* args);
rom_status rom_householder_backward_cpu(const rom_householder_backward_args* args);
int64_t rom_cayley_forward_workspace_cpu(const rom_cayley_forward_args* args);
int64_t rom_cayley_backward_workspace_cpu(const rom_cayley_backward_args* args);
int64_t rom_householder_forward_workspace_cpu(const rom_householder_forward_args* args);
int64_t rom_householder_backward_workspace_cpu(const rom_householder_backward_args* args);

rom_status rom_cayley_forward_cuda(const rom_cayley_forward_args* args);
rom_status rom_cayley_backward_cuda(const rom_cayley_backward_args* args);
rom_status rom_householder_forward_cuda(const rom_householder_forward_args* args);
rom_status rom_householder_backward_cuda(const rom_householder_backward_args* args);
int64_t rom_cayley_forward_workspace_cuda(const rom_cayley_forward_args* args);
int64_t rom_cayley_backward_workspace_cuda(const rom_cayley_backward_args* args);
int64_t rom_householder_forward_workspace_cuda(const rom_householder_forward_args* args);
int64_t rom_householder_backward_workspace_cuda(const rom_householder_backward_args* args);

#ifdef __cplusplus
}
#endif
#endif
