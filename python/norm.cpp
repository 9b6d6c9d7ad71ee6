// SPDX-License-Identifier: Apache-2.0
#include "rom/norm.h"

#include "kernels.hpp"

#define ARGS rom_norm_forward_args
ROM_KERNEL(norm_forward, TENSOR(x), TENSOR(residual), TENSOR(weight), TENSOR(out), TENSOR(sum), TENSOR(rstd),
           REAL(eps));
#undef ARGS

#define ARGS rom_norm_backward_args
ROM_KERNEL_WITH_WORKSPACE(norm_backward, TENSOR(sum), TENSOR(weight), TENSOR(rstd), TENSOR(grad_out), TENSOR(grad_sum),
                          TENSOR(grad_x), TENSOR(grad_residual), TENSOR(grad_weight), TENSOR(workspace));
#undef ARGS
