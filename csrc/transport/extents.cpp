#include "transport/extents.h"

#include <algorithm>

#include "transport/layout.h"

namespace sf {

Extents::Extents(uint64_t payload_bytes) : free_{{0, payload_bytes}}, free_bytes_(payload_bytes) {}

uint64_t Extents::extent_bytes(uint64_t nbytes) {
  return std::max<uint64_t>(1, nbytes / kPageBytes + (nbytes % kPageBytes != 0)) * kPageBytes;
}

std::optional<Extent> Extents::take(uint64_t nbytes) {
  const uint64_t wanted = extent_bytes(nbytes);
  auto best = free_.end();
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    if (it->second >= wanted && (best == free_.end() || it->second < best->second)) best = it;
  }
  if (best == free_.end()) return std::nullopt;
  const Extent extent{best->first, wanted};
  const uint64_t rest = best->second - wanted;
  free_.erase(best);
  if (rest != 0) free_.emplace(extent.offset + wanted, rest);
  free_bytes_ -= wanted;
  return extent;
}

void Extents::give_back(const Extent& extent) {
  free_bytes_ += extent.nbytes;
  auto [it, inserted] = free_.emplace(extent.offset, extent.nbytes);
  if (const auto next = std::next(it);
      next != free_.end() && it->first + it->second == next->first) {
    it->second += next->second;
    free_.erase(next);
  }
  if (it == free_.begin()) return;
  if (const auto before = std::prev(it); before->first + before->second == it->first) {
    before->second += it->second;
    free_.erase(it);
  }
}

uint64_t Extents::largest_free_bytes() const {
  uint64_t largest = 0;
  for (const auto& [offset, nbytes] : free_) largest = std::max(largest, nbytes);
  return largest;
}

}  // namespace sf
