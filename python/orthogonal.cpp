// SPDX-License-Identifier: Apache-2.0
#include "rom/orthogonal.h"

#include "kernels.hpp"

#define ARGS rom_cayley_forward_args
ROM_KERNEL_WITH_WORKSPACE(cayley_forward, TENSOR(x), TENSOR(signs), TENSOR(q), TENSOR(inverse), TENSOR(workspace));
#undef ARGS

#define ARGS rom_cayley_backward_args
ROM_KERNEL_WITH_WORKSPACE(cayley_backward, TENSOR(grad), TENSOR(x), TENSOR(signs), TENSOR(q), TENSOR(inverse),
                          TENSOR(grad_x), TENSOR(workspace));
#undef ARGS

#define ARGS rom_householder_forward_args
ROM_KERNEL_WITH_WORKSPACE(householder_forward, TENSOR(x), TENSOR(signs), TENSOR(q), TENSOR(inverse), TENSOR(workspace));
#undef ARGS

#define ARGS rom_householder_backward_args
ROM_KERNEL_WITH_WORKSPACE(householder_backward, TENSOR(grad), TENSOR(x), TENSOR(signs), TENSOR(inverse), TENSOR(grad_x),
                          TENSOR(workspace));
#undef ARGS
