// SPDX-License-Identifier: Apache-2.0
#include "rom/orthogonal.h"

#include "kernels.hpp"

#define FORWARD TENSOR(x), TENSOR(signs), TENSOR(q), TENSOR(inverse), TENSOR(workspace)
#define BACKWARD TENSOR(grad), TENSOR(x), TENSOR(signs), TENSOR(inverse), TENSOR(grad_x), TENSOR(workspace)

#define ARGS rom_cayley_forward_args
ROM_KERNEL_WITH_WORKSPACE(cayley_forward, FORWARD);
#undef ARGS

#define ARGS rom_cayley_backward_args
ROM_KERNEL_WITH_WORKSPACE(cayley_backward, BACKWARD);
#undef ARGS

#define ARGS rom_householder_forward_args
ROM_KERNEL_WITH_WORKSPACE(householder_forward, FORWARD);
#undef ARGS

#define ARGS rom_householder_backward_args
ROM_KERNEL_WITH_WORKSPACE(householder_backward, BACKWARD);
#undef ARGS
