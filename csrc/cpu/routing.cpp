// SPDX-License-Identifier: Apache-2.0
//
// Router: softmax, top-k and a stable counting sort of the slots by expert. Spans of tokens are independent: each
// writes its histogram; a prefix over spans gives every span its first row per expert; then each places its own slots.
// No atomics, so the order of the rows does not depend on who runs when.
#include "cpu/kernel.hpp"
#include "rom/routing.h"

namespace {
#include "cpu/simd.hpp"

constexpr int64_t kTokensPerTask = 512;  // ~20 us of work at E = 8: well above the cost of waking a thread
constexpr int64_t kTokensAtOnce = 16;    // their probabilities stay in L1

int64_t tasks_of(int64_t tokens) { return (tokens + kTokensPerTask - 1) / kTokensPerTask; }

// f(token) for the tokens of a task.
template <class F>
ROM_INLINE void each_token(int64_t task, int64_t tokens, F f) {
  const int64_t end = (task + 1) * kTokensPerTask;
  for (int64_t t = task * kTokensPerTask; t < (end < tokens ? end : tokens); ++t) f(t);
}
// A strict order in which a NaN is the largest; equal elements keep their places, so ties go to the lower index.
template <class T>
ROM_INLINE bool above(T a, T b) {
  return !(a <= b) && b == b;
}

// Insertion into the sorted list of the best so far: most experts fail the first comparison, so this is one pass over
// the row whatever top_k is.
template <class S>
void select(const S* logits, int64_t experts, int64_t top_k, int32_t* best) {
  for (int64_t j = 0, found = 0; j < experts; ++j) {
    const Compute<S> x = widen(logits[j]);
    if (found == top_k && !above(x, widen(logits[best[top_k - 1]]))) continue;
    int64_t place = found < top_k ? found++ : top_k - 1;
    for (; place > 0 && above(x, widen(logits[best[place - 1]])); --place) best[place] = best[place - 1];
    best[place] = (int32_t)j;
  }
}

// exp over all elements of a few rows at once: experts are few, so vectors along one row would be mostly empty.
template <class T>
void exp_all(T* x, int64_t size) {
  constexpr T lowest = sizeof(T) == 8 ? -708 : -87;  // below it exp is zero in this type, -inf included
  const auto one = [](Vec<T> v) { return v < lowest ? broadcast((T)0) : exp_rounded(at_least(v, lowest)); };
  int64_t i = 0;
  for (; i + lanes<T> <= size; i += lanes<T>) store(x + i, one(load(x + i)));
  if (i < size) store_partial(x + i, one(load_partial(x + i, (int)(size - i))), (int)(size - i));
}

// Tokens [begin, end), a few at a time.
template <class S>
void route_tokens(const rom_route_forward_args& a, int64_t begin, int64_t end, int32_t* histogram) {
  using T = Compute<S>;
  const int64_t experts = a.logits.size[1], top_k = a.indices.size[1];
  T *probs = (T*)a.probs.data, *weights = (T*)a.weights.data;
  int32_t* indices = (int32_t*)a.indices.data;
  for (int64_t t = begin; t < end; ++t) {
    const S* logits = (const S*)a.logits.data + t * experts;
    select(logits, experts, top_k, indices + t * top_k);
    const T largest = widen(logits[indices[t * top_k]]);
    for (int64_t j = 0; j < experts; ++j) probs[t * experts + j] = widen(logits[j]) - largest;
  }
  exp_all(probs + begin * experts, (end - begin) * experts);
  for (int64_t t = begin; t < end; ++t) {
    T *row = probs + t * experts, total = 0, chosen = 0;
    for (int64_t j = 0; j < experts; ++j) total += row[j];
    const T scale = (T)1 / total;
    for (int64_t j = 0; j < experts; ++j) row[j] *= scale;
    for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot) chosen += row[indices[slot]];
    const T factor = (T)a.routed_scale / (a.normalize ? chosen : (T)1);
    for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot) {
      weights[slot] = row[indices[slot]] * factor;
      ++histogram[indices[slot]];
    }
  }
}

// The histograms of all tasks become the first row of each (task, expert).
void first_rows(const rom_route_forward_args& a, int32_t* table, int64_t tasks) {
  const int64_t experts = a.logits.size[1];
  int32_t *counts = (int32_t*)a.counts.data, *offsets = (int32_t*)a.offsets.data, row = 0;
  for (int64_t e = 0; e < experts; ++e) {
    offsets[e] = row;
    for (int64_t task = 0; task < tasks; ++task) {
      int32_t& cell = table[task * experts + e];
      const int32_t here = cell;
      cell = row;
      row += here;
    }
    counts[e] = row - offsets[e];
  }
  offsets[experts] = row;
}

template <class S>
void route(const rom_route_forward_args& a) {
  const int64_t tokens = a.logits.size[0], experts = a.logits.size[1], top_k = a.indices.size[1];
  const int64_t tasks = tasks_of(tokens);
  int32_t* table = (int32_t*)a.workspace.data;
  parallel_for(tasks, a.launch.threads, [&](int64_t task, int64_t) {
    int32_t* histogram = table + task * experts;
    __builtin_memset(histogram, 0, (size_t)experts * sizeof(int32_t));
    const int64_t last = (task + 1) * kTokensPerTask, end = last < tokens ? last : tokens;
    for (int64_t t = task * kTokensPerTask; t < end; t += kTokensAtOnce)
      route_tokens<S>(a, t, t + kTokensAtOnce < end ? t + kTokensAtOnce : end, histogram);
  });
  first_rows(a, table, tasks);
  const int32_t* indices = (const int32_t*)a.indices.data;
  int32_t *perm = (int32_t*)a.perm.data, *inv = (int32_t*)a.inv.data;
  parallel_for(tasks, a.launch.threads, [&](int64_t task, int64_t) {
    int32_t* next = table + task * experts;
    each_token(task, tokens, [&](int64_t t) {
      for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot) {
        const int32_t row = next[indices[slot]]++;
        inv[slot] = row;
        perm[row] = (int32_t)slot;
      }
    });
  });
}

// With g the gradient of the probabilities:  grad_logit_j = P_j (g_j - sum_i g_i P_i).
template <class T>
void backward_token(const rom_route_backward_args& a, int64_t t) {
  const int64_t experts = a.probs.size[1], top_k = a.indices.size[1];
  const T *probs = (const T*)a.probs.data + t * experts, *weights = (const T*)a.weights.data + t * top_k;
  const T* grad_weights = (const T*)a.grad_weights.data + t * top_k;
  const int32_t* indices = (const int32_t*)a.indices.data + t * top_k;
  T* grad = (T*)a.grad_logits.data + t * experts;
  if (a.grad_probs.data)
    __builtin_memcpy(grad, (const T*)a.grad_probs.data + t * experts, (size_t)experts * sizeof(T));
  else
    __builtin_memset(grad, 0, (size_t)experts * sizeof(T));
  T total = 1, dot = 0;  // normalised weights: d(scale p_k / sum p) = (scale dp_k - w_k sum dp) / sum p
  if (a.normalize) {
    total = 0;
    for (int64_t k = 0; k < top_k; ++k) {
      total += probs[indices[k]];
      dot += grad_weights[k] * weights[k];
    }
  }
  for (int64_t k = 0; k < top_k; ++k) grad[indices[k]] += ((T)a.routed_scale * grad_weights[k] - dot) / total;
  T mean = 0;
  for (int64_t j = 0; j < experts; ++j) mean += grad[j] * probs[j];
  for (int64_t j = 0; j < experts; ++j) grad[j] = probs[j] * (grad[j] - mean);
}

}  // namespace

ROM_CPU_WORKSPACE(rom_route_forward, rom_route_forward_args) {
  return tasks_of(a.logits.size[0]) * a.logits.size[1] * (int64_t)sizeof(int32_t);
}

ROM_CPU_KERNEL(rom_route_forward, rom_route_forward_args) {
  const int64_t tokens = a.logits.size[0], top_k = a.indices.size[1];
  if (top_k > 0 && tokens > INT32_MAX / top_k)
    return rom_fail(ROM_BAD_ARGUMENT, "%lld tokens times top_k %lld do not fit int32", (long long)tokens,
                    (long long)top_k);
  const bool known = with_storage_type(a.logits.dtype, [&]<class S>(Type<S>) { route<S>(a); });
  return known ? ROM_OK : rom_fail(ROM_UNSUPPORTED, "dtype %d of the logits", a.logits.dtype);
}

ROM_CPU_KERNEL(rom_route_backward, rom_route_backward_args) {
  const int64_t tokens = a.probs.size[0];
  const bool is_double = a.probs.dtype == ROM_FLOAT64;
  parallel_for(tasks_of(tokens), a.launch.threads, [&](int64_t task, int64_t) {
    each_token(task, tokens,
               [&](int64_t t) { is_double ? backward_token<double>(a, t) : backward_token<float>(a, t); });
  });
  return ROM_OK;
}
