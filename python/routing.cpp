// SPDX-License-Identifier: Apache-2.0
#include "rom/routing.h"

#include "kernels.hpp"

#define ARGS rom_route_forward_args
ROM_KERNEL_WITH_WORKSPACE(route_forward, TENSOR(logits), TENSOR(indices), TENSOR(weights), TENSOR(counts),
                          TENSOR(offsets), TENSOR(perm), TENSOR(inv), TENSOR(probs), INTEGER(normalize),
                          REAL(routed_scale), TENSOR(workspace));
#undef ARGS

#define ARGS rom_route_backward_args
ROM_KERNEL(route_backward, TENSOR(probs), TENSOR(indices), TENSOR(weights), TENSOR(grad_weights), TENSOR(grad_probs),
           TENSOR(grad_logits), INTEGER(normalize), REAL(routed_scale));
#undef ARGS
