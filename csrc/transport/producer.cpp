#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "transport/arena.h"
#include "transport/process.h"
#include "transport/slot_edges.h"

namespace sf {
namespace {

using Clock = std::chrono::steady_clock;

// The attendant wakes us when a reader ends. One that attached through /proc after we looked is not
// watched yet, and an old kernel has no pidfds: after so long we look for ourselves.
constexpr double kWaitSliceS = 0.2;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Counts the caller as a waiter, so that readers know that a wake-up is wanted.
class Waiter {
 public:
  explicit Waiter(std::atomic<uint32_t>& waiters) : waiters_(waiters) { waiters_.fetch_add(1); }
  ~Waiter() { waiters_.fetch_sub(1); }
  Waiter(const Waiter&) = delete;
  Waiter& operator=(const Waiter&) = delete;

 private:
  std::atomic<uint32_t>& waiters_;
};

// Returns at a wake-up, at a change of `room` that has happened already, at a signal or in time.
void wait_for_change(std::atomic<uint32_t>& room, uint32_t seen, double seconds) {
  timespec limit;
  limit.tv_sec = static_cast<time_t>(seconds);
  limit.tv_nsec = static_cast<long>((seconds - std::floor(seconds)) * 1e9);
  ::syscall(SYS_futex, &room, FUTEX_WAIT, seen, &limit, nullptr, 0);
}

}  // namespace

Reservation::Reservation(std::shared_ptr<Producer> producer, SlotRef ref, std::byte* data,
                         uint64_t nbytes)
    : producer_(std::move(producer)), ref_(ref), data_(data), nbytes_(nbytes) {}

Reservation::~Reservation() {
  // Moved from, or copied into a forked child: the slot is not ours.
  if (producer_ != nullptr && open_ && producer_->mapping()->in_owning_process()) abort();
}

void Reservation::publish() { leave(SlotState::kReady); }

void Reservation::abort() {
  leave(SlotState::kFree);
  producer_->mapping()->signal_room();
}

void Reservation::leave(SlotState state) {
  expect_owning_process(*producer_->mapping());
  if (!open_) throw ArgumentError("arena: reservation must be open, it was published or aborted");
  open_ = false;
  const SlotWord next{ref_.generation, state, 0};
  change_word(producer_->mapping()->slot(ref_.slot), [&](SlotWord) { return next; });
}

// A place in the queue of those who wait for room.
class Producer::Turn {
 public:
  explicit Turn(Producer& producer) : producer_(producer) {
    const std::lock_guard lock(producer_.mutex_);
    producer_.queue_.push_back(this);
  }
  ~Turn() {
    {
      const std::lock_guard lock(producer_.mutex_);
      std::erase(producer_.queue_, this);
    }
    // Whoever is in front now may find room that was not enough for us, or was left over.
    producer_.mapping_->signal_room();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  Producer& producer_;
};

Producer::Producer(std::shared_ptr<Mapping> mapping, Watermarks marks)
    : mapping_(std::move(mapping)),
      extents_(mapping_->fixed().payload_bytes),
      credits_(mapping_->fixed().payload_bytes, marks),
      taken_(mapping_->fixed().max_slots, Extent{0, 0}),
      attendant_(mapping_, [this] { reap(); }) {
  for (uint32_t i = mapping_->fixed().max_slots; i > 0; --i) free_slots_.push_back(i - 1);
}

std::shared_ptr<Producer> Producer::create(uint64_t capacity_bytes, uint32_t max_slots,
                                           Watermarks marks) {
  return std::shared_ptr<Producer>(new Producer(Mapping::create(capacity_bytes, max_slots), marks));
}

std::shared_ptr<Producer> Producer::create_on_device(int device, uint64_t capacity_bytes,
                                                     uint32_t max_slots, Watermarks marks) {
  return std::shared_ptr<Producer>(
      new Producer(Mapping::create_on_device(device, capacity_bytes, max_slots), marks));
}

void Producer::reclaim_locked() {
  for (uint32_t i = 0; i < taken_.size(); ++i) {
    if (taken_[i].nbytes == 0) continue;
    const uint64_t bits = mapping_->slot(i).word.load(std::memory_order_acquire);
    if (SlotWord::unpack(bits).state != SlotState::kFree) continue;
    extents_.give_back(taken_[i]);
    taken_[i].nbytes = 0;
    free_slots_.push_back(i);
  }
}

std::optional<Reservation> Producer::try_acquire(uint64_t nbytes, const Turn* turn) {
  const std::lock_guard lock(mutex_);
  if (!queue_.empty() && queue_.front() != turn) return std::nullopt;
  reclaim_locked();
  const uint64_t used_bytes = mapping_->fixed().payload_bytes - extents_.free_bytes();
  if (!credits_.admit(used_bytes, Extents::extent_bytes(nbytes))) return std::nullopt;
  if (free_slots_.empty()) return std::nullopt;
  const auto extent = extents_.take(nbytes);
  if (!extent) return std::nullopt;
  const uint32_t index = free_slots_.back();
  free_slots_.pop_back();
  taken_[index] = *extent;
  Slot& slot = mapping_->slot(index);
  const SlotWord word = change_word(slot, [](SlotWord w) {
    return SlotWord{w.generation % kMaxGeneration + 1, SlotState::kWriting, 0};
  });
  slot.offset = extent->offset;
  slot.nbytes = nbytes;
  return Reservation(shared_from_this(), {index, word.generation},
                     mapping_->payload() + extent->offset, nbytes);
}

Reservation Producer::acquire(uint64_t nbytes, double timeout_s,
                              const std::function<void()>& between_waits) {
  expect_owning_process(*mapping_);
  if (!(timeout_s >= 0) || !std::isfinite(timeout_s)) {
    throw ArgumentError("arena: timeout_s must be finite and not negative, got " +
                        std::to_string(timeout_s));
  }
  if (nbytes > mapping_->fixed().payload_bytes) {
    throw StoreFull(nbytes, mapping_->fixed().payload_bytes);
  }
  if (auto reservation = try_acquire(nbytes, nullptr)) return std::move(*reservation);

  const Clock::time_point start = Clock::now();
  Header& header = mapping_->header();
  const Turn turn(*this);
  const Waiter waiter(header.room_waiters);
  for (;;) {
    const uint32_t seen = header.room.load();
    if (num_ahead(turn) == 0) {
      attendant_.watch();
      reap();
    }
    if (auto reservation = try_acquire(nbytes, &turn)) return std::move(*reservation);
    const double left = timeout_s - seconds_since(start);
    if (left <= 0) throw TransferTimeout(describe_wait(nbytes, turn), seconds_since(start));
    wait_for_change(header.room, seen, std::min(left, kWaitSliceS));
    if (between_waits) between_waits();
  }
}

size_t Producer::num_ahead(const Turn& turn) {
  const std::lock_guard lock(mutex_);
  return static_cast<size_t>(std::find(queue_.begin(), queue_.end(), &turn) - queue_.begin());
}

// Only what may be the reason; the state of the arena is always one.
std::string Producer::describe_queue(const Turn& turn) {
  const size_t ahead = num_ahead(turn);
  if (ahead != 0) return "; earlier waits: " + std::to_string(ahead);
  const std::lock_guard lock(mutex_);
  if (!credits_.closed() || credits_.low_bytes() == credits_.high_bytes()) return "";
  return "; closed until at most " + std::to_string(credits_.low_bytes()) + " are used";
}

std::string Producer::describe_wait(uint64_t nbytes, const Turn& turn) {
  const ArenaStats now = stats();
  const auto count = [&](SlotState state) {
    return std::to_string(now.slots[static_cast<uint8_t>(state)]);
  };
  return "room for " + std::to_string(nbytes) + " bytes in an arena of " +
         std::to_string(now.capacity_bytes) + " (used " + std::to_string(now.used_bytes) +
         ", largest free extent " + std::to_string(now.largest_free_bytes) +
         "; slots: " + count(SlotState::kFree) + " free, " + count(SlotState::kWriting) +
         " writing, " + count(SlotState::kReady) + " ready, " + count(SlotState::kLeased) +
         " leased, " + count(SlotState::kDraining) + " draining" + describe_queue(turn) + ")";
}

void Producer::discard(SlotRef ref) { acknowledge_slot(*mapping_, ref); }

bool Producer::ended(uint64_t identity) {
  if (is_guest(identity)) return attendant_.guest_ended(identity);
  return !process_alive(static_cast<pid_t>(identity & UINT32_MAX), identity >> 32);
}

void Producer::serve(const std::string& path) {
  expect_owning_process(*mapping_);
  attendant_.serve(path);
}

uint32_t Producer::reap() {
  expect_owning_process(*mapping_);
  const std::lock_guard lock(reap_mutex_);
  uint32_t num_dead = 0;
  for (uint32_t id = 0; id < kMaxConsumers; ++id) {
    ConsumerWord& place = mapping_->header().consumers[id];
    uint64_t identity = place.load(std::memory_order_acquire);
    if (identity == 0 || !ended(identity)) continue;
    for (uint32_t i = 0; i < mapping_->fixed().max_slots; ++i) {
      const uint64_t bits = mapping_->slot(i).word.load(std::memory_order_acquire);
      if (SlotWord::unpack(bits).holders & (1u << id)) release_slot(*mapping_, i, id);
    }
    // Fails if it left by itself after we looked: then nothing of it was left to return.
    if (place.compare_exchange_strong(identity, 0)) ++num_dead;
  }
  return num_dead;
}

ArenaStats Producer::stats() {
  expect_owning_process(*mapping_);
  const std::lock_guard lock(mutex_);
  reclaim_locked();
  ArenaStats out{};
  out.capacity_bytes = mapping_->fixed().payload_bytes;
  out.used_bytes = out.capacity_bytes - extents_.free_bytes();
  out.largest_free_bytes = extents_.largest_free_bytes();
  for (uint32_t i = 0; i < mapping_->fixed().max_slots; ++i) {
    const uint64_t bits = mapping_->slot(i).word.load(std::memory_order_acquire);
    const auto state = static_cast<uint32_t>(SlotWord::unpack(bits).state);
    if (state < kNumSlotStates) ++out.slots[state];
  }
  for (const ConsumerWord& place : mapping_->header().consumers) {
    out.num_consumers += place.load(std::memory_order_relaxed) != 0;
  }
  return out;
}

}  // namespace sf
