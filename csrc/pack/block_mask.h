// Which tiles of block attention (DFlash family, arXiv 2602.06036) hold a visible pair: the tensors
// of torch.nn.attention.flex_attention.BlockMask, without the [queries, keys] mask they summarise.
//
// A blocks of B rows. Query q = b * B + slot stands at packed position anchors[b] + slot. Keys: the
// T context rows, then the A * B block rows. The query of block b, of a sample that begins at s,
// sees
//   context rows c with     max(s, anchor + slot - (window - 1)) <= c < anchor     (full: s <= c)
//   its own block's rows    at slots 0 .. slot                                (full: 0 .. B - 1)
// and nothing else. window = 0: full attention.
//
//   anchors     [A]      i32   packed positions, each inside the sample that cu_anchors gives it
//   cu_anchors  [N + 1]  i32   exclusive prefix sums of the anchors per sample: 0 ... A
//   cu_seqlens  [N + 1]  i32   exclusive prefix sums of the samples' lengths: 0 ... T
//
// Tiles are q_tile queries by kv_tile keys; Q = ceil(A B / q_tile), K = ceil((T + A B) / kv_tile).
// A tile is full if it lies inside the matrix and all its pairs are visible, else partial if one
// is.
//   kv_num_blocks       [Q]     i32   partial tiles of the row
//   kv_indices          [Q, K]  i32   their columns, ascending, then all other columns, ascending
//   full_kv_num_blocks, full_kv_indices          the same for full tiles
//   q_num_blocks [K], q_indices [K, Q], full_q_num_blocks, full_q_indices        transposed
//
// All contiguous, on one device. T + A B < 2^31. On CUDA the prefix sums and the places of the
// anchors are the caller's promise; on the CPU they are checked.
#pragma once

#include "core/tensor_view.h"

namespace sf {

struct BlockMaskShape {
  int64_t context, block_size, window, q_tile, kv_tile;
};

struct BlockMaskInputs {
  TensorView anchors, cu_anchors, cu_seqlens;
  BlockMaskShape shape;
};

struct BlockMaskLists {
  TensorView num_blocks, indices, full_num_blocks, full_indices;
};

struct BlockMaskOutputs {
  BlockMaskLists kv, q;
};

void block_mask(const BlockMaskInputs& in, const BlockMaskOutputs& out, Stream stream = {});

// The same after the checks: what a backend implements.
namespace cpu {
void block_mask(const BlockMaskInputs& in, const BlockMaskOutputs& out, Stream);
}  // namespace cpu
namespace cuda {
void block_mask(const BlockMaskInputs& in, const BlockMaskOutputs& out, Stream stream);
}  // namespace cuda

}  // namespace sf
