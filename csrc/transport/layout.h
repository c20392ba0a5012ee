// The bytes of an arena, as another process finds them. Everything is little-endian and fixed at
// creation; only the atomics change.
//
//   [0, 4096)                      Header
//   [4096, control_bytes)          max_slots Slots
//   [control_bytes, total_bytes)   payload, in pages of 4096 bytes; nothing if that lies in the
//                                  memory of a GPU
//
// An attacher takes one copy of the fixed fields, checks all of them against the file, and never
// reads them from shared memory again.
#pragma once

#include <atomic>
#include <cstdint>

#include "transport/slot_word.h"

namespace sf {

inline constexpr uint64_t kPageBytes = 4096;
inline constexpr uint64_t kArenaMagic = 0x31414e4552414653;  // "SFARENA1"
inline constexpr uint32_t kArenaVersion = 2;
inline constexpr uint32_t kMaxSlots = 1u << 20;
inline constexpr uint64_t kMaxPayloadBytes = uint64_t{1} << 46;

static_assert(std::atomic<uint64_t>::is_always_lock_free, "slot words are shared by processes");

enum class PayloadPlace : uint64_t { kFile = 0, kDevice = 1 };

struct FixedHeader {
  uint64_t magic;
  uint32_t version;
  uint32_t max_slots;
  uint64_t control_bytes;
  uint64_t payload_bytes;
  uint64_t total_bytes;
  uint64_t epoch;           // random, other than 0, new with every arena
  int64_t producer_pid;     // in the producer's own pid namespace
  uint64_t producer_start;  // clock ticks after boot
  PayloadPlace place;
};

// 0: nobody. Else who reads, set and cleared by one CAS:
//   {start time, low 32 bits | pid, 32 bits}        attached by /proc, in the producer's namespace
//   {running number, 32 bits | kGuestFlag}          let in at the socket, the producer has its
//   pidfd
using ConsumerWord = std::atomic<uint64_t>;

inline constexpr uint64_t kGuestFlag = uint64_t{1} << 31;  // no pid reaches this
constexpr uint64_t guest_identity(uint32_t number) { return uint64_t{number} << 32 | kGuestFlag; }
constexpr bool is_guest(uint64_t identity) { return (identity & kGuestFlag) != 0; }

struct Header {
  FixedHeader fixed;
  alignas(64) std::atomic<uint32_t> room;  // futex: counts the slots that became FREE
  std::atomic<uint32_t> room_waiters;
  alignas(64) ConsumerWord consumers[kMaxConsumers];
};
static_assert(sizeof(Header) <= kPageBytes);

struct alignas(64) Slot {
  std::atomic<uint64_t> word;
  // Written by the producer in WRITING, read under a lease.
  uint64_t offset;  // from the start of the payload
  uint64_t nbytes;
};
static_assert(sizeof(Slot) == 64);

// The header of an arena of this size. ArgumentError if a size is 0 or beyond its limit.
FixedHeader make_header(uint64_t payload_bytes, uint32_t max_slots,
                        PayloadPlace place = PayloadPlace::kFile);

// Bytes of another process may be hostile. ArgumentError says which field is wrong.
void check_header(const FixedHeader& header, uint64_t file_bytes);

}  // namespace sf
