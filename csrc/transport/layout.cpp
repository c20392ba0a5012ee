#include "transport/layout.h"

#include <string>

#include "core/error.h"

namespace sf {
namespace {

uint64_t round_up(uint64_t n) { return (n + kPageBytes - 1) / kPageBytes * kPageBytes; }

void expect_field(const char* field, uint64_t wanted, uint64_t got) {
  if (wanted == got) return;
  throw ArgumentError(std::string("arena: header.") + field + " must be " + std::to_string(wanted) +
                      ", got " + std::to_string(got));
}

void expect_range(const char* field, uint64_t low, uint64_t high, uint64_t got) {
  if (low <= got && got <= high) return;
  throw ArgumentError(std::string("arena: ") + field + " must be " + std::to_string(low) + ".." +
                      std::to_string(high) + ", got " + std::to_string(got));
}

}  // namespace

FixedHeader make_header(uint64_t payload_bytes, uint32_t max_slots, PayloadPlace place) {
  expect_range("capacity_bytes", 1, kMaxPayloadBytes, payload_bytes);
  expect_range("max_slots", 1, kMaxSlots, max_slots);
  FixedHeader header{};
  header.magic = kArenaMagic;
  header.version = kArenaVersion;
  header.max_slots = max_slots;
  header.control_bytes = kPageBytes + round_up(uint64_t{max_slots} * sizeof(Slot));
  header.payload_bytes = round_up(payload_bytes);
  header.total_bytes = header.control_bytes;
  if (place == PayloadPlace::kFile) header.total_bytes += header.payload_bytes;
  header.place = place;
  return header;
}

void check_header(const FixedHeader& header, uint64_t file_bytes) {
  expect_field("magic", kArenaMagic, header.magic);
  expect_field("version", kArenaVersion, header.version);
  // Both counts are bounded first, so that the sizes computed from them cannot overflow.
  expect_range("header.place", 0, 1, static_cast<uint64_t>(header.place));
  const FixedHeader wanted = make_header(header.payload_bytes, header.max_slots, header.place);
  expect_field("payload_bytes", wanted.payload_bytes, header.payload_bytes);
  expect_field("control_bytes", wanted.control_bytes, header.control_bytes);
  expect_field("total_bytes", wanted.total_bytes, header.total_bytes);
  expect_field("total_bytes", file_bytes, header.total_bytes);
  expect_range("header.epoch", 1, UINT64_MAX, header.epoch);
  expect_range("header.producer_pid", 1, INT32_MAX, static_cast<uint64_t>(header.producer_pid));
}

}  // namespace sf
