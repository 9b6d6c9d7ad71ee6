// SPDX-License-Identifier: Apache-2.0
//
// From contiguous batches of matrices to the buffers of dense.hpp and back. A "group" is what one set of buffers holds:
// one matrix for rows, as many as a vector has lanes for lanes. Include after dense.hpp.

// Hands out parts of a workspace; without memory it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class E>
  E* take(int64_t count) {
    used = (used + 63) & ~(int64_t)63;
    E* at = (E*)(base + used);
    used += count * (int64_t)sizeof(E);
    return at;
  }
};
ROM_INLINE char* aligned(void* p) { return (char*)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

template <class E>
constexpr int group_size = (int)sizeof(E) / (int)sizeof(ScalarOfElement<E>);

// ------------------------------------------------------------------------------------------------ load and store
// The matrices of a group lie one after the other, but its transposes read from all of them at once: too many streams
// for the hardware to fetch ahead (half the time of the whole map at 1024 x 16 x 16).
template <int Write, class T>
ROM_INLINE void fetch_ahead(const T* p, int64_t size) {
  for (int64_t e = 0; e < size; e += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + e, Write);
}

// `count` matrices (rows x columns, `stride` elements apart) from `from` on into one group. Missing ones are zero.
template <class T>
void load_group(const T* from, int64_t, int64_t, int64_t rows, int64_t columns, T* to) {
  const int64_t ld = leading<T>(columns);
  if (ld == columns) {
    __builtin_memcpy(to, from, (size_t)(rows * ld) * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = columns / lanes<T> * lanes<T>; c < ld; c += lanes<T>) store(to + i * ld + c, Vec<T>{});
    each_vector<T>(0, columns,
                   [&](int64_t c, auto whole) { store(to + i * ld + c, get(from + i * columns + c, whole)); });
  }
}
template <class T>
void load_group(const T* from, int64_t stride, int64_t count, int64_t rows, int64_t columns, Vec<T>* to) {
  constexpr int L = lanes<T>;
  fetch_ahead<0>(from, count * stride);
  each_vector<T>(0, rows * columns, [&](int64_t e, auto whole) {
    Vec<T> v[L];
    ROM_UNROLL
    for (int i = 0; i < L; ++i) v[i] = i < count ? get(from + i * stride + e, whole) : Vec<T>{};
    transpose_block(v);
    for (int i = 0; i < count_of(whole, L); ++i) to[e + i] = v[i];
  });
}
template <class T>
void store_group(const T* from, int64_t, int64_t, int64_t rows, int64_t columns, T* to) {
  const int64_t ld = leading<T>(columns);
  for (int64_t i = 0; i < rows; ++i)
    each_vector<T>(0, columns,
                   [&](int64_t c, auto whole) { put(to + i * columns + c, load(from + i * ld + c), whole); });
}
template <class T>
void store_group(const Vec<T>* from, int64_t stride, int64_t count, int64_t rows, int64_t columns, T* to) {
  constexpr int L = lanes<T>;
  fetch_ahead<1>(to, count * stride);
  each_vector<T>(0, rows * columns, [&](int64_t e, auto whole) {
    Vec<T> v[L];
    for (int i = 0; i < L; ++i) v[i] = i < count_of(whole, L) ? from[e + i] : Vec<T>{};
    transpose_block(v);
    for (int i = 0; i < L && i < count; ++i) put(to + i * stride + e, v[i], whole);
  });
}

// ------------------------------------------------------------------------------------------------ tasks
// Calls f(Type<E>{}) with the element that suits a batch (b, n, k): lanes up to n = 16 if the matrices fill half a
// vector. False for a type other than float32 and float64.
template <class T, class F>
void with_element_of(int64_t batch, int64_t n, F f) {
  if (n <= 16 && 2 * batch >= lanes<T>)
    f(Type<Vec<T>>{});
  else
    f(Type<T>{});
}
template <class F>
bool with_element(const rom_tensor& x, F f) {
  if (x.dtype == ROM_FLOAT32) with_element_of<float>(x.size[0], x.size[1], f);
  if (x.dtype == ROM_FLOAT64) with_element_of<double>(x.size[0], x.size[1], f);
  return x.dtype == ROM_FLOAT32 || x.dtype == ROM_FLOAT64;
}

// The matrices of one group in the tensors (batch, n, k) or, for signs, (batch, k).
struct Group {
  int64_t first, count;
  static int64_t columns(const rom_tensor& t) { return t.size[t.ndim - 1]; }
  static int64_t stride(const rom_tensor& t) { return t.ndim == 3 ? t.size[1] * t.size[2] : t.size[1]; }

  // The first `rows` rows of each matrix.
  template <class E>
  void load(const rom_tensor& t, int64_t rows, E* to) const {
    load_group((const ScalarOfElement<E>*)t.data + first * stride(t), stride(t), count, rows, columns(t), to);
  }
  template <class E>
  void store(const E* from, int64_t rows, const rom_tensor& t) const {
    store_group(from, stride(t), count, rows, columns(t), (ScalarOfElement<E>*)t.data + first * stride(t));
  }
};

// A kernel is a template Work<E>: buffers, made from an Arena, n and k, and run(args, group), from load to store.
template <template <class> class Work, class E>
int64_t work_bytes(int64_t n, int64_t k) {
  Arena size{nullptr};
  Work<E>(size, n, k);
  return (size.used + 63) & ~(int64_t)63;
}
template <template <class> class Work, class Args>
int64_t batch_workspace(const Args& a) {
  int64_t bytes = 0;
  with_element(a.x, [&]<class E>(Type<E>) { bytes = work_bytes<Work, E>(a.x.size[1], a.x.size[2]); });
  return a.launch.threads * bytes + 64;
}
template <template <class> class Work, class Args>
rom_status run_batch(const Args& a) {
  const bool known = with_element(a.x, [&]<class E>(Type<E>) {
    const int64_t batch = a.x.size[0], n = a.x.size[1], k = a.x.size[2];
    const int64_t bytes = work_bytes<Work, E>(n, k), groups = (batch + group_size<E> - 1) / group_size<E>;
    // a wake-up costs about 5 us: several small groups make a task
    const int64_t work = n * k * k * group_size<E>, per_task = work >= 65536 ? 1 : 65536 / (work + 1) + 1;
    const int64_t tasks = (groups + per_task - 1) / per_task;
    // a few large matrices: one after the other, each by all threads
    const bool together = tasks < a.launch.threads && k > 128;
    parallel_for(tasks, together ? 1 : a.launch.threads, [&](int64_t task, int64_t worker) {
      FlushSubnormals flush;
      team = together ? a.launch.threads : 1;
      Arena arena{aligned(a.workspace.data) + worker * bytes};
      const Work<E> buffers(arena, n, k);
      const int64_t end = (task + 1) * per_task;
      for (int64_t g = task * per_task; g < (end < groups ? end : groups); ++g) {
        const int64_t first = g * group_size<E>, left = batch - first;
        buffers.run(a, Group{first, left < group_size<E> ? left : (int64_t)group_size<E>});
      }
      team = 1;
    });
  });
  return known ? ROM_OK : rom_fail(ROM_UNSUPPORTED, "dtype %d of x", a.x.dtype);
}
