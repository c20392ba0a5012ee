#include "core/launch.cuh"
#include "core/reduce.cuh"
#include "pack/block_mask.h"
#include "pack/block_mask_tile.h"

namespace sf::cuda {
namespace {

constexpr unsigned kThreads = 256;

struct Counts {
  int partial, full;

  static __device__ __forceinline__ Counts identity() { return {0, 0}; }
  __device__ __forceinline__ void merge(const Counts& other) {
    partial += other.partial;
    full += other.full;
  }
};

struct Shared {
  Counts partial[kMaxWarps];
};

struct ListPointers {
  int32_t *num_blocks, *indices, *full_num_blocks, *full_indices;
};

// Members first, the others after them, both ascending.
__device__ __forceinline__ void place(int32_t* row, int column, bool is_member, int before,
                                      int total) {
  row[is_member ? before : total + column - before] = column;
}

// Block r < Q writes row r of the kv lists, the others row r - Q of the q lists. A thread per
// column, twice: the members are counted before the first is placed. Reads the anchors of the row's
// tile (a few cache lines) and writes 8 bytes per tile, once each.
__global__ void __launch_bounds__(kThreads)
    block_mask_kernel(const BlockLayout layout, const ListPointers kv, const ListPointers q) {
  const int q_tiles = static_cast<int>(layout.q_tiles());
  const int kv_tiles = static_cast<int>(layout.kv_tiles());
  const bool is_kv = static_cast<int>(blockIdx.x) < q_tiles;
  const int row = is_kv ? blockIdx.x : blockIdx.x - q_tiles;
  const int columns = is_kv ? kv_tiles : q_tiles;
  // One by one: a reference to either parameter would put both into local memory.
  const ListPointers out{is_kv ? kv.num_blocks : q.num_blocks, is_kv ? kv.indices : q.indices,
                         is_kv ? kv.full_num_blocks : q.full_num_blocks,
                         is_kv ? kv.full_indices : q.full_indices};
  Counts(&scratch)[kMaxWarps] = shared_storage<Shared>().partial;
  const auto class_at = [&](int column) {
    return is_kv ? tile_class(layout, row, column) : tile_class(layout, column, row);
  };
  Counts total = Counts::identity();
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    const TileClass found = class_at(column);
    total.partial += found == TileClass::kPartial;
    total.full += found == TileClass::kFull;
  }
  total = block_reduce(total, scratch);
  __syncthreads();
  if (threadIdx.x == 0) {
    out.num_blocks[row] = total.partial;
    out.full_num_blocks[row] = total.full;
  }
  Counts passed = Counts::identity();
  for (int tile = 0; tile < columns; tile += blockDim.x) {
    const int column = tile + threadIdx.x;
    const TileClass found = column < columns ? class_at(column) : TileClass::kNone;
    const Counts mine{found == TileClass::kPartial, found == TileClass::kFull};
    const ScanResult<Counts> scan = block_scan(mine, scratch);
    Counts before = passed;
    before.merge(scan.before);
    passed.merge(scan.total);
    if (column >= columns) continue;
    const int64_t base = int64_t{row} * columns;
    place(out.indices + base, column, mine.partial, before.partial, total.partial);
    place(out.full_indices + base, column, mine.full, before.full, total.full);
  }
}

ListPointers pointers(const BlockMaskLists& lists) {
  return {lists.num_blocks.as<int32_t>(), lists.indices.as<int32_t>(),
          lists.full_num_blocks.as<int32_t>(), lists.full_indices.as<int32_t>()};
}

}  // namespace

void block_mask(const BlockMaskInputs& in, const BlockMaskOutputs& out, Stream stream) {
  const DeviceScope device(in.anchors.device);
  const BlockLayout layout = layout_of(in);
  const int64_t rows = layout.q_tiles() + layout.kv_tiles();
  if (rows == 0) return;
  launch({blocks_for_rows("block_mask", rows), threads_for(layout.kv_tiles(), kThreads),
          sizeof(Shared)},
         stream, block_mask_kernel, layout, pointers(out.kv), pointers(out.q));
}

}  // namespace sf::cuda
