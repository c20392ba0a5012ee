// The edges of slot_word.h that both sides take.
#pragma once

#include <string>

#include "core/error.h"
#include "transport/arena.h"
#include "transport/errors.h"

namespace sf {

// Replaces the word by change(word) unless change() throws. Returns the new word.
template <typename Change>
SlotWord change_word(Slot& slot, const Change& change) {
  uint64_t bits = slot.word.load(std::memory_order_acquire);
  for (;;) {
    const SlotWord next = change(SlotWord::unpack(bits));
    if (slot.word.compare_exchange_weak(bits, next.pack(), std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
      return next;
    }
  }
}

inline void expect_owning_process(const Mapping& mapping) {
  if (mapping.in_owning_process()) return;
  throw ArgumentError("arena: must be used by the process that opened it, got a forked child");
}

inline Slot& expect_slot(const Mapping& mapping, SlotRef ref) {
  const uint32_t max_slots = mapping.fixed().max_slots;
  if (ref.slot < max_slots) return mapping.slot(ref.slot);
  throw ArgumentError("arena: slot must be below " + std::to_string(max_slots) + ", got " +
                      std::to_string(ref.slot));
}

inline void expect_readable(SlotWord word, SlotRef ref) {
  if (word.readable(ref.generation)) return;
  const std::string slot = "slot " + std::to_string(ref.slot);
  const std::string generation = "generation " + std::to_string(ref.generation);
  if (word.generation != ref.generation) {
    throw StaleRef(slot + " holds generation " + std::to_string(word.generation) + ", wanted " +
                   generation);
  }
  throw StaleRef(
      slot + ", " + generation +
      (word.state == SlotState::kWriting ? " is not published yet" : " was acknowledged already"));
}

inline void acknowledge_slot(const Mapping& mapping, SlotRef ref) {
  expect_owning_process(mapping);
  const SlotWord word = change_word(expect_slot(mapping, ref), [&](SlotWord w) {
    expect_readable(w, ref);
    return w.acknowledged();
  });
  if (word.state == SlotState::kFree) mapping.signal_room();
}

// The last step of a lease, by its holder or by the reaper of a dead one.
inline void release_slot(const Mapping& mapping, uint32_t slot, uint32_t consumer) {
  const SlotWord word =
      change_word(mapping.slot(slot), [&](SlotWord w) { return w.released_by(consumer); });
  if (word.state == SlotState::kFree) mapping.signal_room();
}

}  // namespace sf
