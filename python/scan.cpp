// SPDX-License-Identifier: Apache-2.0
#include "rom/scan.h"

#include "kernels.hpp"

#define ARGS rom_scan_forward_args
ROM_KERNEL_WITH_WORKSPACE(scan_forward, INTEGER(delta_softplus), TENSOR(u), TENSOR(delta), TENSOR(A), TENSOR(B),
                          TENSOR(C), TENSOR(D), TENSOR(z), TENSOR(delta_bias), TENSOR(initial_state),
                          TENSOR(cu_seqlens), TENSOR(row_index), TENSOR(out), TENSOR(final_state), TENSOR(checkpoints),
                          TENSOR(workspace));
#undef ARGS

#define ARGS rom_scan_backward_args
ROM_KERNEL_WITH_WORKSPACE(scan_backward, INTEGER(delta_softplus), TENSOR(u), TENSOR(delta), TENSOR(A), TENSOR(B),
                          TENSOR(C), TENSOR(D), TENSOR(z), TENSOR(delta_bias), TENSOR(cu_seqlens), TENSOR(row_index),
                          TENSOR(checkpoints), TENSOR(grad_out), TENSOR(grad_final_state), TENSOR(grad_u),
                          TENSOR(grad_delta), TENSOR(grad_A), TENSOR(grad_B), TENSOR(grad_C), TENSOR(grad_D),
                          TENSOR(grad_z), TENSOR(grad_delta_bias), TENSOR(grad_initial_state), TENSOR(workspace));
#undef ARGS
