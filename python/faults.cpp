// SPDX-License-Identifier: Apache-2.0
#include "rom/faults.h"

#include "kernels.hpp"

#define ARGS rom_fault_patch_args
ROM_KERNEL(fault_patch, INTEGER(target), INTEGER(element_bytes), INTEGER(samples), INTEGER(rows), INTEGER(cols),
           INTEGER(ks), INTEGER(sample_stride), INTEGER(row_stride), INTEGER(col_stride), INTEGER(k_stride),
           TENSOR(values), TENSOR(sites), TENSOR(log));
#undef ARGS

#define ARGS rom_fault_accumulate_args
ROM_KERNEL(fault_accumulate, INTEGER(exact), TENSOR(a), TENSOR(b), TENSOR(bias), TENSOR(y), TENSOR(sites),
           TENSOR(outputs), TENSOR(starts), TENSOR(rows), TENSOR(k), TENSOR(weight_starts), TENSOR(weight_k),
           TENSOR(weights), TENSOR(bits));
#undef ARGS
