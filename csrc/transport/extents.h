// Which pages of the payload are free. Lives in the producer alone.
#pragma once

#include <cstdint>
#include <map>
#include <optional>

namespace sf {

struct Extent {
  uint64_t offset;
  uint64_t nbytes;  // a multiple of the page
};

// Best fit, lowest offset among equals; neighbours coalesce when they come back. Pages that were in
// use lately are used again first, while they are warm.
class Extents {
 public:
  explicit Extents(uint64_t payload_bytes);

  // What a sample of so many bytes takes: whole pages, at least one.
  static uint64_t extent_bytes(uint64_t nbytes);

  // Nothing if no free extent is long enough.
  std::optional<Extent> take(uint64_t nbytes);
  void give_back(const Extent& extent);

  uint64_t free_bytes() const { return free_bytes_; }
  uint64_t largest_free_bytes() const;

 private:
  std::map<uint64_t, uint64_t> free_;  // offset -> length
  uint64_t free_bytes_;
};

}  // namespace sf
