#include "transport/arena.h"
#include "transport/slot_edges.h"

namespace sf {

Lease::Lease(std::shared_ptr<Consumer> consumer, SlotRef ref)
    : consumer_(std::move(consumer)), ref_(ref) {}

Lease::~Lease() {
  // Moved from, or copied into a forked child: the lease is not ours.
  if (consumer_ != nullptr && consumer_->mapping()->in_owning_process()) consumer_->release(ref_);
}

void Lease::locate(const Slot& slot) {
  const Mapping& mapping = *consumer_->mapping();
  const uint64_t capacity = mapping.fixed().payload_bytes;
  const uint64_t offset = slot.offset;
  const uint64_t nbytes = slot.nbytes;
  if (offset % kPageBytes != 0 || offset > capacity || nbytes > capacity - offset) {
    throw CorruptFeature("slot " + std::to_string(ref_.slot) + " claims " + std::to_string(nbytes) +
                         " bytes at " + std::to_string(offset) + " of a payload of " +
                         std::to_string(capacity));
  }
  data_ = mapping.payload() + offset;
  nbytes_ = nbytes;
}

Consumer::Consumer(std::shared_ptr<Mapping> mapping, uint32_t id, uint64_t identity)
    : mapping_(std::move(mapping)),
      id_(id),
      identity_(identity),
      num_leases_(mapping_->fixed().max_slots) {}

std::shared_ptr<Consumer> Consumer::join(std::shared_ptr<Mapping> mapping) {
  expect_owning_process(*mapping);
  const uint64_t identity = mapping->reader_identity();
  for (uint32_t id = 0; id < kMaxConsumers; ++id) {
    uint64_t nobody = 0;
    if (mapping->header().consumers[id].compare_exchange_strong(nobody, identity)) {
      return std::shared_ptr<Consumer>(new Consumer(std::move(mapping), id, identity));
    }
  }
  throw TransportError("arena " + mapping->address().text() + ": all " +
                       std::to_string(kMaxConsumers) + " places for readers are taken");
}

Consumer::~Consumer() {
  if (!mapping_->in_owning_process()) return;
  // Every lease holds this object alive, so none is left.
  uint64_t identity = identity_;
  mapping_->header().consumers[id_].compare_exchange_strong(identity, 0);
}

Lease Consumer::lease(SlotRef ref) {
  expect_owning_process(*mapping_);
  Slot& slot = expect_slot(*mapping_, ref);
  {
    const std::lock_guard lock(mutex_);
    change_word(slot, [&](SlotWord word) {
      expect_readable(word, ref);
      return word.leased_by(id_);
    });
    ++num_leases_[ref.slot];
  }
  Lease lease(shared_from_this(), ref);
  lease.locate(slot);
  return lease;
}

void Consumer::acknowledge(SlotRef ref) { acknowledge_slot(*mapping_, ref); }

void Consumer::release(SlotRef ref) {
  const std::lock_guard lock(mutex_);
  if (--num_leases_[ref.slot] == 0) release_slot(*mapping_, ref.slot, id_);
}

uint32_t Consumer::reap() {
  expect_owning_process(*mapping_);
  if (mapping_->producer_alive()) return 0;
  uint32_t num_freed = 0;
  for (uint32_t i = 0; i < mapping_->fixed().max_slots; ++i) {
    std::atomic<uint64_t>& shared = mapping_->slot(i).word;
    uint64_t bits = shared.load(std::memory_order_acquire);
    const SlotWord word = SlotWord::unpack(bits);
    if (word.state != SlotState::kWriting) continue;
    // Only the producer writes and it is gone: one try decides between several reapers.
    const SlotWord freed{word.generation % kMaxGeneration + 1, SlotState::kFree, 0};
    num_freed += shared.compare_exchange_strong(bits, freed.pack());
  }
  return num_freed;
}

}  // namespace sf
