// SPDX-License-Identifier: Apache-2.0
#include "rom/state_update.h"

#include "kernels.hpp"

#define ARGS rom_state_update_args
ROM_KERNEL(state_update, INTEGER(delta_softplus), TENSOR(state), TENSOR(u), TENSOR(delta), TENSOR(A), TENSOR(B),
           TENSOR(C), TENSOR(D), TENSOR(z), TENSOR(delta_bias), TENSOR(state_indices), TENSOR(out));
#undef ARGS
