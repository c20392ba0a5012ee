// Gathers N samples, which lie anywhere in host memory, into one packed batch without padding.
//
//   per sample k:   ids [S_k] i32, mask [S_k] u8, and F features, each [S_k, width_f], any dtype
//   ids        [T]           i64   T = sum S_k
//   mask       [T]           u8
//   positions  [T]           i64   from 0 in each sample
//   cu_seqlens [N + 1]       i32   exclusive prefix sums of S_k
//   features f [T, width_f]        the dtype of the sources
//
// Host memory only (the outputs may be pinned). Contiguous. Moves each byte once: large batches
// with all OpenMP threads. N = 0, S_k = 0 and F = 0 are fine.
#pragma once

#include <vector>

#include "core/tensor_view.h"

namespace sf {

struct PackSource {
  TensorView ids, mask;
  std::vector<TensorView> features;
};

struct PackedViews {
  TensorView ids, mask, positions, cu_seqlens;
  std::vector<TensorView> features;
};

void pack_samples(const std::vector<PackSource>& samples, const PackedViews& out);

}  // namespace sf
