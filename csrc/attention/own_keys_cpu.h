// The part of own_keys that exists once per instruction set: one row of queries. Internal.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace sf::cpu {

struct OwnShape {
  int64_t heads, kv_heads, head_dim, depth;
  float scale;

  int64_t group() const { return heads / kv_heads; }
};

// Pointers to the row's [heads, head_dim], and to the rows [kv_heads, head_dim] of its own keys.
template <class T>
struct MergeRow {
  const T* query;
  T* out;
  float* lse;  // [heads]
  const T* const* keys;
  const T* const* values;
};

template <class T>
struct GradsRow {
  const T* grad_out;
  const T* query;
  const T* out;
  const float* lse;  // [heads]
  T* grad_query;
  const T* const* keys;
  const T* const* values;
  T* const* grad_keys;
  T* const* grad_values;
};

// Floats of scratch for one row, enough for either.
constexpr int64_t own_keys_scratch(int64_t heads, int64_t depth) { return heads * (2 * depth + 2); }

struct OwnKeysKernels {
  void (*merge_f32)(const OwnShape&, const MergeRow<float>&, float* scratch);
  void (*merge_b16)(const OwnShape&, const MergeRow<bf16>&, float* scratch);
  void (*grads_f32)(const OwnShape&, const GradsRow<float>&, float* scratch);
  void (*grads_b16)(const OwnShape&, const GradsRow<bf16>&, float* scratch);
};

extern const OwnKeysKernels kOwnKeysPlain, kOwnKeysAvx2, kOwnKeysAvx512;

}  // namespace sf::cpu
