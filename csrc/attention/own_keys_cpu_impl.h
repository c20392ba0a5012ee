// Included by own_keys_cpu.cpp and its _avx2 and _avx512 sisters, each compiled for its own ISA.
//
// A row of queries with all its own keys stays in the first two levels of cache, so every operand
// comes from memory once; the loops below read it again from there. Scores of all heads of a step
// lie side by side, so that one exponential serves a vector of heads.
#pragma once

#include <cmath>

#include "attention/own_keys_cpu.h"
#include "core/simd.h"

namespace sf::cpu {
namespace {

SF_ALWAYS_INLINE float add_lanes(Vec a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(a.v);
#else
  float lane[Vec::kWidth];
  store(lane, a);
  for (int half = Vec::kWidth / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  }
  return lane[0];
#endif
}

// Calls full(d) for every whole vector of [0, size) and tail(d, n) for the n elements that remain.
template <class Full, class Tail>
SF_ALWAYS_INLINE void over_vectors(int64_t size, Full full, Tail tail) {
  int64_t d = 0;
  for (; d + Vec::kWidth <= size; d += Vec::kWidth) full(d);
  if (d < size) tail(d, size - d);
}

template <class T>
SF_ALWAYS_INLINE float dot(const T* a, const T* b, int64_t size) {
  Vec sum = set1(0);
  over_vectors(
      size, [&](int64_t d) { sum = fma(load(a + d), load(b + d), sum); },
      [&](int64_t d, int64_t n) {
        sum = fma(load_tail(a + d, n, 0), load_tail(b + d, n, 0), sum);
      });
  return add_lanes(sum);
}

// products[j, h] = factor * (rows of h) . (row j of the group's head)
template <class T>
SF_ALWAYS_INLINE void dots(const OwnShape& shape, const T* rows, const T* const* own, float factor,
                           float* products) {
  const int64_t group = shape.group(), head_dim = shape.head_dim;
  for (int64_t j = 0; j < shape.depth; ++j) {
    for (int64_t h = 0; h < shape.heads; ++h) {
      products[j * shape.heads + h] =
          factor * dot(rows + h * head_dim, own[j] + h / group * head_dim, head_dim);
    }
  }
}

// scores [depth, heads] become the weights of the own keys, lse the merged one; first [heads] gets
// the weight of what was there.
SF_ALWAYS_INLINE void merge_weights(const OwnShape& shape, float* scores, float* lse,
                                    float* first) {
  const int64_t heads = shape.heads, depth = shape.depth;
  const auto weigh = [&](int64_t h, auto get, auto put) {
    Vec top = get(lse + h);
    for (int64_t j = 0; j < depth; ++j) top = max(top, get(scores + j * heads + h));
    Vec e = exp_nonpositive(get(lse + h) - top), sum = e;
    put(first + h, e);
    for (int64_t j = 0; j < depth; ++j) {
      e = exp_nonpositive(get(scores + j * heads + h) - top);
      put(scores + j * heads + h, e);
      sum = sum + e;
    }
    float tops[Vec::kWidth], sums[Vec::kWidth];
    store(tops, top);
    store(sums, sum);
    for (int64_t k = 0; k < Vec::kWidth && h + k < heads; ++k) {
      lse[h + k] = tops[k] + ::logf(sums[k]);
      const float to_weight = 1 / sums[k];
      first[h + k] *= to_weight;
      for (int64_t j = 0; j < depth; ++j) scores[j * heads + h + k] *= to_weight;
    }
  };
  over_vectors(
      heads,
      [&](int64_t h) {
        weigh(h, [](const float* p) { return load(p); }, [](float* p, Vec e) { store(p, e); });
      },
      [&](int64_t h, int64_t n) {
        weigh(
            h, [n](const float* p) { return load_tail(p, n, 0); },
            [n](float* p, Vec e) { store_tail(p, n, e); });
      });
}

template <class T>
void merge_row(const OwnShape& shape, const MergeRow<T>& row, float* scratch) {
  const int64_t heads = shape.heads, head_dim = shape.head_dim, group = shape.group();
  float* const first = scratch;
  float* const weights = scratch + heads;
  dots(shape, row.query, row.keys, shape.scale, weights);
  merge_weights(shape, weights, row.lse, first);
  for (int64_t h = 0; h < heads; ++h) {
    T* const out = row.out + h * head_dim;
    const int64_t own = h / group * head_dim;
    const auto merged = [&](int64_t d, auto get) {
      Vec sum = get(out + d) * set1(first[h]);
      for (int64_t j = 0; j < shape.depth; ++j) {
        sum = fma(get(row.values[j] + own + d), set1(weights[j * heads + h]), sum);
      }
      return sum;
    };
    over_vectors(
        head_dim, [&](int64_t d) { store(out + d, merged(d, [](const T* p) { return load(p); })); },
        [&](int64_t d, int64_t n) {
          store_tail(out + d, n, merged(d, [n](const T* p) { return load_tail(p, n, 0); }));
        });
  }
}

// scores and grads [depth, heads] hold s_j and grad_out . v_j; they become w_j and u_j.
SF_ALWAYS_INLINE void grad_weights(const OwnShape& shape, const float* lse, const float* delta,
                                   float* scores, float* grads) {
  const Vec scale = set1(shape.scale);
  for (int64_t j = 0; j < shape.depth; ++j) {
    float* const w = scores + j * shape.heads;
    float* const u = grads + j * shape.heads;
    over_vectors(
        shape.heads,
        [&](int64_t h) {
          const Vec weight = exp_nonpositive(load(w + h) - load(lse + h));
          store(w + h, weight);
          store(u + h, scale * weight * (load(u + h) - load(delta + h)));
        },
        [&](int64_t h, int64_t n) {
          const Vec weight = exp_nonpositive(load_tail(w + h, n, 0) - load_tail(lse + h, n, 0));
          const Vec grad = load_tail(u + h, n, 0) - load_tail(delta + h, n, 0);
          store_tail(w + h, n, weight);
          store_tail(u + h, n, scale * weight * grad);
        });
  }
}

// to[d] = sum over k of factors[k * stride] * from(k)[d], on top of to[d] where kAdd.
template <bool kAdd, class T, class From>
SF_ALWAYS_INLINE void combine(T* to, int64_t head_dim, int64_t count, const float* factors,
                              int64_t stride, From from) {
  const auto combined = [&](int64_t d, auto get) {
    Vec sum = kAdd ? get(to + d) : set1(0);
    for (int64_t k = 0; k < count; ++k) {
      sum = fma(get(from(k) + d), set1(factors[k * stride]), sum);
    }
    return sum;
  };
  over_vectors(
      head_dim, [&](int64_t d) { store(to + d, combined(d, [](const T* p) { return load(p); })); },
      [&](int64_t d, int64_t n) {
        store_tail(to + d, n, combined(d, [n](const T* p) { return load_tail(p, n, 0); }));
      });
}

template <class T>
void grads_row(const OwnShape& shape, const GradsRow<T>& row, float* scratch) {
  const int64_t heads = shape.heads, head_dim = shape.head_dim, group = shape.group();
  float* const delta = scratch;
  float* const w = scratch + heads;
  float* const u = w + shape.depth * heads;
  for (int64_t h = 0; h < heads; ++h) {
    delta[h] = dot(row.grad_out + h * head_dim, row.out + h * head_dim, head_dim);
  }
  dots(shape, row.query, row.keys, shape.scale, w);
  dots(shape, row.grad_out, row.values, 1.0f, u);
  grad_weights(shape, row.lse, delta, w, u);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t own = h / group * head_dim;
    combine<true>(row.grad_query + h * head_dim, head_dim, shape.depth, u + h, heads,
                  [&](int64_t j) { return row.keys[j] + own; });
  }
  for (int64_t j = 0; j < shape.depth; ++j) {
    for (int64_t g = 0; g < shape.kv_heads; ++g) {
      const int64_t h = g * group;
      combine<false>(row.grad_keys[j] + g * head_dim, head_dim, group, u + j * heads + h, 1,
                     [&](int64_t k) { return row.query + (h + k) * head_dim; });
      combine<false>(row.grad_values[j] + g * head_dim, head_dim, group, w + j * heads + h, 1,
                     [&](int64_t k) { return row.grad_out + (h + k) * head_dim; });
    }
  }
}

constexpr OwnKeysKernels kKernels{merge_row<float>, merge_row<bf16>, grads_row<float>,
                                  grads_row<bf16>};

}  // namespace
}  // namespace sf::cpu
