// The pass over a row of logits that the row kernels begin with: its softmax, online. For files
// compiled per instruction set.
//
// A row is taken in blocks of kBlock elements. The maximum of a block is found first, then, while
// the block lies in L1, its exponentials relative to the maximum of the row so far. So memory is
// read once, behind arithmetic; the blocks are brought to one scale at the end. Sums run in f32
// lanes within blocks and in f64 across blocks, always in the same order.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "core/simd.h"

namespace sf {
namespace {

inline constexpr int64_t kBlock = 1024;
inline constexpr float kLeast = -std::numeric_limits<float>::infinity();

constexpr int64_t num_blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }

// How a loop body reads and writes a whole vector.
struct Whole {
  template <class T>
  SF_ALWAYS_INLINE Vec load(const T* p, float) const {
    return sf::load(p);
  }
  template <class T>
  SF_ALWAYS_INLINE void store(T* p, Vec a) const {
    sf::store(p, a);
  }
  SF_ALWAYS_INLINE Vec only(Vec a) const { return a; }
};

// The same for the n < kWidth elements that remain. Lanes past them read `pad`, and `only` makes
// them 0.
struct Tail {
  int64_t n;

  template <class T>
  SF_ALWAYS_INLINE Vec load(const T* p, float pad) const {
    return load_tail(p, n, pad);
  }
  template <class T>
  SF_ALWAYS_INLINE void store(T* p, Vec a) const {
    store_tail(p, n, a);
  }
  SF_ALWAYS_INLINE Vec only(Vec a) const {
    float lane[Vec::kWidth];
    sf::store(lane, a);
    return load_tail(lane, n, 0);
  }
};

// Calls body(v, Whole or Tail) for the vectors of [begin, end).
template <class Body>
SF_ALWAYS_INLINE void for_each_vec(int64_t begin, int64_t end, Body body) {
  int64_t v = begin;
  for (; v + Vec::kWidth <= end; v += Vec::kWidth) body(v, Whole{});
  if (v < end) body(v, Tail{end - v});
}

// Calls body(k, begin, end) for the blocks of [0, size).
template <class Body>
SF_ALWAYS_INLINE void for_each_block(int64_t size, Body body) {
  int64_t k = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock, ++k) {
    body(k, begin, begin + kBlock < size ? begin + kBlock : size);
  }
}

template <class T>
SF_ALWAYS_INLINE float block_max(const T* row, int64_t begin, int64_t end) {
  Vec a = set1(kLeast), b = a, c = a, d = a;
  int64_t v = begin;
  for (; v + 4 * Vec::kWidth <= end; v += 4 * Vec::kWidth) {
    a = max(a, load(row + v));
    b = max(b, load(row + v + Vec::kWidth));
    c = max(c, load(row + v + 2 * Vec::kWidth));
    d = max(d, load(row + v + 3 * Vec::kWidth));
  }
  for_each_vec(v, end, [&](int64_t i, auto lanes) { a = max(a, lanes.load(row + i, kLeast)); });
  return max_lane(max(max(a, b), max(c, d)));
}

template <class T>
SF_ALWAYS_INLINE int64_t first_equal(const T* row, int64_t begin, int64_t end, float value) {
  int64_t v = begin;
  for (; v + Vec::kWidth <= end; v += Vec::kWidth) {
    const uint32_t mask = equal_mask(load(row + v), set1(value));
    if (mask != 0) return v + std::countr_zero(mask);
  }
  while (v < end && to_f32(row[v]) != value) ++v;
  return v;
}

struct RowMax {
  float value;
  int64_t index;  // the lowest one
};

// Calls body(k, begin, end, max of row[0, end)) for the blocks of the row, in order. It may write
// over the block.
template <class T, class Body>
SF_ALWAYS_INLINE RowMax for_each_block_and_max(const T* row, int64_t size, Body body) {
  RowMax top{kLeast, 0};
  for_each_block(size, [&](int64_t k, int64_t begin, int64_t end) {
    const float value = block_max(row, begin, end);
    if (value > top.value) top = {value, first_equal(row, begin, end, value)};
    body(k, begin, end, top.value);
  });
  return top;
}

// sum_v exp((row[v] - max) / tau), where max may still rise.
class OnlineSum {
 public:
  explicit OnlineSum(double inverse_tau) : inverse_tau_(inverse_tau) {}

  // Adds exponentials whose sum is `sum`, relative to `max`, which is not below the last one.
  SF_ALWAYS_INLINE void add(float max, double sum) {
    if (max != max_) {
      sum_ = sum_ == 0 ? 0 : sum_ * ::exp((static_cast<double>(max_) - max) * inverse_tau_);
      max_ = max;
    }
    sum_ += sum;
  }
  double sum() const { return sum_; }

 private:
  double inverse_tau_;
  float max_ = kLeast;
  double sum_ = 0;
};

struct SoftmaxStat {
  RowMax top;
  double sum;  // of exp((row[v] - top.value) / tau), >= 1
};

template <class T>
SF_ALWAYS_INLINE SoftmaxStat softmax_stat(const T* row, int64_t size, float inverse_tau) {
  OnlineSum total(inverse_tau);
  const RowMax top =
      for_each_block_and_max(row, size, [&](int64_t, int64_t begin, int64_t end, float max) {
        Vec sum = set1(0);
        for_each_vec(begin, end, [&](int64_t v, auto lanes) {
          const Vec x = (lanes.load(row + v, kLeast) - set1(max)) * set1(inverse_tau);
          sum = sum + exp_nonpositive(x);
        });
        total.add(max, sum_lanes(sum));
      });
  return {top, total.sum()};
}

}  // namespace
}  // namespace sf
