// crc32c of bytes where they lie, so that those of a GPU need not come to the host for it.
//
//   data      [nbytes]                       u8
//   part_crc  [ceil(nbytes / kCrcPartBytes)]  i32  workspace of CUDA; the CPU leaves it alone
//   crc       [1]                            i64  core/crc32c.h
//
// All contiguous, on one device. Reads every byte once. Deterministic.
#pragma once

#include "core/tensor_view.h"

namespace sf {

inline constexpr int64_t kCrcPartBytes = 64 << 10;  // what one block of CUDA takes

struct BytesCrc {
  TensorView data, part_crc, crc;
};
void bytes_crc(const BytesCrc& args, Stream stream = {});

namespace cpu {
void bytes_crc(const BytesCrc& args, Stream);
}  // namespace cpu
namespace cuda {
void bytes_crc(const BytesCrc& args, Stream stream);
}  // namespace cuda

}  // namespace sf
