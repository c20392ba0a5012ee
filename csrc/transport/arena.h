// A pooled arena in shared memory: one producer process, up to kMaxConsumers reading processes at a
// time (any number over its life). Slots go through the states of slot_word.h; readers get views,
// never copies. Everything here may be called from several threads.
//
// Many producers on a host are many arenas, of which a reader attaches as many as it likes: with
// one writer the free extents need no lock that a killed process could hold.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "transport/attendant.h"
#include "transport/credits.h"
#include "transport/extents.h"
#include "transport/mapping.h"
#include "transport/slot_word.h"

namespace sf {

// What a ref says of the arena: stale as soon as the slot is acknowledged.
struct SlotRef {
  uint32_t slot;
  uint64_t generation;
};

struct ArenaStats {
  uint64_t capacity_bytes;
  uint64_t used_bytes;  // whole pages of slots that are not FREE
  uint64_t largest_free_bytes;
  std::array<uint32_t, kNumSlotStates> slots;  // how many are in each SlotState
  uint32_t num_consumers;
};

class Producer;

// A slot in WRITING. Freed again unless it is published.
class Reservation {
 public:
  Reservation(std::shared_ptr<Producer> producer, SlotRef ref, std::byte* data, uint64_t nbytes);
  Reservation(Reservation&&) noexcept = default;
  Reservation& operator=(Reservation&&) = delete;
  ~Reservation();

  SlotRef ref() const { return ref_; }
  std::byte* data() const { return data_; }
  uint64_t nbytes() const { return nbytes_; }
  bool open() const { return open_; }

  // READY, with everything written before. ArgumentError if it was published or aborted before.
  void publish();
  void abort();

 private:
  void leave(SlotState state);

  std::shared_ptr<Producer> producer_;
  SlotRef ref_;
  std::byte* data_;
  uint64_t nbytes_;
  bool open_ = true;
};

class Producer : public std::enable_shared_from_this<Producer> {
 public:
  static std::shared_ptr<Producer> create(uint64_t capacity_bytes, uint32_t max_slots,
                                          Watermarks marks = {});
  // The payload in a GPU's memory. Whatever was written there must be complete, for every stream,
  // before publish(): that is the caller's part.
  static std::shared_ptr<Producer> create_on_device(int device, uint64_t capacity_bytes,
                                                    uint32_t max_slots, Watermarks marks = {});

  const std::shared_ptr<Mapping>& mapping() const { return mapping_; }

  // A slot of `nbytes`, page aligned. Waits for readers to free room, first come first served: a
  // small sample never overtakes a large one, which could otherwise starve. `between_waits` is
  // called a few times a second meanwhile and ends the wait by throwing.
  // StoreFull at once if it can never fit; TransferTimeout after `timeout_s`.
  Reservation acquire(uint64_t nbytes, double timeout_s,
                      const std::function<void()>& between_waits = {});

  // As a reader's acknowledge: nobody is going to read this sample any more. StaleRef.
  void discard(SlotRef ref);

  // Takes the leases of ended processes away and returns how many readers those were. acquire()
  // does so too while it waits, woken by their end; so does a served arena at any time.
  uint32_t reap();

  // Readers may attach through a socket at `path` as well: SocketAddress. listen_at().
  void serve(const std::string& path);

  ArenaStats stats();

 private:
  class Turn;
  Producer(std::shared_ptr<Mapping> mapping, Watermarks marks);
  std::optional<Reservation> try_acquire(uint64_t nbytes, const Turn* turn);
  size_t num_ahead(const Turn& turn);
  void reclaim_locked();
  std::string describe_wait(uint64_t nbytes, const Turn& turn);
  std::string describe_queue(const Turn& turn);

  bool ended(uint64_t identity);

  std::shared_ptr<Mapping> mapping_;
  std::mutex reap_mutex_;  // one reaper at a time: a place in the table is reused after it
  std::mutex mutex_;       // all below
  Extents extents_;
  Credits credits_;
  std::deque<const Turn*> queue_;     // those who wait in acquire(), the first to come in front
  std::vector<Extent> taken_;         // by slot; 0 bytes: none
  std::vector<uint32_t> free_slots_;  // the last one is the next one
  Attendant attendant_;               // last, so that its thread ends before all it uses
};

class Consumer;

// One lease of a slot: its bytes stay what they are until it is destroyed.
class Lease {
 public:
  Lease(Lease&&) noexcept = default;
  Lease& operator=(Lease&&) = delete;
  ~Lease();

  const std::byte* data() const { return data_; }
  uint64_t nbytes() const { return nbytes_; }

 private:
  friend class Consumer;
  Lease(std::shared_ptr<Consumer> consumer, SlotRef ref);
  void locate(const Slot& slot);

  std::shared_ptr<Consumer> consumer_;
  SlotRef ref_;
  const std::byte* data_ = nullptr;
  uint64_t nbytes_ = 0;
};

class Consumer : public std::enable_shared_from_this<Consumer> {
 public:
  // Takes a place in the arena's table of readers. TransportError if all are taken.
  static std::shared_ptr<Consumer> join(std::shared_ptr<Mapping> mapping);
  ~Consumer();

  const std::shared_ptr<Mapping>& mapping() const { return mapping_; }

  // StaleRef; CorruptFeature if the slot's extent is not within the payload.
  Lease lease(SlotRef ref);

  // Its memory may be reused once no lease of any reader is left. StaleRef, also the second time.
  void acknowledge(SlotRef ref);

  bool producer_alive() const { return mapping_->producer_alive(); }

  // Frees what an ended producer left in WRITING, one generation on, and returns how many slots
  // those were; 0 while it lives. What it published stays readable. The leases of other readers are
  // the producer's to take away: after it nobody writes into the memory again.
  uint32_t reap();

 private:
  friend class Lease;
  Consumer(std::shared_ptr<Mapping> mapping, uint32_t id, uint64_t identity);
  void release(SlotRef ref);

  std::shared_ptr<Mapping> mapping_;
  uint32_t id_;
  uint64_t identity_;
  std::mutex mutex_;
  std::vector<uint32_t> num_leases_;  // by slot, of this consumer
};

}  // namespace sf
