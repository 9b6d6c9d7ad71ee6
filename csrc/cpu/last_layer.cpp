// SPDX-License-Identifier: Apache-2.0
//
// Faults of the last layer in closed form: a changed logit changes one term of the softmax's sum, so loss and top-1 of
// a fault cost a few operations whatever the number of classes. Lanes are images.
//
// With p the probability of the changed class, q = 1 - p, and d = t' - t:
//   loss' - loss = log(q + p e^d) where the class is not the label, log(p + q e^-d) where it is.
// Both are log(b + a e^d), a + b = 1; for |d| < 1/2 as log1p(a expm1(d)), else as logaddexp(d + log a, log b): neither
// overflows or cancels. Nothing here flushes subnormals: a flipped exponent makes them.
#include "cpu/kernel.hpp"
#include "rom/last_layer.h"

namespace {
#include "cpu/simd.hpp"

constexpr int kLanes = lanes<float>;
constexpr int64_t kRun = 32;              // cells that stay in the first cache for all bits: 12 KiB at 16 lanes
constexpr int64_t kScratch = 16ll << 20;  // bytes of cells at a time
constexpr int kCounts = 6;                // masked, tolerable, sdc, critical, due, top-1 differs

// What the faults of one class need to know of kLanes images.
struct Cell {
  float value[kLanes];       // z
  float logit[kLanes];       // t
  float weight[kLanes];      // a; sign bit: the class is the label
  float log_weight[kLanes];  // log a
  float log_rest[kLanes];    // |log b|; sign bit: the class is the golden top-1
  float bar[kLanes];         // top-1 changes where t' is above it, for the golden top-1 where -t' is
};

// kLanes images: a cell per class, and after them -1 for each image whose golden top-1 is its label.
struct Block {
  char* memory;
  int64_t classes;
  static int64_t bytes(int64_t classes) { return classes * (int64_t)sizeof(Cell) + kLanes * (int64_t)sizeof(int32_t); }
  Cell& cell(int64_t k) const { return ((Cell*)memory)[k]; }
  int32_t* right() const { return (int32_t*)((Cell*)memory + classes); }
};

// The blocks made at a time. Their number depends on the shapes only, and with it the order of every sum.
struct Blocks {
  char* memory;
  int64_t images, classes;
  int64_t count() const { return (images + kLanes - 1) / kLanes; }
  int64_t lanes_of(int64_t i) const { return images - i * kLanes < kLanes ? images - i * kLanes : kLanes; }
  Block operator[](int64_t i) const { return {memory + i * Block::bytes(classes), classes}; }
};
int64_t images_at_a_time(int64_t images, int64_t classes) {
  const int64_t fit = kScratch / Block::bytes(classes), most = (fit < 1 ? 1 : fit) * kLanes;
  return images < most ? images : most;
}
int64_t workspace_bytes(int64_t images, int64_t classes) {
  return Blocks{nullptr, images_at_a_time(images, classes), classes}.count() * Block::bytes(classes);
}

// ------------------------------------------------------------------------------------------------ from z to t
template <class S>
ROM_INLINE vfloat rounded(vfloat v) {
  if constexpr (sizeof(S) == 4) return v;
  S buffer[kLanes];
  store(buffer, v);
  return load(buffer);
}
template <class S>
struct ToLogit {
  float scale, low, high, nan_to;
  template <class Args>
  explicit ToLogit(const Args& a)
      : scale((float)a.scale), low((float)a.low), high((float)a.high), nan_to((float)a.nan_to) {}
  ROM_INLINE vfloat of(const ToLogit& to, vfloat z) {
    z = at_least(at_most(z, to.high), to.low);
    return rounded<S>((z != z ? broadcast(to.nan_to) : z) * to.scale);
  }
};

// ------------------------------------------------------------------------------------------------ cells
// The largest float below x, for finite x.
float below(float x) {
  if (x == 0) return -1.40129846e-45f;
  const uint32_t bits = float_bits(x);
  return float_from_bits(x > 0 ? bits - 1 : bits + 1);
}
float with_sign(float magnitude, bool sign) { return sign ? -magnitude : magnitude; }

// The cells of one image, which is lane `lane` of the block; t of every class is there already.
void finish_image(const Block& block, int lane, int64_t label) {
  int64_t first = 0, second = -1;  // the two largest, of equal ones the first: as argmax
  auto t = [&](int64_t k) { return block.cell(k).logit[lane]; };
  for (int64_t k = 1; k < block.classes; ++k) {
    if (t(k) > t(first)) {
      second = first;
      first = k;
    } else if (second < 0 || t(k) > t(second)) {
      second = k;
    }
  }
  double others = 0;  // without the largest, whose p may round to 1
  for (int64_t k = 0; k < block.classes; ++k)
    if (k != first) others += ::exp((double)t(k) - (double)t(second));
  const double gap = second < 0 ? -INFINITY : (double)t(second) - (double)t(first) + ::log(others);
  const double log_top = -::log1p(::exp(gap));
  for (int64_t k = 0; k < block.classes; ++k) {
    Cell& cell = block.cell(k);
    double log_a = k == first ? log_top : (double)t(k) - (double)t(first) + log_top;
    double log_b = k == first ? gap + log_top : ::log1p(-::exp(log_a));
    if (k == label) {
      const double p = log_a;
      log_a = log_b;
      log_b = p;
    }
    cell.weight[lane] = with_sign((float)::exp(log_a), k == label);
    cell.log_weight[lane] = (float)log_a;
    cell.log_rest[lane] = with_sign((float)::fabs(log_b), k == first);
    if (k != first)
      cell.bar[lane] = k < first ? below(t(first)) : t(first);
    else if (second < 0)
      cell.bar[lane] = INFINITY;
    else
      cell.bar[lane] = second < first ? below(-t(second)) : -t(second);
  }
  block.right()[lane] = first == label ? -1 : 0;
}

// value(image, class): z. Lanes past the last image repeat it.
template <class S, class F>
void make_block(const Blocks& blocks, int64_t i, const ToLogit<S>& to_logit, const int64_t* labels, F value) {
  const Block block = blocks[i];
  const int64_t filled = blocks.lanes_of(i);
  for (int64_t k = 0; k < block.classes; ++k) {
    Cell& cell = block.cell(k);
    for (int lane = 0; lane < kLanes; ++lane)
      cell.value[lane] = value(i * kLanes + (lane < filled ? lane : filled - 1), k);
    store(cell.logit, ToLogit<S>::of(to_logit, rounded<S>(load(cell.value))));
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t image = i * kLanes + (lane < filled ? lane : filled - 1);
    finish_image(block, lane, labels[image]);
  }
}

// ------------------------------------------------------------------------------------------------ one fault
ROM_INLINE vint32 load_bits(const int32_t* p) {
  vint32 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
ROM_INLINE vint32 sign_of(vfloat x) { return (vint32)x & (vint32)broadcast(-0.0f); }
ROM_INLINE vfloat signed_by(vfloat x, vfloat by) { return (vfloat)((vint32)x ^ sign_of(by)); }
ROM_INLINE vfloat magnitude(vfloat x) { return (vfloat)((vint32)x & 0x7fffffff); }

// (e^d - 1) for |d| <= 1/2, to 2e-9.
ROM_INLINE vfloat expm1_small(vfloat d) {
  const float inverse_factorial[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f};
  vfloat p = broadcast(1.0f / 40320);
  for (float c : inverse_factorial) p = p * d + c;
  return p * d;
}

// log(1 + e) for e > -0.5: 1 + e as 2^k (1 + f), where f is e itself for k = 0 so that a small e keeps its digits.
ROM_INLINE vfloat log1p(vfloat e) {
  const vfloat y = e + 1.0f;
  const vint32 bits = (vint32)y, k = (bits - 0x3f3504f3) >> 23;
  const vfloat f = k == 0 ? e : (vfloat)(bits - (k << 23)) - 1.0f;
  const vfloat s = f * reciprocal(f + 2.0f), s2 = s * s;  // 2 atanh(s)
  vfloat p = s2 * (2.0f / 9) + 2.0f / 7;
  p = p * s2 + 2.0f / 5;
  p = p * s2 + 2.0f / 3;
  p = p * s2 + 2.0f;
  return __builtin_convertvector(k, vfloat) * 0.69314718056f + p * s;
}

// |log(b + a e^d)|
ROM_INLINE vfloat loss_change(vfloat d, vfloat a, vfloat log_a, vfloat log_b) {
  const vfloat u = d + log_a, gap = magnitude(u - log_b) * -1.0f;
  const vint32 small = magnitude(d) < 0.5f;
  const vfloat e = small ? a * expm1_small(d) : exp(at_least(gap, -100.0f));
  const vfloat base = small ? broadcast(0.0f) : (u > log_b ? u : log_b);
  return magnitude(base + log1p(e));
}

// What some faults of one bit did, lane by lane.
struct Tally {
  vdouble loss[2];
  vint32 masked, wrong, critical, due, mismatch;  // counted downwards; wrong: another top-1, and finite

  ROM_INLINE void add(Tally& tally, const Cell& cell, vint32 right, vfloat changed) {
    const vfloat golden = load(cell.logit), a = load(cell.weight), rest = load(cell.log_rest);
    const vint32 exponent = (vint32)broadcast(INFINITY);
    const vint32 finite = ((vint32)changed & exponent) != exponent;
    const vint32 is_top = sign_of(rest) != 0;
    const vint32 ahead = (signed_by(changed, rest) > load(cell.bar)) | ((changed != changed) & ~is_top);
    const vint32 wrong = ahead & finite;
    tally.masked += (vint32)changed == (vint32)golden;
    tally.mismatch += ahead;
    tally.wrong += wrong;
    tally.critical += wrong & right;
    tally.due += ~finite;
    vfloat loss = loss_change(signed_by(changed - golden, a), magnitude(a), load(cell.log_weight),
                              (vfloat)((vint32)rest | (vint32)broadcast(-0.0f)));
    loss = finite ? loss : broadcast(0.0f);
    float both[kLanes];
    store(both, loss);
    ROM_UNROLL
    for (int half = 0; half < 2; ++half) {
      vdouble wide;
      for (int i = 0; i < kLanes / 2; ++i) wide[i] = (double)both[half * (kLanes / 2) + i];
      tally.loss[half] += wide;
    }
  }
};

// Rows of the results: adds the first `count` lanes, to one row or to a row each.
struct Rows {
  double* loss;
  int64_t* counts;
  int64_t bits;
  Rows(const rom_tensor& l, const rom_tensor& c) : loss((double*)l.data), counts((int64_t*)c.data), bits(l.size[1]) {}

  void add(const Tally& tally, int64_t row, int64_t bit, int64_t faults_per_lane, int64_t count, bool row_each) const {
    const double* lost = (const double*)tally.loss;
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t at = (row + (row_each ? lane : 0)) * bits + bit;
      const int64_t masked = -tally.masked[lane], wrong = -tally.wrong[lane], critical = -tally.critical[lane];
      const int64_t due = -tally.due[lane], mismatch = -tally.mismatch[lane];
      const int64_t sums[kCounts] = {masked,  faults_per_lane - masked - wrong - due, wrong - critical, critical, due,
                                     mismatch};
      loss[at] += lost[lane];
      for (int i = 0; i < kCounts; ++i) counts[at * kCounts + i] += sums[i];
    }
  }
};

// ------------------------------------------------------------------------------------------------ many faults
// change(i, cell, bit): t' of block i. Runs of cells, of consecutive images or classes, meet every bit in turn.
template <class F>
void over_images(const Blocks& blocks, int64_t k, const Rows& rows, int64_t row, F change) {
  const int64_t whole = blocks.images / kLanes;  // a block with fewer images is a run of its own
  for (int64_t begin = 0, end; begin < blocks.count(); begin = end) {
    end = begin == whole ? begin + 1 : begin + kRun < whole ? begin + kRun : whole;
    for (int64_t bit = 0; bit < rows.bits; ++bit) {
      Tally tally{};
      for (int64_t i = begin; i < end; ++i) {
        const Cell& cell = blocks[i].cell(k);
        Tally::add(tally, cell, load_bits(blocks[i].right()), change(i, cell, bit));
      }
      rows.add(tally, row, bit, end - begin, blocks.lanes_of(begin), false);
    }
  }
}

template <class F>
void over_classes(const Blocks& blocks, int64_t i, const Rows& rows, int64_t first_row, F change) {
  const Block block = blocks[i];
  const vint32 right = load_bits(block.right());
  for (int64_t begin = 0; begin < block.classes; begin += kRun) {
    const int64_t end = begin + kRun < block.classes ? begin + kRun : block.classes;
    for (int64_t bit = 0; bit < rows.bits; ++bit) {
      Tally tally{};
      for (int64_t k = begin; k < end; ++k) Tally::add(tally, block.cell(k), right, change(i, block.cell(k), bit));
      rows.add(tally, first_row + i * kLanes, bit, end - begin, blocks.lanes_of(i), true);
    }
  }
}

// f(blocks, first image) for the images that fit in the workspace at a time; value(image, class): z.
template <class S, class Args, class V, class F>
void with_blocks(const Args& a, int64_t images, int64_t classes, V value, F f) {
  const ToLogit<S> to_logit(a);
  const int64_t* labels = (const int64_t*)a.labels.data;
  const int64_t step = images_at_a_time(images, classes);
  memset(a.loss.data, 0, (size_t)(a.loss.size[0] * a.loss.size[1]) * sizeof(double));
  memset(a.counts.data, 0, (size_t)(a.loss.size[0] * a.loss.size[1] * kCounts) * sizeof(int64_t));
  for (int64_t first = 0; first < images && classes > 0; first += step) {
    const Blocks blocks{(char*)a.workspace.data, images - first < step ? images - first : step, classes};
    parallel_for(blocks.count(), a.launch.threads, [&](int64_t i, int64_t) {
      make_block<S>(blocks, i, to_logit, labels + first, [&](int64_t b, int64_t k) { return value(first + b, k); });
    });
    f(blocks, first);
  }
}

// The values of a cell with one bit flipped: of their 16 or 32 bits, as they are stored.
template <class S>
ROM_INLINE vfloat flipped(const Cell& cell, int64_t bit) {
  if constexpr (__is_same(S, float16)) {
    float16 buffer[kLanes];
    store(buffer, load(cell.value));
    for (int i = 0; i < kLanes; ++i) buffer[i].bits ^= (uint16_t)(1u << bit);
    return load(buffer);
  } else {
    return (vfloat)((vuint32)load(cell.value) ^ (1u << (sizeof(S) == 2 ? bit + 16 : bit)));
  }
}

template <class S>
void logit_flips(const rom_logit_flips_args& a) {
  const rom_tensor& logits = a.logits;
  const Rows rows(a.loss, a.counts);
  const ToLogit<S> to_logit(a);
  auto value = [&](int64_t image, int64_t k) {
    return widen(((const S*)logits.data)[image * logits.stride[0] + k * logits.stride[1]]);
  };
  auto change = [&](int64_t, const Cell& cell, int64_t bit) { return ToLogit<S>::of(to_logit, flipped<S>(cell, bit)); };
  with_blocks<S>(a, logits.size[0], logits.size[1], value, [&](const Blocks& blocks, int64_t first) {
    parallel_for(a.by_image ? blocks.count() : blocks.classes, a.launch.threads, [&](int64_t task, int64_t) {
      a.by_image ? over_classes(blocks, task, rows, first, change) : over_images(blocks, task, rows, task, change);
    });
  });
}

template <class S>
S flipped(S w, int64_t bit) {
  uint32_t word = 0;
  memcpy(&word, &w, sizeof(S));
  word ^= 1u << bit;
  memcpy(&w, &word, sizeof(S));
  return w;
}

template <class S>
void weight_flips(const rom_weight_flips_args& a) {
  const int64_t classes = a.weight.size[0], inputs = a.weight.size[1];
  const Rows rows(a.loss, a.counts);
  const ToLogit<S> to_logit(a);
  auto value = [&](int64_t image, int64_t k) {
    return ((const float*)a.sums.data)[image * a.sums.stride[0] + k * a.sums.stride[1]];
  };
  with_blocks<S>(a, a.sums.size[0], classes, value, [&](const Blocks& blocks, int64_t first) {
    parallel_for(a.by_input ? inputs : classes, a.launch.threads, [&](int64_t row, int64_t) {
      for (int64_t other = 0; other < (a.by_input ? classes : inputs); ++other) {
        const int64_t k = a.by_input ? other : row, e = a.by_input ? row : other;
        const S weight = ((const S*)a.weight.data)[k * a.weight.stride[0] + e * a.weight.stride[1]];
        const float* x = (const float*)a.features.data + e * a.features.stride[0] + first;
        over_images(blocks, k, rows, row, [&](int64_t i, const Cell& cell, int64_t bit) {
          const float delta = widen(flipped(weight, bit)) - widen(weight);
          const int64_t count = blocks.lanes_of(i);
          const vfloat input = count == kLanes ? load(x + i * kLanes) : load_partial(x + i * kLanes, (int)count);
          return ToLogit<S>::of(to_logit, rounded<S>(fma(broadcast(delta), input, load(cell.value))));
        });
      }
    });
  });
}

template <class F>
rom_status with_flipped_type(int dtype, F f) {
  if (dtype != ROM_FLOAT64 && with_storage_type(dtype, f)) return ROM_OK;
  return rom_fail(ROM_UNSUPPORTED, "dtype %d", dtype);
}

}  // namespace

ROM_CPU_WORKSPACE(rom_logit_flips, rom_logit_flips_args) { return workspace_bytes(a.logits.size[0], a.logits.size[1]); }
ROM_CPU_KERNEL(rom_logit_flips, rom_logit_flips_args) {
  return with_flipped_type(a.logits.dtype, [&]<class S>(Type<S>) {
    if constexpr (sizeof(S) < 8) logit_flips<S>(a);
  });
}

ROM_CPU_WORKSPACE(rom_weight_flips, rom_weight_flips_args) { return workspace_bytes(a.sums.size[0], a.sums.size[1]); }
ROM_CPU_KERNEL(rom_weight_flips, rom_weight_flips_args) {
  return with_flipped_type(a.weight.dtype, [&]<class S>(Type<S>) {
    if constexpr (sizeof(S) < 8) weight_flips<S>(a);
  });
}
