// Readers that are killed at random moments: whatever they held comes back, and nobody ever sees
// other bytes. Arguments: number of kills, seed. Prints "ok" and exits 0, or throws.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/error.h"
#include "transport/arena.h"
#include "transport/errors.h"

namespace {

constexpr uint32_t kMaxSlots = 6;
constexpr uint64_t kNumWords = 512;

void expect(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

struct Published {
  sf::SlotRef ref;
  uint64_t pattern;
};

Published publish(sf::Producer& producer, uint64_t pattern) {
  sf::Reservation reservation = producer.acquire(kNumWords * 8, 5);
  for (uint64_t i = 0; i < kNumWords; ++i) {
    std::memcpy(reservation.data() + i * 8, &pattern, 8);
  }
  reservation.publish();
  return {reservation.ref(), pattern};
}

void check_bytes(const sf::Lease& lease, uint64_t pattern) {
  for (uint64_t i = 0; i < kNumWords; ++i) {
    uint64_t word;
    std::memcpy(&word, lease.data() + i * 8, 8);
    expect(word == pattern, "a lease shows bytes of another sample");
  }
}

// Never returns: reads, holds and acknowledges at random until it is killed.
[[noreturn]] void read_until_killed(const sf::ArenaAddress& address,
                                    const std::vector<Published>& samples, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto consumer = sf::Consumer::join(sf::Mapping::attach(address));
  std::vector<std::unique_ptr<sf::Lease>> held;
  for (;;) {
    const Published& sample = samples[random() % samples.size()];
    try {
      auto lease = std::make_unique<sf::Lease>(consumer->lease(sample.ref));
      check_bytes(*lease, sample.pattern);
      if (random() % 64 == 0) consumer->acknowledge(sample.ref);
      if (random() % 2 == 0) held.push_back(std::move(lease));
    } catch (const sf::StaleRef&) {
    }
    if (held.size() > 4) held.clear();
  }
}

// What is left after a reap is READY with its bytes, or FREE. Returns whether it is READY.
bool is_ready(sf::Consumer& consumer, const Published& sample) {
  try {
    check_bytes(consumer.lease(sample.ref), sample.pattern);
    return true;
  } catch (const sf::StaleRef&) {
    return false;
  }
}

void run(int num_kills, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto producer = sf::Producer::create(kMaxSlots * 8192, kMaxSlots);
  const sf::ArenaAddress address = producer->mapping()->address();
  std::vector<Published> samples;
  for (uint32_t i = 0; i < kMaxSlots; ++i) samples.push_back(publish(*producer, random()));
  uint32_t num_reaped = 0;
  int num_acknowledged = 0;
  for (int kill_index = 0; kill_index < num_kills; ++kill_index) {
    const pid_t child = ::fork();
    expect(child >= 0, "fork failed");
    if (child == 0) read_until_killed(address, samples, random());
    ::usleep(random() % 4000);
    // Half of them are reaped as zombies, which still have a pid.
    const bool wait_first = random() % 2 == 0;
    int status = 0;
    ::kill(child, SIGKILL);
    siginfo_t ended;
    ::waitid(P_PID, static_cast<id_t>(child), &ended, WEXITED | WNOWAIT);
    if (wait_first) ::waitpid(child, &status, 0);
    num_reaped += producer->reap();
    if (!wait_first) ::waitpid(child, &status, 0);
    expect(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "a reader failed by itself");

    const sf::ArenaStats now = producer->stats();
    expect(now.num_consumers == 0, "a dead reader kept its place");
    expect(now.slots[0] + now.slots[2] == kMaxSlots, "a slot is neither FREE nor READY");
    const auto consumer = sf::Consumer::join(producer->mapping());
    for (Published& sample : samples) {
      if (is_ready(*consumer, sample)) continue;
      ++num_acknowledged;
      sample = publish(*producer, random());
    }
  }
  for (const Published& sample : samples) producer->discard(sample.ref);
  const sf::ArenaStats now = producer->stats();
  expect(now.largest_free_bytes == now.capacity_bytes, "capacity was lost");
  expect(now.slots[0] == kMaxSlots, "slots were lost");
  expect(num_reaped > 0 && num_acknowledged > 0, "the readers died before they did anything");
}

}  // namespace

int main(int argc, char** argv) {
  const int num_kills = argc > 1 ? std::atoi(argv[1]) : 200;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  run(num_kills, seed);
  std::puts("ok");
  return 0;
}
