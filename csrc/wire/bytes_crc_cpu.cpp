#include "core/crc32c.h"
#include "wire/bytes_crc.h"

namespace sf::cpu {

void bytes_crc(const BytesCrc& args, Stream) {
  const auto nbytes = static_cast<size_t>(args.data.shape[0]);
  args.crc.as<int64_t>()[0] = crc32c(args.data.as<const uint8_t>(), nbytes);
}

}  // namespace sf::cpu
