#include <vector>

#include "pack/block_mask.h"
#include "pack/block_mask_tile.h"
#include "pack/bounds.h"

namespace sf::cpu {
namespace {

constexpr const char* kOp = "block_mask";

void check_places(const BlockLayout& l) {
  for (int64_t k = 0; k < l.samples; ++k) {
    for (int64_t b = l.cu_anchors[k]; b < l.cu_anchors[k + 1]; ++b) {
      require(l.anchors[b] >= l.cu_seqlens[k] && l.anchors[b] < l.cu_seqlens[k + 1], kOp,
              "each anchor must lie inside its sample", l.anchors[b]);
    }
  }
}

// One row of one kind: the columns of that class, then the others.
template <class ClassAt>
void write_row(TileClass wanted, int64_t columns, ClassAt class_at, int32_t* count,
               int32_t* indices) {
  int64_t at = 0;
  for (const bool is_member : {true, false}) {
    for (int64_t j = 0; j < columns; ++j) {
      if ((class_at(j) == wanted) == is_member) indices[at++] = static_cast<int32_t>(j);
    }
    if (is_member) *count = static_cast<int32_t>(at);
  }
}

template <class ClassAt>
void write_lists(const BlockMaskLists& out, int64_t rows, int64_t columns, ClassAt class_at) {
  for (int64_t i = 0; i < rows; ++i) {
    const auto at = [&](int64_t j) { return class_at(i, j); };
    write_row(TileClass::kPartial, columns, at, out.num_blocks.as<int32_t>() + i,
              out.indices.as<int32_t>() + i * columns);
    write_row(TileClass::kFull, columns, at, out.full_num_blocks.as<int32_t>() + i,
              out.full_indices.as<int32_t>() + i * columns);
  }
}

}  // namespace

void block_mask(const BlockMaskInputs& in, const BlockMaskOutputs& out, Stream) {
  const BlockLayout layout = layout_of(in);
  require_prefix_sums(kOp, "cu_anchors", in.cu_anchors, layout.blocks);
  require_prefix_sums(kOp, "cu_seqlens", in.cu_seqlens, layout.context);
  check_places(layout);
  const int64_t rows = layout.q_tiles(), columns = layout.kv_tiles();
  std::vector<TileClass> classes(static_cast<size_t>(rows * columns));
#pragma omp parallel for if (rows * columns > 4096)
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) classes[i * columns + j] = tile_class(layout, i, j);
  }
  write_lists(out.kv, rows, columns,
              [&](int64_t i, int64_t j) { return classes[i * columns + j]; });
  write_lists(out.q, columns, rows, [&](int64_t i, int64_t j) { return classes[j * columns + i]; });
}

}  // namespace sf::cpu
