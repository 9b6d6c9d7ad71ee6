/* SPDX-License-Identifier: Apache-2.0 */
#ifndef ROM_LAST_LAYER_H
#define ROM_LAST_LAYER_H
#include "rom/abi.h"
#ifdef __cplusplus
extern "C" {
#endif

/* Flips every bit of every value z of the last layer's output (B, C), one at a time, and sums what that does over the
 * images of a class (by_image = 0) or the classes of an image (1). The logit is t = scale * clamp(z, low, high),
 * rounded to the dtype of z, where a NaN becomes nan_to before it is scaled; scale 1, infinite bounds and a NaN leave
 * z. labels int64 (B); loss float64 (rows, bits): sum of |cross entropy - golden cross entropy| where t is finite;
 * counts int64 (rows, bits, 6): masked, tolerable, sdc, critical, due, top-1 differs. The golden t must be finite. */
typedef struct {
  rom_launch launch;
  int64_t by_image;
  double scale, low, high, nan_to;
  rom_tensor logits, labels, loss, counts, workspace;
} rom_logit_flips_args;

/* The same for every bit of the weights (C, E) of that layer, z = x weight^T + bias: weight (k, e) changes z of class k
 * only, by (w' - w) x_e. features float32 (E, B), sums float32 (B, C): z before it is rounded to weight's dtype. Rows
 * are classes (by_input = 0) or inputs (1). */
typedef struct {
  rom_launch launch;
  int64_t by_input;
  double scale, low, high, nan_to;
  rom_tensor weight, features, sums, labels, loss, counts, workspace;
} rom_weight_flips_args;

rom_status rom_logit_flips_cpu(const rom_logit_flips_args* args);
int64_t rom_logit_flips_workspace_cpu(const rom_logit_flips_args* args);
rom_status rom_logit_flips_cuda(const rom_logit_flips_args* args);
int64_t rom_logit_flips_workspace_cuda(const rom_logit_flips_args* args);
rom_status rom_weight_flips_cpu(const rom_weight_flips_args* args);
int64_t rom_weight_flips_workspace_cpu(const rom_weight_flips_args* args);
rom_status rom_weight_flips_cuda(const rom_weight_flips_args* args);
int64_t rom_weight_flips_workspace_cuda(const rom_weight_flips_args* args);

#ifdef __cplusplus
}
#endif
#endif
