// Draws the chains of a packed batch for P-EAGLE (arXiv 2602.01469): which anchors look how deep.
//
//   loss_mask    [T]      u8    1: the position may be predicted
//   cu_seqlens   [N + 1]  i32   exclusive prefix sums of the samples' lengths: 0 ... T
//   sample_keys  [N]      i64   what tells one sample from another in every packing (64 bits)
//   anchors      [C]      i32   packed positions, by depth, ascending within a depth; C >=
//                               (depths - 1) * sum loss_mask is room; entries past
//                               cu_depths[depths - 1] stay as they were
//   cu_depths    [depths] i32   anchors of depth d = 1 ... depths - 1: [cu_depths[d - 1],
//                               cu_depths[d])
//
// Depth 0 is every position and not written. A sample with V positions of loss mask 1 keeps, at
// depth d, min(int(max(0, V - d) * max(ratio^d, min_ratio)), candidates) of its candidates,
// uniformly without replacement; a depth that keeps none ends the sample. Candidates are positions
// t >= d (offset in the sample) with loss mask 1: all at d = 1, later those whose predecessor t - 1
// was kept at depth d - 1. The anchor of t is t - d, so that the anchors of a depth are among those
// of the depth before.
// Kept are those with the smallest 64-bit keys, cod_key(...), a function of (seed, step, sample
// key, depth, offset) alone: neither the packing nor the number of ranks changes what is drawn.
// Host memory only, contiguous. depths >= 1. 0 < ratio <= 1, 0 <= min_ratio <= 1. 0 <= step < 2^32.
#pragma once

#include "core/philox.h"
#include "core/tensor_view.h"

namespace sf {

struct CodDraw {
  uint64_t seed;
  int64_t step;
  double ratio, min_ratio;
};

// Words 0 and 1 of Philox with counter (offset, step, sample key low, high), whose key is the same
// of counter (2^31 + depth, ...) and key `seed`: no offset reaches 2^31.
SF_HOST_DEVICE inline uint64_t cod_key(uint64_t seed, uint32_t step, uint64_t sample_key,
                                       uint32_t depth, uint32_t offset) {
  const auto draw = [=](uint32_t first, uint64_t key) {
    const uint32_t low = static_cast<uint32_t>(sample_key);
    const uint32_t high = static_cast<uint32_t>(sample_key >> 32);
    const Philox4x32 random = philox4x32({{first, step, low, high}}, key);
    return uint64_t{random.word[1]} << 32 | random.word[0];
  };
  return draw(offset, draw(0x80000000u + depth, seed));
}

void cod_chains(const TensorView& loss_mask, const TensorView& cu_seqlens,
                const TensorView& sample_keys, CodDraw draw, const TensorView& anchors,
                const TensorView& cu_depths);

}  // namespace sf
