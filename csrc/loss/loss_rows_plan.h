// Which kernel runs a row of loss_rows on CUDA. Host code; a pure function, so that it can be
// tested without a device.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "loss/loss_rows.h"

namespace sf::cuda {

// How a kernel gets at its two rows.
enum class Access : uint8_t {
  kHeld,      // both rows stay in registers
  kStreamed,  // 16-byte vectors, read again in every later pass (from L2)
  kScalar,    // the same, one element at a time: rows that are not all 16-byte aligned
};

struct RowPlan {
  Access access = Access::kScalar;
  unsigned cluster = 1;  // blocks that share a row: 1, or 2, 4, 8 of kHeld
};

struct RowTraits {
  int capability_major = 8;  // of the device
  int64_t vocab = 0;
  DType student = kBF16, teacher = kBF16;  // equal where there is no teacher
  bool aligned = true;  // every row starts at a multiple of 16 bytes and has whole chunks
};

constexpr unsigned kHeldThreads = 1024;

// Elements of each of its two rows that one thread keeps, raw: 16 + 16 of the 64 registers that a
// thread of a 1024-thread block may have.
constexpr int64_t held_elements(DType dtype) {
  return 64 / static_cast<int64_t>(dtype_size(dtype));
}

// A row that fits one block's registers is held there (bf16: 32768 elements, f32: 16384); a longer
// one by the smallest cluster that holds it, where the device has clusters (bf16: 262144, f32:
// 131072); else it is streamed. The border between one block and a cluster is where registers end,
// not a measured one: neither path has been timed on a GPU.
constexpr RowPlan plan_rows(const RowTraits& row) {
  if (!row.aligned) return {Access::kScalar};
  if (row.student != row.teacher) return {Access::kStreamed};
  const int64_t one_block = held_elements(row.student) * kHeldThreads;
  for (unsigned cluster = 1; cluster <= (row.capability_major >= 9 ? 8u : 1u); cluster *= 2) {
    if (row.vocab <= one_block * cluster) return {Access::kHeld, cluster};
  }
  return {Access::kStreamed};
}

// loss_rows by the kernels that the plan names. The row must fit them.
void loss_rows_planned(const LossRows& args, const LossSpec& spec, const RowPlan& plan,
                       Stream stream);

// The cluster part of it: logits and teacher of one dtype, aligned.
void loss_rows_cluster(const LossRows& args, const LossSpec& spec, unsigned cluster, Stream stream);

}  // namespace sf::cuda
