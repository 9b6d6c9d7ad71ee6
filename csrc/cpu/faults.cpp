// SPDX-License-Identifier: Apache-2.0
//
// Fault injection beside the library's GEMM: bits of operands and results, and sums that are wrong on the way. Nothing
// here flushes subnormals: a flipped exponent makes them.
#include "cpu/kernel.hpp"
#include "rom/faults.h"

namespace {
#include "cpu/simd.hpp"

constexpr int64_t kStep = 32;         // products between two places where an accumulator can be named
constexpr int64_t kProducts = 65536;  // per task: about 20 us, well above the cost of waking a thread

// ---------------------------------------------------------------------------------------------- memory
ROM_INLINE uint32_t word_of(const rom_site& site, uint32_t bits) { return (bits & site.and_mask) ^ site.xor_mask; }

ROM_INLINE void write_log(int32_t* log, uint32_t old, uint32_t changed) {
  log[0] = 1;
  log[1] = (int32_t)old;
  log[2] = (int32_t)changed;
}

// W: uint32_t, uint16_t or uint8_t; a 64-bit value is two words.
template <class W>
void patch(const rom_fault_patch_args& a) {
  const rom_site* sites = (const rom_site*)a.sites.data;
  const int64_t words = a.element_bytes / (int64_t)sizeof(W);
  for (int64_t i = 0; i < a.sites.size[0]; ++i) {
    const rom_site& site = sites[i];
    int32_t* log = (int32_t*)a.log.data + 3 * i;
    const bool everywhere = site.sample == ROM_SITE_ALL;
    if (site.target != a.target || (a.samples == 0 && !everywhere)) continue;
    if ((a.rows && site.row >= a.rows) || (a.cols && site.col >= a.cols) || (a.ks && site.k >= a.ks) ||
        (site.flags && words == 1)) {
      log[0] = -1;
      continue;
    }
    const int64_t place = site.row * a.row_stride + site.col * a.col_stride + site.k * a.k_stride;
    const int64_t first = everywhere ? 0 : site.sample, end = everywhere ? (a.samples ? a.samples : 1) : first + 1;
    for (int64_t s = first; s < end && s < (a.samples ? a.samples : 1); ++s) {
      W* word = (W*)a.values.data + (place + s * a.sample_stride) * words + (site.flags ? 1 : 0);
      const W old = *word;
      *word = (W)word_of(site, old);
      if (s == first) write_log(log, old, *word);
    }
  }
}

// ---------------------------------------------------------------------------------------------- sums
template <class T>
T changed_word(const rom_site& site, T value, int32_t* bits) {
  uint32_t words[2] = {};
  memcpy(words, &value, sizeof(T));
  uint32_t& word = words[sizeof(T) == 8 && site.flags];
  bits[0] = (int32_t)word;
  word = word_of(site, word);
  bits[1] = (int32_t)word;
  memcpy(&value, words, sizeof(T));
  return value;
}

// The operands of one sum. Weights that are wrong for it are ascending in k.
template <class S>
struct Sum {
  using T = Compute<S>;
  const S *left, *right;
  int64_t left_stride, right_stride;
  const int64_t *weight_k, *weights_end;
  const S* weights;

  // Products [from, to), added to total in steps of kStep so that every kernel names the same sums.
  T add(T total, int64_t from, int64_t to) {
    for (int64_t begin = from; begin < to; begin += kStep) {
      const int64_t end = begin + kStep < to ? begin + kStep : to;
      T part = 0;
      for (int64_t k = begin; k < end; ++k) part += (T)widen(left[k * left_stride]) * weight(k);
      total += part;
    }
    return total;
  }
  T weight(int64_t k) {
    T value = (T)widen(right[k * right_stride]);
    for (; weight_k != weights_end && *weight_k == k; ++weight_k, ++weights) value = (T)widen(*weights);
    return value;
  }
  // What the wrong weights from here to `to` add to the sum.
  T difference(int64_t to) {
    T total = 0;
    for (; weight_k != weights_end && *weight_k < to; ++weight_k, ++weights)
      total +=
          ((T)widen(*weights) - (T)widen(right[*weight_k * right_stride])) * (T)widen(left[*weight_k * left_stride]);
    return total;
  }
};

template <class S>
void one_sum(const rom_fault_accumulate_args& a, int64_t j) {
  using T = Compute<S>;
  const int64_t heads = a.a.size[1], rows = a.a.size[2], k_size = a.a.size[3], cols = a.y.size[3];
  const int64_t place = ((const int64_t*)a.outputs.data)[j], n = place % cols, m = place / cols % rows;
  const int64_t h = place / (cols * rows) % heads, s = place / (cols * rows * heads);
  const int64_t *starts = (const int64_t*)a.starts.data + j, *range = (const int64_t*)a.weight_starts.data + 2 * j;
  const int64_t* weight_k = (const int64_t*)a.weight_k.data;
  Sum<S> sum{(const S*)a.a.data + s * a.a.stride[0] + h * a.a.stride[1] + m * a.a.stride[2],
             (const S*)a.b.data + (a.b.size[0] > 1 ? s : 0) * a.b.stride[0] + h * a.b.stride[1] + n * a.b.stride[3],
             a.a.stride[3],
             a.b.stride[2],
             weight_k + range[0],
             weight_k + range[1],
             (const S*)a.weights.data + range[0]};
  const T offset = a.bias.data ? ((const T*)a.bias.data)[n] : (T)0;
  S* y = (S*)a.y.data + place;
  bool changed = range[1] > range[0];
  T total = 0, shift = 0;  // the sum so far; what all events make it differ by, where that is enough
  int64_t done = 0;
  if (!a.exact) shift = Sum<S>(sum).difference(k_size);
  for (int64_t e = starts[0]; e < starts[1]; ++e) {
    const int64_t k = ((const int64_t*)a.k.data)[e];
    if (k <= k_size)
      total = sum.add(total, done, k);
    else if (done <= k_size)
      total = a.exact ? sum.add(total, done, k_size) + offset : (T)widen(*y) + shift;
    done = k;
    int32_t* bits = (int32_t*)a.bits.data + 2 * e;
    const T before = total;
    total = changed_word(((const rom_site*)a.sites.data)[((const int64_t*)a.rows.data)[e]], total, bits);
    shift += total - before;
    changed |= bits[0] != bits[1];
  }
  if (!changed) return;
  if (done <= k_size) total = a.exact ? sum.add(total, done, k_size) + offset : (T)widen(*y) + shift;
  *y = narrow<S>(total);
}

}  // namespace

ROM_CPU_KERNEL(rom_fault_patch, rom_fault_patch_args) {
  switch (a.element_bytes) {
    case 8:
    case 4: patch<uint32_t>(a); return ROM_OK;
    case 2: patch<uint16_t>(a); return ROM_OK;
    case 1: patch<uint8_t>(a); return ROM_OK;
    default: return rom_fail(ROM_UNSUPPORTED, "values of %lld bytes", (long long)a.element_bytes);
  }
}

ROM_CPU_KERNEL(rom_fault_accumulate, rom_fault_accumulate_args) {
  const int64_t sums = a.outputs.size[0], k_size = a.a.size[3] > 0 ? a.a.size[3] : 1;
  const int64_t per_task = 1 + kProducts / k_size, tasks = (sums + per_task - 1) / per_task;
  const bool known = with_storage_type(a.a.dtype, [&]<class S>(Type<S>) {
    parallel_for(tasks, a.launch.threads, [&](int64_t task, int64_t) {
      const int64_t end = (task + 1) * per_task;
      for (int64_t j = task * per_task; j < (end < sums ? end : sums); ++j) one_sum<S>(a, j);
    });
  });
  return known ? ROM_OK : rom_fail(ROM_UNSUPPORTED, "dtype %d of a", a.a.dtype);
}
