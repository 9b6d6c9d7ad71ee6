/* SPDX-License-Identifier: Apache-2.0 */
#ifndef ROM_STATE_UPDATE_H
#define ROM_STATE_UPDATE_H
#include "rom/abi.h"
#ifdef __cplusplus
extern "C" {
#endif

/* The selective scan's decode step, per channel d and state n, for every step in turn:
 *   delta = softplus(delta + delta_bias);   state = exp(delta A) state + delta B u;
 *   out = (sum_n C state + D u) silu(z)
 * state (slots, dim, state) with unit stride along the last, A (dim, state) contiguous: in the compute type (float64
 * for float64, else float32).
 * u, delta, z, out (batch, steps, dim) of one storage type, unit stride along dim.
 * B, C (batch, steps, groups, state) with unit stride along state; group g serves dim / groups channels. Constant over
 * time: stride 0 along batch and steps, one group per channel.
 * D, delta_bias (dim) contiguous; D, z, delta_bias may be absent. B, C, D and delta_bias are in the compute type; on
 * CUDA each may be in u's type as well.
 * state_indices (batch) int32: slot of each row, negative is padding (out is 0, nothing else happens); may be absent.
 */
typedef struct {
  rom_launch launch;
  int64_t delta_softplus;
  rom_tensor state, u, delta, A, B, C, D, z, delta_bias, state_indices;
  rom_tensor out;
} rom_state_update_args;

rom_status rom_state_update_cpu(const rom_state_update_args* args);
/* At most 256 states. An index of no slot: out is NaN, nothing else happens. */
rom_status rom_state_update_cuda(const rom_state_update_args* args);

#ifdef __cplusplus
}
#endif
#endif
