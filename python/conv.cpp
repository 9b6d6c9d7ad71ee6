// SPDX-License-Identifier: Apache-2.0
#include "rom/conv.h"

#include "kernels.hpp"

#define ARGS rom_conv_forward_args
ROM_KERNEL(conv_forward, INTEGER(silu), TENSOR(x), TENSOR(weight), TENSOR(bias), TENSOR(initial_state),
           TENSOR(cu_seqlens), TENSOR(row_index), TENSOR(out), TENSOR(final_state));
#undef ARGS

#define ARGS rom_conv_backward_args
ROM_KERNEL_WITH_WORKSPACE(conv_backward, INTEGER(silu), TENSOR(x), TENSOR(weight), TENSOR(bias), TENSOR(initial_state),
                          TENSOR(cu_seqlens), TENSOR(row_index), TENSOR(grad_out), TENSOR(grad_final_state),
                          TENSOR(grad_x), TENSOR(grad_weight), TENSOR(grad_bias), TENSOR(grad_initial_state),
                          TENSOR(workspace));
#undef ARGS

#define ARGS rom_conv_update_args
ROM_KERNEL(conv_update, INTEGER(silu), TENSOR(x), TENSOR(conv_state), TENSOR(weight), TENSOR(bias),
           TENSOR(state_indices), TENSOR(out));
#undef ARGS
