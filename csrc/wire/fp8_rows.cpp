#include "wire/fp8_rows.h"

#include "core/backends.h"
#include "core/check.h"

namespace sf {
namespace {

// The rows as numbers, and as codes and scales.
void check_rows(const char* op, const char* name, const TensorView& rows_view,
                const TensorView& payload, const TensorView& scale, const TensorView& row_crc,
                const TensorView& summary) {
  Dim rows{"rows"}, width{"width"}, two{"summary", 2};
  const Device device = rows_view.device;
  expect(op, name, rows_view).dtype({kF32, kBF16, kF16}).shape({&rows, &width}).contiguous();
  expect(op, "payload", payload).dtype({kU8}).shape({&rows, &width}).contiguous().device(device);
  expect(op, "scale", scale).dtype({kF32}).shape({&rows}).contiguous().device(device);
  expect(op, "row_crc", row_crc).dtype({kI32}).shape({&rows}).contiguous().device(device);
  expect(op, "summary", summary).dtype({kI64}).shape({&two}).contiguous().device(device);
  require(width < (int64_t{1} << 24), op, "width must be below 2^24", width);
}

}  // namespace

void fp8_pack(const Fp8Pack& args, Stream stream) {
  check_rows("fp8_pack", "x", args.x, args.payload, args.scale, args.row_crc, args.summary);
  backend("fp8_pack", args.x.device, &cpu::fp8_pack, SF_CUDA_FN(cuda::fp8_pack))(args, stream);
}

void fp8_unpack(const Fp8Unpack& args, Stream stream) {
  check_rows("fp8_unpack", "y", args.y, args.payload, args.scale, args.row_crc, args.summary);
  backend("fp8_unpack", args.y.device, &cpu::fp8_unpack, SF_CUDA_FN(cuda::fp8_unpack))(args,
                                                                                       stream);
}

}  // namespace sf
