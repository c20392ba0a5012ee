// The state of a slot: one 64-bit word {generation:40 | state:8 | holders:16}, changed by CAS only.
//
//   FREE     --reserve (producer, generation + 1)-->  WRITING
//   WRITING  --publish (producer, release)-------->   READY      --abort-->  FREE
//   READY    --lease (first holder)--------------->   LEASED
//   LEASED   --release (last holder)-------------->   READY      until it is acknowledged
//   READY    --acknowledge------------------------>   FREE
//   LEASED   --acknowledge------------------------>   DRAINING   no new leases
//   DRAINING --release (last holder)-------------->   FREE
//
// `holders` has bit c set while consumer c holds at least one lease: the word alone says who reads,
// so that a consumer that died at any instruction is undone by one CAS a slot.
#pragma once

#include <cstdint>

namespace sf {

inline constexpr uint32_t kMaxConsumers = 16;
inline constexpr uint64_t kMaxGeneration = (uint64_t{1} << 40) - 1;

enum class SlotState : uint8_t { kFree = 0, kWriting = 1, kReady = 2, kLeased = 3, kDraining = 4 };

inline constexpr uint32_t kNumSlotStates = 5;

struct SlotWord {
  uint64_t generation = 0;
  SlotState state = SlotState::kFree;
  uint16_t holders = 0;

  static constexpr SlotWord unpack(uint64_t bits) {
    return {bits >> 24, static_cast<SlotState>((bits >> 16) & 0xff),
            static_cast<uint16_t>(bits & 0xffff)};
  }
  constexpr uint64_t pack() const {
    return (generation << 24) | (uint64_t{static_cast<uint8_t>(state)} << 16) | holders;
  }

  // A published sample of this generation that nobody has acknowledged.
  constexpr bool readable(uint64_t wanted) const {
    return generation == wanted && (state == SlotState::kReady || state == SlotState::kLeased);
  }
  constexpr SlotWord leased_by(uint32_t consumer) const {
    return {generation, SlotState::kLeased, static_cast<uint16_t>(holders | (1u << consumer))};
  }
  constexpr SlotWord released_by(uint32_t consumer) const {
    const auto rest = static_cast<uint16_t>(holders & ~(1u << consumer));
    if (rest != 0) return {generation, state, rest};
    return {generation, state == SlotState::kDraining ? SlotState::kFree : SlotState::kReady, 0};
  }
  constexpr SlotWord acknowledged() const {
    return {generation, holders == 0 ? SlotState::kFree : SlotState::kDraining, holders};
  }
};

}  // namespace sf
