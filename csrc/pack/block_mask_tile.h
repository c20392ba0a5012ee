// What a tile of the block mask is: the arithmetic that both backends share.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "pack/block_mask.h"

namespace sf {

struct BlockLayout {
  const int32_t *anchors, *cu_anchors, *cu_seqlens;
  int64_t samples, blocks, context, block_size, window, q_tile, kv_tile;

  SF_HOST_DEVICE int64_t queries() const { return blocks * block_size; }
  SF_HOST_DEVICE int64_t keys() const { return context + queries(); }
  SF_HOST_DEVICE int64_t q_tiles() const { return (queries() + q_tile - 1) / q_tile; }
  SF_HOST_DEVICE int64_t kv_tiles() const { return (keys() + kv_tile - 1) / kv_tile; }
};

inline BlockLayout layout_of(const BlockMaskInputs& in) {
  return {in.anchors.as<const int32_t>(),
          in.cu_anchors.as<const int32_t>(),
          in.cu_seqlens.as<const int32_t>(),
          in.cu_anchors.shape[0] - 1,
          in.anchors.shape[0],
          in.shape.context,
          in.shape.block_size,
          in.shape.window,
          in.shape.q_tile,
          in.shape.kv_tile};
}

enum class TileClass : uint8_t { kNone, kPartial, kFull };

SF_HOST_DEVICE inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
SF_HOST_DEVICE inline int64_t greater(int64_t a, int64_t b) { return a < b ? b : a; }

// Where the sample of a block begins: the last sample whose anchors begin at or before it.
SF_HOST_DEVICE inline int64_t sample_begin(const BlockLayout& l, int64_t block) {
  int64_t low = 0, high = l.samples;  // cu_anchors[low] <= block < cu_anchors[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (l.cu_anchors[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return l.cu_seqlens[low];
}

// Within a block both edges of what a query sees move one way with its slot: the lowest slot of the
// tile sees most of the context and, of a sliding layer, least of the block; the highest slot the
// reverse. So two slots per block decide.
SF_HOST_DEVICE inline TileClass tile_class(const BlockLayout& l, int64_t row, int64_t column) {
  const int64_t q_begin = row * l.q_tile, q_end = lesser(q_begin + l.q_tile, l.queries());
  const int64_t begin = column * l.kv_tile, end = lesser(begin + l.kv_tile, l.keys());
  const int64_t context_end = lesser(end, l.context), own_begin = greater(begin, l.context);
  bool any = false, full = q_end - q_begin == l.q_tile && end - begin == l.kv_tile;
  for (int64_t b = q_begin / l.block_size; b * l.block_size < q_end; ++b) {
    const int64_t first = greater(q_begin - b * l.block_size, 0);
    const int64_t last = lesser(q_end - b * l.block_size, l.block_size) - 1;
    const int64_t anchor = l.anchors[b], own = l.context + b * l.block_size;
    const bool sliding = l.window > 0;
    const int64_t sample = sample_begin(l, b);
    const int64_t widest = sliding ? greater(sample, anchor + first - (l.window - 1)) : sample;
    const int64_t narrowest = sliding ? greater(sample, anchor + last - (l.window - 1)) : sample;
    const int64_t own_most = own + (sliding ? last + 1 : l.block_size);
    const int64_t own_least = own + (sliding ? first + 1 : l.block_size);
    any |= greater(widest, begin) < lesser(anchor, context_end) ||
           greater(own, own_begin) < lesser(own_most, end);
    full &= begin >= context_end || (narrowest <= begin && context_end <= anchor);
    full &= own_begin >= end || (own <= own_begin && end <= own_least);
    if (any && !full) return TileClass::kPartial;
  }
  return full ? TileClass::kFull : any ? TileClass::kPartial : TileClass::kNone;
}

}  // namespace sf
