/* SPDX-License-Identifier: Apache-2.0 */
#ifndef ROM_ORTHOGONAL_H
#define ROM_ORTHOGONAL_H
#include "rom/abi.h"
#ifdef __cplusplus
extern "C" {
#endif

/* Orthogonal maps of a batch of matrices. All tensors are contiguous and of one type, float32 or float64; x, q, grad
 * and grad_x are (batch, n, k) with n >= k, signs (batch, k) of +-1 may be absent, inverse is (batch, k, k): cayley
 * inverse = K^-1, q = [2 K^-1 - I; B K^-1] with K = I - (X1 - X1^T) / 2 + B^T B / 4, X1 without its upper triangle and
 * diagonal. Where |K - I| > 64 (Frobenius), K is inverted with pivoting. householder  inverse = L^-1, q = [I; 0] - V
 * L^-1 V1^T with V = tril(x, -1) + [I; 0] and L = striu(V^T V) + diag(V^T V) / 2. q's columns are multiplied by the
 * signs. The backward kernels take the same inverse. */
#define ROM_ORTHOGONAL_ARGS(map)        \
  typedef struct {                      \
    rom_launch launch;                  \
    rom_tensor x, signs;                \
    rom_tensor q, inverse;              \
    rom_tensor workspace;               \
  } rom_##map##_forward_args;           \
  typedef struct {                      \
    rom_launch launch;                  \
    rom_tensor grad, x, signs, inverse; \
    rom_tensor grad_x;                  \
    rom_tensor workspace;               \
  } rom_##map##_backward_args;

ROM_ORTHOGONAL_ARGS(cayley)
ROM_ORTHOGONAL_ARGS(householder)
#undef ROM_ORTHOGONAL_ARGS

rom_status rom_cayley_forward_cpu(const rom_cayley_forward_args* args);
rom_status rom_cayley_backward_cpu(const rom_cayley_backward_args* args);
rom_status rom_householder_forward_cpu(const rom_householder_forward_args* args);
rom_status rom_householder_backward_cpu(const rom_householder_backward_args* args);
int64_t rom_cayley_forward_workspace_cpu(const rom_cayley_forward_args* args);
int64_t rom_cayley_backward_workspace_cpu(const rom_cayley_backward_args* args);
int64_t rom_householder_forward_workspace_cpu(const rom_householder_forward_args* args);
int64_t rom_householder_backward_workspace_cpu(const rom_householder_backward_args* args);

#ifdef __cplusplus
}
#endif
#endif
