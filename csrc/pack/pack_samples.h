// Gathers N samples, which lie anywhere in memory, into one packed batch without padding.
//
//   per sample k:   ids [S_k] i32, mask [S_k] u8, and F features, each [S_k, width_f]
//   ids        [T]           i64   T = sum S_k
//   mask       [T]           u8
//   positions  [T]           i64   from 0 in each sample
//   cu_seqlens [N + 1]       i32   exclusive prefix sums of S_k
//   features f [T, width_f]        any dtype, that of the sources, or decoded:
//
// Encoding fp8_e4m3_row: feature f of sample k is [S_k, width_f] u8 (e4m3fn) and its scales are
// [S_k, groups] f32, groups > 0 dividing width_f. Then features f is f32 | bf16 (on the CPU also
// f16), and element [t, w] = e4m3 value * scales[t, w / (width_f / groups)], rounded to nearest
// even. Samples with and without encoding may be mixed. `scales` of a sample: empty, or one view
// per feature, of rank 0 where the feature is not encoded.
//
// All contiguous. Outputs on the CPU: sources on the CPU too (the outputs may be pinned). Outputs
// on CUDA: sources on that device, or in page-locked host memory, which is the caller's promise.
// One launch per 64 tensors, no table in memory, no synchronisation: the sources must stay as they
// are until the stream has passed. Each byte is read once and written once; nothing is copied
// shifted
// (`ttt_maps` shifts indices instead). N = 0, S_k = 0 and F = 0 are fine.
#pragma once

#include <vector>

#include "core/tensor_view.h"

namespace sf {

struct PackSource {
  TensorView ids, mask;
  std::vector<TensorView> features;
  std::vector<TensorView> scales;
};

struct PackedViews {
  TensorView ids, mask, positions, cu_seqlens;
  std::vector<TensorView> features;
};

void pack_samples(const std::vector<PackSource>& samples, const PackedViews& out,
                  Stream stream = {});

// The same after the checks: what a backend implements.
namespace cpu {
void pack_samples(const std::vector<PackSource>& samples, const PackedViews& out, Stream);
}
namespace cuda {
void pack_samples(const std::vector<PackSource>& samples, const PackedViews& out, Stream stream);
}

// Feature f of a sample, encoded or not.
struct PackFeature {
  const TensorView& data;
  const TensorView* scales;  // nullptr: not encoded
};

inline PackFeature feature_of(const PackSource& sample, size_t f) {
  const bool encoded = f < sample.scales.size() && sample.scales[f].rank > 0;
  return {sample.features[f], encoded ? &sample.scales[f] : nullptr};
}

}  // namespace sf
