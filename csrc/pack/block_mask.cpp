#include "pack/block_mask.h"

#include <limits>

#include "core/backends.h"
#include "core/check.h"
#include "pack/block_mask_tile.h"

namespace sf {
namespace {

constexpr const char* kOp = "block_mask";

void check(const BlockMaskInputs& in, const BlockMaskOutputs& out) {
  const Device device = in.anchors.device;
  const auto arg = [&](const char* name, const TensorView& view, std::initializer_list<Dim*> dims) {
    expect(kOp, name, view).dtype({kI32}).shape(dims).contiguous().device(device);
  };
  Dim blocks{"A"}, bounds{"N+1"};
  arg("anchors", in.anchors, {&blocks});
  arg("cu_anchors", in.cu_anchors, {&bounds});
  arg("cu_seqlens", in.cu_seqlens, {&bounds});
  const BlockMaskShape& shape = in.shape;
  require(bounds >= 1, kOp, "cu_seqlens must hold N+1 entries, at least 1", bounds);
  require(blocks == 0 || bounds >= 2, kOp, "anchors must be none without samples", blocks);
  require(shape.context >= 0, kOp, "context must be at least 0", shape.context);
  require(shape.block_size >= 1, kOp, "block_size must be at least 1", shape.block_size);
  require(shape.window >= 0, kOp, "window must be at least 1, or 0 for none", shape.window);
  require(shape.q_tile >= 1, kOp, "q_tile must be at least 1", shape.q_tile);
  require(shape.kv_tile >= 1, kOp, "kv_tile must be at least 1", shape.kv_tile);
  const BlockLayout layout = layout_of(in);
  require(layout.keys() <= std::numeric_limits<int32_t>::max(), kOp,
          "T + A * block_size must be below 2^31", layout.keys());
  Dim q{"Q", layout.q_tiles()}, k{"K", layout.kv_tiles()};
  arg("kv_num_blocks", out.kv.num_blocks, {&q});
  arg("kv_indices", out.kv.indices, {&q, &k});
  arg("full_kv_num_blocks", out.kv.full_num_blocks, {&q});
  arg("full_kv_indices", out.kv.full_indices, {&q, &k});
  arg("q_num_blocks", out.q.num_blocks, {&k});
  arg("q_indices", out.q.indices, {&k, &q});
  arg("full_q_num_blocks", out.q.full_num_blocks, {&k});
  arg("full_q_indices", out.q.full_indices, {&k, &q});
}

}  // namespace

void block_mask(const BlockMaskInputs& in, const BlockMaskOutputs& out, Stream stream) {
  check(in, out);
  backend(kOp, in.anchors.device, &cpu::block_mask, SF_CUDA_FN(cuda::block_mask))(in, out, stream);
}

}  // namespace sf
