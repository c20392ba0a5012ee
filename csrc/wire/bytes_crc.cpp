#include "wire/bytes_crc.h"

#include "core/backends.h"
#include "core/check.h"

namespace sf {

void bytes_crc(const BytesCrc& args, Stream stream) {
  Dim nbytes{"nbytes"}, one{"crc", 1};
  const Device device = args.data.device;
  expect("bytes_crc", "data", args.data).dtype({kU8}).shape({&nbytes}).contiguous();
  Dim parts{"parts", (args.data.shape[0] + kCrcPartBytes - 1) / kCrcPartBytes};
  expect("bytes_crc", "part_crc", args.part_crc)
      .dtype({kI32})
      .shape({&parts})
      .contiguous()
      .device(device);
  expect("bytes_crc", "crc", args.crc).dtype({kI64}).shape({&one}).contiguous().device(device);
  backend("bytes_crc", device, &cpu::bytes_crc, SF_CUDA_FN(cuda::bytes_crc))(args, stream);
}

}  // namespace sf
