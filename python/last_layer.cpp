// SPDX-License-Identifier: Apache-2.0
#include "rom/last_layer.h"

#include "kernels.hpp"

#define ARGS rom_logit_flips_args
ROM_KERNEL_WITH_WORKSPACE(logit_flips, INTEGER(by_image), REAL(scale), REAL(low), REAL(high), REAL(nan_to),
                          TENSOR(logits), TENSOR(labels), TENSOR(loss), TENSOR(counts), TENSOR(workspace));
#undef ARGS

#define ARGS rom_weight_flips_args
ROM_KERNEL_WITH_WORKSPACE(weight_flips, INTEGER(by_input), REAL(scale), REAL(low), REAL(high), REAL(nan_to),
                          TENSOR(weight), TENSOR(features), TENSOR(sums), TENSOR(labels), TENSOR(loss), TENSOR(counts),
                          TENSOR(workspace));
#undef ARGS
