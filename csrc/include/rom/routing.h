/* SPDX-License-Identifier: Apache-2.0 */
#ifndef ROM_ROUTING_H
#define ROM_ROUTING_H
#include "rom/abi.h"
#ifdef __cplusplus
extern "C" {
#endif

/* T tokens choose top_k of E experts. A slot is token * top_k + choice; a row is its place when the slots are sorted by
 * expert, slots of one expert in order. All tensors are contiguous; integers are int32; weights and probs are in the
 * compute type of logits.
 *
 * probs (T, E) = softmax(logits); indices (T, top_k): the largest logits, ties to the lower index, a NaN above all;
 * weights (T, top_k) = routed_scale * probs at indices, divided by their sum if normalize;
 * counts (E) and offsets (E + 1): slots per expert and its first row; perm (T * top_k): slot of each row;
 * inv (T, top_k): row of each slot. */
typedef struct {
  rom_launch launch;
  int64_t normalize;
  double routed_scale;
  rom_tensor logits;
  rom_tensor indices, weights, counts, offsets, perm, inv, probs;
  rom_tensor workspace;
} rom_route_forward_args;

/* From the gradients of weights and of probs (may be absent) to grad_logits (T, E), all in the compute type. */
typedef struct {
  rom_launch launch;
  int64_t normalize;
  double routed_scale;
  rom_tensor probs, indices, weights, grad_weights, grad_probs;
  rom_tensor grad_logits;
} rom_route_backward_args;

rom_status rom_route_forward_cpu(const rom_route_forward_args* args);
int64_t rom_route_forward_workspace_cpu(const rom_route_forward_args* args);
rom_status rom_route_backward_cpu(const rom_route_backward_args* args);

#ifdef __cplusplus
}
#endif
#endif
