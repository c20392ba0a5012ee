// Mutants of refs' binary form against its parser: what is accepted is written as it came.
// Arguments: number of inputs, seed, a file with a ref. Prints "ok" and exits 0, or throws.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>

#include "core/crc32c.h"
#include "transport/sample_ref.h"

namespace {

std::string sealed(std::string body) {
  const uint32_t crc = sf::crc32c(body.data(), body.size());
  return body.append(reinterpret_cast<const char*>(&crc), sizeof crc);
}

std::string mutant(std::string body, std::mt19937_64& random) {
  for (uint64_t changes = random() % 4; changes > 0 && !body.empty(); --changes) {
    const size_t at = random() % body.size();
    switch (random() % 4) {
      case 0:
        body[at] = static_cast<char>(body[at] ^ (1 << random() % 8));
        break;
      case 1:
        body.resize(at);
        break;
      case 2:
        body.insert(at, body.substr(at, random() % 100));
        break;
      default:
        std::memset(body.data() + at, random() % 2 == 0 ? 0xff : 0,
                    std::min<size_t>(random() % 9, body.size() - at));
    }
  }
  return body;
}

}  // namespace

int main(int, char** argv) {
  std::ifstream file(argv[3], std::ios::binary);
  const std::string seed{std::istreambuf_iterator<char>(file), {}};
  const std::string body = seed.substr(0, seed.size() - sizeof(uint32_t));
  uint64_t accepted = 0;
  const uint64_t num_inputs = std::strtoull(argv[1], nullptr, 10);
  for (uint64_t i = 0; i < num_inputs; ++i) {
    std::mt19937_64 random(std::strtoull(argv[2], nullptr, 10) + i);
    const std::string made = sealed(mutant(body, random));
    // Memory of exactly this size, so that a read beyond it is seen.
    const auto exact = std::make_unique<char[]>(made.size());
    std::memcpy(exact.get(), made.data(), made.size());
    const std::string_view data(exact.get(), made.size());
    const auto ref = sf::ref_from_bytes(data);
    if (!ref) continue;
    ++accepted;
    if (sf::ref_to_bytes(*ref) != data) throw std::runtime_error("another spelling was accepted");
  }
  if (accepted == 0 || accepted == num_inputs) throw std::runtime_error("all or nothing accepted");
  std::cout << accepted << " of " << num_inputs << " accepted\nok\n";
}
