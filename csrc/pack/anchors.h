// Draws the anchors of a packed batch: where blocks of the DFlash family (arXiv 2602.06036) begin.
//
//   loss_mask    [T]      u8    1: the position may be predicted
//   cu_seqlens   [N + 1]  i32   exclusive prefix sums of the samples' lengths: 0 ... T
//   sample_keys  [N]      i64   what tells one sample from another in every packing (64 bits)
//   anchors      [C]      i32   packed positions, ascending; C >= sum_k min(max_anchors,
//                               max(S_k - 1, 0)) is room; entries past cu_anchors[N] stay as they
//                               were
//   cu_anchors   [N + 1]  i32   exclusive prefix sums of the numbers drawn per sample
//
// Candidates of a sample: offsets t with loss_mask[t] = loss_mask[t + 1] = 1, both inside it. Each
// gets the 64-bit key anchor_key(...); the max_anchors smallest (key, offset) are drawn, which is
// uniform without replacement. A key depends on (seed, step, sample key, offset) alone, so neither
// the packing nor the number of ranks changes what is drawn.
// Host memory only, contiguous. max_anchors >= 1. 0 <= step < 2^32.
#pragma once

#include "core/philox.h"
#include "core/tensor_view.h"

namespace sf {

// Words 0 and 1 of Philox with key `seed` and counter (offset, step, sample key low, high).
SF_HOST_DEVICE inline uint64_t anchor_key(uint64_t seed, uint32_t step, uint64_t sample_key,
                                          uint32_t offset) {
  const Philox4x32 random = philox4x32(
      {{offset, step, static_cast<uint32_t>(sample_key), static_cast<uint32_t>(sample_key >> 32)}},
      seed);
  return uint64_t{random.word[1]} << 32 | random.word[0];
}

struct AnchorDraw {
  uint64_t seed;
  int64_t step, max_anchors;
};

void draw_anchors(const TensorView& loss_mask, const TensorView& cu_seqlens,
                  const TensorView& sample_keys, AnchorDraw draw, const TensorView& anchors,
                  const TensorView& cu_anchors);

}  // namespace sf
