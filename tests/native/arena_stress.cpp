// Several threads of a producer and several readers on one small arena, for the sanitizers.
//
// Every sample is a run of one 64-bit pattern that only its publisher knows, so that a slot which
// is recycled beneath a lease, published too early or handed out twice shows as other bytes (or as
// a race, for readers share the producer's mapping). Prints "ok" and exits 0, or throws.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/crc32c.h"
#include "core/error.h"
#include "transport/arena.h"
#include "transport/errors.h"

namespace {

constexpr uint64_t kCapacityBytes = 64 << 10;
constexpr uint32_t kMaxSlots = 8;
constexpr double kTimeoutS = 30;

void expect(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

struct Published {
  sf::SlotRef ref;
  uint64_t pattern;
  uint64_t num_words;
  uint32_t checksum;
};

// The control plane of the test: refs from producers to whichever reader comes first.
class Refs {
 public:
  void push(const Published& published) {
    const std::lock_guard lock(mutex_);
    refs_.push_back(published);
    changed_.notify_one();
  }
  void end() {
    const std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  }
  std::optional<Published> pop() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ended_ || !refs_.empty(); });
    if (refs_.empty()) return std::nullopt;
    const Published out = refs_.front();
    refs_.pop_front();
    return out;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Published> refs_;
  bool ended_ = false;
};

void produce(sf::Producer& producer, Refs& refs, uint64_t seed, int num_samples) {
  std::mt19937_64 random(seed);
  for (int i = 0; i < num_samples; ++i) {
    const uint64_t num_words = random() % 3000;
    const uint64_t pattern = random();
    sf::Reservation reservation = producer.acquire(num_words * 8, kTimeoutS);
    if (random() % 16 == 0) continue;  // its destructor frees the slot
    const std::vector<uint64_t> words(num_words, pattern);
    const uint32_t sum = sf::copy_crc32c(reservation.data(), words.data(), num_words * 8);
    reservation.publish();
    refs.push({reservation.ref(), pattern, num_words, sum});
#ifdef PLANTED_RACE
    // What a producer must not do. A reader may have freed the slot by then, and another sample
    // may lie in it, so that check_bytes looks without judging: the race detector has to tell.
    if (num_words != 0) std::memcpy(reservation.data(), &pattern, sizeof pattern);
#endif
  }
}

#ifdef PLANTED_RACE
void expect_content(bool, const char*) {}
#else
void expect_content(bool condition, const char* what) { expect(condition, what); }
#endif

void check_bytes(const sf::Lease& lease, const Published& published) {
  expect(lease.nbytes() == published.num_words * 8, "a lease has another size than was published");
  for (uint64_t i = 0; i < published.num_words; ++i) {
    uint64_t word;
    std::memcpy(&word, lease.data() + i * 8, 8);
    expect_content(word == published.pattern, "a lease shows bytes of another sample");
  }
  expect_content(sf::crc32c(lease.data(), lease.nbytes()) == published.checksum, "checksum");
}

template <typename Call>
void expect_stale(const Call& call) {
  try {
    call();
  } catch (const sf::StaleRef&) {
    return;
  }
  throw std::runtime_error("a ref that cannot be read was accepted");
}

void consume(sf::Consumer& consumer, Refs& refs, uint64_t seed, std::atomic<int>& num_read) {
  std::mt19937_64 random(seed);
  std::optional<Published> before;
  while (const auto published = refs.pop()) {
    if (random() % 8 == 0) {
      // Looked at, but not acknowledged: another reader gets it while we may still look.
      const sf::Lease lease = consumer.lease(published->ref);
      refs.push(*published);
      std::this_thread::yield();
      check_bytes(lease, *published);
      continue;
    }
    sf::Lease first = consumer.lease(published->ref);
    sf::Lease second = consumer.lease(published->ref);
    {
      const sf::Lease ended = std::move(first);
    }
    consumer.acknowledge(published->ref);
    expect_stale([&] { consumer.lease(published->ref); });
    expect_stale([&] { consumer.acknowledge(published->ref); });
    check_bytes(second, *published);
    // By now its slot may well hold another sample.
    if (before) expect_stale([&] { consumer.lease(before->ref); });
    before = published;
    ++num_read;
  }
}

void check_empty(sf::Producer& producer) {
  const sf::ArenaStats now = producer.stats();
  expect(now.used_bytes == 0, "bytes were lost");
  expect(now.largest_free_bytes == now.capacity_bytes, "extents did not coalesce");
  expect(now.slots[0] == kMaxSlots, "slots were lost");
  expect(now.num_consumers == 0, "a reader left its place taken");
}

void run(int num_samples, const std::string& folder) {
  // Marks apart, so that waits are ended by more than the first free byte.
  const auto producer = sf::Producer::create(kCapacityBytes, kMaxSlots, {1.0, 0.7});
  const std::string path = folder + "/arena";
  producer->serve(path);
  const sf::SocketAddress address{path, producer->mapping()->fixed().epoch};
  Refs refs;
  std::atomic<int> num_read{0};
  std::atomic<bool> reaping{true};
  std::vector<std::thread> producers;
  std::vector<std::thread> others;
  for (uint64_t i = 0; i < 2; ++i) {
    producers.emplace_back([&, i] { produce(*producer, refs, i, num_samples); });
  }
  for (uint64_t i = 0; i < 3; ++i) {
    others.emplace_back([&, i] {
      // Two share the producer's mapping, which shows races; one is let in at the socket.
      const auto consumer =
          sf::Consumer::join(i == 0 ? sf::Mapping::attach(address) : producer->mapping());
      consume(*consumer, refs, 100 + i, num_read);
    });
  }
  std::thread reaper([&] {
    while (reaping) {
      expect(producer->reap() == 0, "a living reader was reaped");
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  for (auto& thread : producers) thread.join();
  refs.end();
  for (auto& thread : others) thread.join();
  reaping = false;
  reaper.join();
  // A reader may put a ref back after the others have seen the end.
  consume(*sf::Consumer::join(producer->mapping()), refs, 7, num_read);
  expect(num_read > num_samples, "hardly anything was read");
  check_empty(*producer);
}

void check_extents() {
  // Any order of giving back ends in one free extent again.
  std::mt19937_64 random(1);
  sf::Extents extents(64 * sf::kPageBytes);
  std::vector<sf::Extent> taken;
  for (int i = 0; i < 20000; ++i) {
    if (random() % 2 == 0) {
      if (const auto extent = extents.take(random() % (9 * sf::kPageBytes))) {
        for (const auto& other : taken) {
          expect(extent->offset + extent->nbytes <= other.offset ||
                     other.offset + other.nbytes <= extent->offset,
                 "two extents overlap");
        }
        taken.push_back(*extent);
      }
    } else if (!taken.empty()) {
      std::swap(taken[random() % taken.size()], taken.back());
      extents.give_back(taken.back());
      taken.pop_back();
    }
  }
  for (const auto& extent : taken) extents.give_back(extent);
  expect(extents.largest_free_bytes() == 64 * sf::kPageBytes, "extents did not coalesce");
}

void check_one_slot() {
  const auto producer = sf::Producer::create(sf::kPageBytes, 1);
  const sf::Reservation all = producer->acquire(1, 0);
  const auto consumer = sf::Consumer::join(producer->mapping());
  expect_stale([&] { consumer->lease(all.ref()); });  // it is not published yet
  try {
    producer->acquire(1, 0.01);
  } catch (const sf::TransferTimeout& e) {
    expect(e.waited_s >= 0.01, "gave up early");
    return;
  }
  throw std::runtime_error("one slot was handed out twice");
}

}  // namespace

int main(int argc, char** argv) {
  const int num_samples = argc > 1 ? std::atoi(argv[1]) : 3000;
  check_extents();
  check_one_slot();
  run(num_samples, argc > 2 ? argv[2] : ".");
  std::puts("ok");
  return 0;
}
