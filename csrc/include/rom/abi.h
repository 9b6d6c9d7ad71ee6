/* SPDX-License-Identifier: Apache-2.0
 *
 * The C ABI shared by every kernel: what a tensor is, how a call answers. Nothing in csrc/ knows torch or Python.
 *
 * The rules every kernel keeps:
 *   - it allocates nothing; scratch memory comes from the caller, its size from `rom_<kernel>_workspace_<device>`;
 *   - it never synchronises a device and never throws across this boundary;
 *   - it answers a status, and `rom_last_error()` says in words what was wrong;
 *   - a tensor whose `data` is null is an argument that was not given.
 */
#ifndef ROM_ABI_H
#define ROM_ABI_H
#include <stdint.h>

/* Raised with every change to a struct or function in this folder. `rom` refuses an extension of another number. */
#define ROM_ABI_VERSION 2
#define ROM_MAX_NDIM 4

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { ROM_OK = 0, ROM_BAD_ARGUMENT = 1, ROM_UNSUPPORTED = 2, ROM_DEVICE_ERROR = 3 } rom_status;

typedef enum {
  ROM_FLOAT32 = 0,
  ROM_BFLOAT16 = 1,
  ROM_FLOAT16 = 2,
  ROM_FLOAT64 = 3,
  ROM_INT32 = 4,
  ROM_INT64 = 5,
  ROM_UINT8 = 6
} rom_dtype;

/* A view of memory the caller owns. Strides count elements. */
typedef struct {
  void* data;
  int64_t size[ROM_MAX_NDIM];
  int64_t stride[ROM_MAX_NDIM];
  int32_t ndim;
  int32_t dtype; /* rom_dtype */
} rom_tensor;

/* How a call runs. CPU kernels read `threads` (at least 1), CUDA kernels read `stream` (a cudaStream_t). */
typedef struct {
  int64_t threads;
  void* stream;
} rom_launch;

/* The calling thread's last failure, in words; empty after a success. */
const char* rom_last_error(void);

/* The instruction set the CPU kernels run on: "base", "avx2" or "avx512". ROM_MAX_CPU_ISA caps it. */
const char* rom_cpu_isa(void);

#ifdef __cplusplus
}
#endif
#endif
