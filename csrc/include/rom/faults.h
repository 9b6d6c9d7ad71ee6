/* SPDX-License-Identifier: Apache-2.0 */
#ifndef ROM_FAULTS_H
#define ROM_FAULTS_H
#include "rom/abi.h"
#ifdef __cplusplus
extern "C" {
#endif

/* A row of a table of sites, int32 (n, 8), as rom.faults.SITE in Python: bits' = (bits & and_mask) ^ xor_mask in one
 * word of one value. A log is int32 (n, 3): status (0 absent, 1 applied, -1 no such place), old word, new word. */
typedef struct {
  uint32_t sample, row, col, k, and_mask, xor_mask;
  uint16_t target, flags;
  uint32_t fault_id;
} rom_site;

#define ROM_SITE_ALL 0xffffffffu /* sample: every one */

/* Applies the sites of one target to memory, in the table's order. values is flat; its element size is what counts.
 * extent and stride are those of (sample, row, col, k), extent 0 where the target has no such coordinate; without
 * samples the memory is shared and only sites of ROM_SITE_ALL belong to it. */
typedef struct {
  rom_launch launch;
  int64_t target, element_bytes;
  int64_t samples, rows, cols, ks, sample_stride, row_stride, col_stride, k_stride;
  rom_tensor values, sites, log;
} rom_fault_patch_args;

/* Sums again the products of some elements of y (S, H, M, N), contiguous and in place, from a (S, H, M, K), b (S or 1,
 * H, K, N) of any strides, and bias (N) in the accumulator's dtype (may be absent); what happens to the sums is sorted
 * by sum and k. int64: outputs (J) places in y; starts (J + 1) of their events; rows (E) in sites; k (E) products
 * before the event, K + 1: after the bias; weight_starts (J, 2), weight_k (W): weights that are wrong for a sum, their
 * values in weights (W), dtype of b. bits int32 (E, 2): old and new word. exact = 0 adds differences to y instead. */
typedef struct {
  rom_launch launch;
  int64_t exact;
  rom_tensor a, b, bias, y, sites, outputs, starts, rows, k, weight_starts, weight_k, weights, bits;
} rom_fault_accumulate_args;

rom_status rom_fault_patch_cpu(const rom_fault_patch_args* args);
rom_status rom_fault_accumulate_cpu(const rom_fault_accumulate_args* args);
rom_status rom_fault_patch_cuda(const rom_fault_patch_args* args);
rom_status rom_fault_accumulate_cuda(const rom_fault_accumulate_args* args);

#ifdef __cplusplus
}
#endif
#endif
