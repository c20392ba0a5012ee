// Passes over one row of logits, shared by the row kernels. For files compiled per instruction set.
//
// Sums run in f32 lanes within blocks of kBlock elements and in f64 across blocks, always in the
// same order.
#pragma once

#include <bit>
#include <limits>

#include "core/simd.h"

namespace sf {
namespace {

inline constexpr int64_t kBlock = 1024;

// Calls full(v) for every whole vector of [begin, end) and tail(v, n) for the n elements that
// remain.
template <class Full, class Tail>
SF_ALWAYS_INLINE void for_each_vec(int64_t begin, int64_t end, Full full, Tail tail) {
  int64_t v = begin;
  for (; v + Vec::kWidth <= end; v += Vec::kWidth) full(v);
  if (v < end) tail(v, end - v);
}

struct RowMax {
  float value;
  int64_t index;  // the lowest one
};

template <class T>
SF_ALWAYS_INLINE float block_max(const T* row, int64_t begin, int64_t end) {
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  Vec a = set1(kLeast), b = a, c = a, d = a;
  int64_t v = begin;
  for (; v + 4 * Vec::kWidth <= end; v += 4 * Vec::kWidth) {
    a = max(a, load(row + v));
    b = max(b, load(row + v + Vec::kWidth));
    c = max(c, load(row + v + 2 * Vec::kWidth));
    d = max(d, load(row + v + 3 * Vec::kWidth));
  }
  for_each_vec(
      v, end, [&](int64_t i) { a = max(a, load(row + i)); },
      [&](int64_t i, int64_t n) { b = max(b, load_tail(row + i, n, kLeast)); });
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

template <class T>
SF_ALWAYS_INLINE RowMax row_max(const T* row, int64_t vocab) {
  float best = -std::numeric_limits<float>::infinity();
  int64_t best_block = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    const float value = block_max(row, begin, end);
    if (value > best) {
      best = value;
      best_block = begin;
    }
  }
  const int64_t end = best_block + kBlock < vocab ? best_block + kBlock : vocab;
  return {best, first_equal(row, best_block, end, best)};
}

// sum_v exp(row[v] - max); put(v, e) and put_tail(v, n, e) see every vector of exponentials.
template <class T, class Put, class PutTail>
SF_ALWAYS_INLINE double sum_exp(const T* row, int64_t vocab, float max, Put put, PutTail put_tail) {
  double total = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    Vec sum = set1(0);
    for_each_vec(
        begin, end,
        [&](int64_t v) {
          const Vec e = exp_nonpositive(load(row + v) - set1(max));
          sum = sum + e;
          put(v, e);
        },
        [&](int64_t v, int64_t n) {
          constexpr float kLeast = -std::numeric_limits<float>::infinity();
          const Vec e = exp_nonpositive(load_tail(row + v, n, kLeast) - set1(max));
          sum = sum + e;
          put_tail(v, n, e);
        });
    total += sum_lanes(sum);
  }
  return total;
}

}  // namespace
}  // namespace sf
