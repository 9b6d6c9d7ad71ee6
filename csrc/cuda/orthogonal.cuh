// SPDX-License-Identifier: Apache-2.0
//
// What the orthogonal maps and their gradients share: all four sum products of rows of tall matrices into k x k, solve
// there, and multiply rows by the result. One launch does that for a batch of matrices; a few tall ones are cut into
// parts of rows, in three launches: sums, solve, rows.
#pragma once
#include "cuda/matrix_inverse.cuh"
#include "rom/orthogonal.h"

namespace {

enum Phase { kSums = 1, kSolve = 2, kProducts = 4, kAll = 7 };

struct Plan {
  int phase = kAll, parts = 1;
  int64_t rows = 0;  // of a part
  int kept = 0;      // k x k matrices that the workspace holds for each of the batch, besides the parts' sums
};

// Parts only where the batch leaves most of an H200's 132 processors idle, and not so many that summing them up takes
// longer than the sums. A whole number of stages each.
template <class T, int K>
Plan plan_for(int64_t batch, int64_t rows, int kept, int kept_if_split) {
  using Mine = Team<T, K>;
  constexpr int64_t kWanted = Mine::kThreads == 32 ? 1056 : 264, kMost = 32;
  const int64_t stages = (rows + Mine::kRows - 1) / Mine::kRows, wanted = (kWanted + batch - 1) / batch;
  int64_t parts = wanted < kMost ? wanted : kMost;
  if (parts > stages / 2) parts = stages / 2;
  Plan plan;
  const int64_t each = parts > 1 ? (stages + parts - 1) / parts : stages;
  plan.rows = each * Mine::kRows;
  plan.parts = each > 0 ? static_cast<int>((stages + each - 1) / each) : 1;
  plan.kept = plan.parts > 1 ? kept_if_split : kept;
  return plan;
}

// f(Type<S>{}) for the storage type S of a tensor computed with in T.
template <class T, class F>
__device__ __forceinline__ void with_storage(int dtype, F f) {
  if constexpr (sizeof(T) == 8)
    f(Type<double>{});
  else if (dtype == ROM_BFLOAT16)
    f(Type<bfloat16>{});
  else if (dtype == ROM_FLOAT16)
    f(Type<float16>{});
  else
    f(Type<float>{});
}

// A team at work on one matrix.
template <class T, int K>
struct Work : Team<T, K> {
  using Mine = Team<T, K>;
  static constexpr int kStride = Mine::kStride;
  const int64_t at, batch, n;
  const int k, part;
  const Plan& plan;
  T* const partials;

  __device__ Work(const rom_tensor& x, const rom_tensor& workspace, const Plan& plan)
      : at(Mine::matrix()),
        batch(x.size[0]),
        n(x.size[1]),
        k(static_cast<int>(x.size[2])),
        part(static_cast<int>(blockIdx.y)),
        plan(plan),
        partials(static_cast<T*>(workspace.data)) {}

  __device__ bool is_split() const { return plan.parts > 1; }
  __device__ bool does(int phase) const { return plan.phase & phase; }
  __device__ T* partial(int part) const { return partials + (at * plan.parts + part) * k * k; }
  __device__ T* kept(int which) const {
    return partials + ((is_split() ? batch * plan.parts : 0) + at * plan.kept + which) * k * k;
  }

  // m[r][c] = value(element, r, c) for `rows` rows of a (batch, n, k) tensor from row `first` on; elements beyond the
  // matrix are 0.
  template <class F>
  __device__ __forceinline__ void load(T* m, int rows, const rom_tensor& t, int64_t first, F value) const {
    with_storage<T>(t.dtype, [&]<class S>(Type<S>) {
      Elements<const S> from(*this, t, first);
      this->template each<4>(rows, [&](int r, int c) {
        m[r * kStride + c] = value(r < from.end ? read(*from.at) : T(0), r, c);
        from.at += from.step;
      });
    });
  }
  // The elements of `rows` rows, from row `first` of a (batch, n, k) tensor on, become value(r, c).
  template <class F>
  __device__ __forceinline__ void store(const rom_tensor& t, int rows, int64_t first, F value) const {
    with_storage<T>(t.dtype, [&]<class S>(Type<S>) {
      Elements<S> to(*this, t, first);
      this->template each<2>(rows < to.end ? rows : to.end, [&](int r, int c) {
        *to.at = rounded<S>(value(r, c));
        to.at += to.step;
      });
    });
  }
  // This thread's elements of a tensor in the order of each(), by one addition each: most of the instructions of a
  // small matrix would be addresses otherwise.
  template <class S>
  struct Elements {
    S* at;
    const int step, end;  // `end` rows are inside the matrix; none, if the thread's column is not
    __device__ Elements(const Work& work, const rom_tensor& t, int64_t first)
        : at(static_cast<S*>(t.data) + (work.at * t.size[1] + first + work.thread / K) * work.k + work.thread % K),
          step(Mine::kThreads / K * work.k),
          end(work.thread % K >= work.k ? 0
              : t.size[1] - first < K   ? static_cast<int>(t.size[1] - first)
                                        : K) {}
  };

  // Between shared memory and k x k elements of the workspace; padding is 0.
  __device__ __forceinline__ void load_square(T* m, const T* from) const {
    this->each(K, [&](int r, int c) { m[r * kStride + c] = r < k && c < k ? from[r * k + c] : T(0); });
  }
  template <class F>
  __device__ __forceinline__ void store_square(T* to, F value) const {
    this->each(k, [&](int r, int c) {
      if (c < k) to[r * k + c] = value(r, c);
    });
  }

  // The sign of this thread's column in each().
  __device__ T sign(const rom_tensor& signs) const {
    const int c = this->thread % K;
    T value = 1;
    if (signs.data && c < k) {
      const int64_t i = at * signs.stride[0] + c;
      if (signs.dtype == kDtype<T>)
        value = static_cast<const T*>(signs.data)[i];
      else
        with_storage<T>(signs.dtype, [&]<class S>(Type<S>) { value = read(static_cast<const S*>(signs.data)[i]); });
    }
    return value < 0 ? T(-1) : T(1);
  }

  // f(first row) for every stage of the part's rows; row 0 is row `skipped` of the matrix. load() and store() give a
  // thread the same elements, so between the end of one stage and the beginning of the next there is no barrier.
  template <class F>
  __device__ __forceinline__ void each_stage(int skipped, F f) const {
    const int64_t begin = skipped + part * plan.rows, end = begin + plan.rows < n ? begin + plan.rows : n;
#pragma unroll 1
    for (int64_t first = begin; first < end; first += Mine::kRows) f(first);
  }
  // m = the sum of left^T right over the part's stages, which fill(first row) brings to `left` and `right`. True where
  // the launch ends here: the sums are then in the workspace.
  template <class F>
  __device__ __forceinline__ bool sum_products(T* m, const T* left, const T* right, int skipped, F fill) const {
    if (does(kSums)) {
      Square<T, K> sums(this->thread);
      each_stage(skipped, [&](int64_t first) {
        fill(first);
        this->sync();
        sums.add_transposed_product(left, right, Mine::kRows, kStride);
        this->sync();
      });
      sums.store(m, kStride);
      this->sync();
      if (is_split()) store_square(partial(part), [&](int r, int c) { return m[r * kStride + c]; });
    } else if (does(kSolve)) {
      this->each(K, [&](int r, int c) {
        T sum = 0;
        if (r < k && c < k)
#pragma unroll 1
          for (int i = 0; i < plan.parts; ++i) sum += partial(i)[r * k + c];
        m[r * kStride + c] = sum;
      });
      this->sync();
    }
    return !does(kSolve | kProducts);
  }
  // to = the tile; both products' operands may stand there.
  template <class Product>
  __device__ __forceinline__ void replace(T* to, const Product& tile) const {
    this->sync();
    const_cast<Product&>(tile).store(to, kStride);
    this->sync();
  }
};

// V = tril(x, -1) + [I; 0]: the element at row r, column c of it.
template <class T>
__device__ __forceinline__ T reflector(T x, int64_t r, int c, int k) {
  return r > c ? x : r == c && c < k ? T(1) : T(0);
}

// ---------------------------------------------------------------------------------------------------- launches
// f(Type<T>, K) for the compute type and the team that take a call; false where there is none.
template <int K>
struct Columns {};
template <class F>
bool with_team(const rom_tensor& x, F f) {
  const int64_t k = x.size[2];
  if (x.dtype == ROM_FLOAT64) {
    if (k <= 64) return f(Type<double>{}, Columns<64>{}), true;
    return false;
  }
  if (k <= 16) return f(Type<float>{}, Columns<16>{}), true;
  if (k <= 32) return f(Type<float>{}, Columns<32>{}), true;
  if (k <= 64) return f(Type<float>{}, Columns<64>{}), true;
  if (k <= 128) return f(Type<float>{}, Columns<128>{}), true;
  return false;
}

// A kernel is described by a class: kernel<T, K>, plan<T, K>(x), and elements<T, K>(x) of shared memory per team.
template <class Kernel, class T, int K, class Args>
void launch(const Args& a) {
  using Mine = Team<T, K>;
  const auto kernel = Kernel::template kernel<T, K>;
  const size_t bytes = static_cast<size_t>(Kernel::template elements<T, K>(a.x) * Mine::kTeams) * sizeof(T);
  const auto blocks = static_cast<unsigned>((a.x.size[0] + Mine::kTeams - 1) / Mine::kTeams);
  Plan plan = Kernel::template plan<T, K>(a.x);
  allow_shared(kernel, bytes);
  const auto start = [&](int phase, int parts) {
    plan.phase = phase;
    ROM_LAUNCH(kernel, dim3(blocks, static_cast<unsigned>(parts)), Mine::kBlock, bytes, a.launch.stream, a, plan);
  };
  if (plan.parts == 1) return start(kAll, 1);
  start(kSums, plan.parts);
  start(kSolve, 1);
  start(kProducts, plan.parts);
}

template <class Kernel, class Args>
rom_status run(const char* name, const Args& a) {
  if (a.x.size[0] == 0 || a.x.size[1] == 0 || a.x.size[2] == 0) return ROM_OK;
  const bool known = with_team(a.x, [&]<class T, int K>(Type<T>, Columns<K>) { launch<Kernel, T, K>(a); });
  return known ? launch_status(name)
               : rom_fail(ROM_UNSUPPORTED, "%lld columns of dtype %d (up to 128 are supported, 64 in float64)",
                          (long long)a.x.size[2], a.x.dtype);
}
template <class Kernel>
int64_t workspace(const rom_tensor& x) {
  int64_t bytes = 0;
  with_team(x, [&]<class T, int K>(Type<T>, Columns<K>) {
    const Plan plan = Kernel::template plan<T, K>(x);
    const int64_t squares = (plan.parts > 1 ? plan.parts : 0) + plan.kept;
    bytes = x.size[0] * squares * x.size[2] * x.size[2] * (int64_t)sizeof(T);
  });
  return bytes;
}

}  // namespace
