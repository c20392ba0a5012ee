// A producer and three readers, each a process, killed at random moments and started again.
//
// The parent only starts, kills and waits. The children know of each other's samples through a
// board in shared memory: per slot the generation published last. A sample's size and bytes follow
// from (epoch, slot, generation), so that a view of anything else shows, whoever recycled it.
// Arguments: number of kills, seed, folder for sockets. Prints counts and "ok", or says what broke
// and exits 1.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/crc32c.h"
#include "core/error.h"
#include "transport/arena.h"
#include "transport/errors.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kMaxSlots = 8;
constexpr uint64_t kCapacityBytes = 16 * sf::kPageBytes;
constexpr int kNumReaders = 3;
constexpr int kRoundsPerArena = 12;
constexpr double kDeadlineS = 20;  // of every wait of the test itself
constexpr double kSlackS = 5;      // what a loaded machine may add to a wait
constexpr double kRoomS = 15;      // readers acknowledge all the time: no room by then is a loss

// The producer stops first: until it has, readers make room for what it waits for.
enum class Order : uint32_t { kWork, kStopProducing, kStop };

struct Board {
  std::atomic<uint32_t> order;
  std::atomic<uint32_t> arena_ready;
  std::atomic<uint32_t> stopped_producing;
  char proc_address[128];
  char socket_address[256];
  uint64_t epoch;
  std::atomic<uint64_t> published[kMaxSlots];  // generation; 0: none yet
  std::atomic<uint64_t> num_published;
  std::atomic<uint64_t> num_read;
  std::atomic<uint64_t> num_stale;
  std::atomic<uint64_t> num_timeouts;
  std::atomic<uint64_t> num_freed_writing;
  std::atomic<uint64_t> num_survived;  // samples read after their producer was killed
};

void expect(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

struct Content {
  uint64_t key;
  Content(uint64_t epoch, sf::SlotRef ref)
      : key(mix(epoch ^ mix(ref.generation * kMaxSlots + ref.slot))) {}
  uint64_t word(uint64_t i) const { return key + i * 0x9e3779b97f4a7c15; }
};

// The first word is the count of those that follow, the last one the crc32c of all before.
void write_sample(const sf::Reservation& slot, const Content& content) {
  auto* words = reinterpret_cast<uint64_t*>(slot.data());
  const uint64_t num_words = slot.nbytes() / 8;
  words[0] = content.key;
  for (uint64_t i = 1; i + 1 < num_words; ++i) words[i] = content.word(i);
  words[num_words - 1] = sf::crc32c(words, (num_words - 1) * 8);
}

void check_sample(const sf::Lease& lease, const Content& content) {
  const auto* words = reinterpret_cast<const uint64_t*>(lease.data());
  const uint64_t num_words = lease.nbytes() / 8;
  expect(num_words >= 2, "a lease is shorter than any sample");
  expect(words[0] == content.key, "a view shows a sample of another slot or generation");
  for (uint64_t i = 1; i + 1 < num_words; ++i) {
    expect(words[i] == content.word(i), "a view shows other bytes");
  }
  expect(words[num_words - 1] == sf::crc32c(words, (num_words - 1) * 8), "a checksum differs");
}

// ---- the producer ------------------------------------------------------------------------------

// Whatever it waits for, not beyond its deadline. Nothing if that passed.
std::unique_ptr<sf::Reservation> acquire(Board& board, sf::Producer& producer, uint64_t nbytes,
                                         double timeout_s) {
  const Clock::time_point start = Clock::now();
  std::unique_ptr<sf::Reservation> slot;
  try {
    slot = std::make_unique<sf::Reservation>(producer.acquire(nbytes, timeout_s));
  } catch (const sf::TransferTimeout& e) {
    expect(timeout_s < kRoomS, std::string("no room came back: ") + e.what());
    ++board.num_timeouts;
  }
  const double took = seconds_since(start);
  expect(took < timeout_s + kSlackS,
         "a wait of " + std::to_string(timeout_s) + " s took " + std::to_string(took));
  return slot;
}

void produce_until_stopped(Board& board, sf::Producer& producer, std::mt19937_64& random) {
  while (board.order.load() == static_cast<uint32_t>(Order::kWork)) {
    const uint64_t nbytes = 16 + random() % (5 * sf::kPageBytes) / 8 * 8;
    const double timeout_s = random() % 4 == 0 ? 0.001 : kRoomS;
    const auto slot = acquire(board, producer, nbytes, timeout_s);
    if (slot == nullptr || random() % 16 == 0) continue;  // its destructor frees the slot
    write_sample(*slot, {board.epoch, slot->ref()});
    slot->publish();
    board.published[slot->ref().slot].store(slot->ref().generation);
    ++board.num_published;
  }
}

void discard_all(Board& board, sf::Producer& producer) {
  for (uint32_t i = 0; i < kMaxSlots; ++i) {
    try {
      producer.discard({i, board.published[i].load()});
    } catch (const sf::StaleRef&) {
    }
  }
}

// After the readers have ended, by themselves or not.
void expect_all_back(sf::Producer& producer) {
  producer.reap();
  const sf::ArenaStats now = producer.stats();
  expect(now.num_consumers == 0, "a reader that ended kept its place");
  expect(now.slots[0] == kMaxSlots, "slots were lost");
  expect(now.used_bytes == 0 && now.largest_free_bytes == now.capacity_bytes, "bytes were lost");
}

void produce(Board& board, std::mt19937_64 random, const std::string& folder, int readers_ended) {
  // Half of the arenas with marks apart.
  const sf::Watermarks marks = random() % 2 ? sf::Watermarks{1, 1} : sf::Watermarks{0.9, 0.5};
  const auto producer = sf::Producer::create(kCapacityBytes, kMaxSlots, marks);
  const std::string path = folder + "/arena";
  producer->serve(path);
  board.epoch = producer->mapping()->fixed().epoch;
  std::strcpy(board.proc_address, producer->mapping()->address().text().c_str());
  std::strcpy(board.socket_address, sf::SocketAddress{path, board.epoch}.text().c_str());
  board.arena_ready.store(1);
  produce_until_stopped(board, *producer, random);
  board.stopped_producing.store(1);
  char byte;
  expect(::read(readers_ended, &byte, 1) == 0, "the pipe of the parent");
  discard_all(board, *producer);
  expect_all_back(*producer);
}

// ---- a reader ----------------------------------------------------------------------------------

void read_one(Board& board, sf::Consumer& consumer, std::mt19937_64& random,
              std::vector<std::unique_ptr<sf::Lease>>& held) {
  const auto index = static_cast<uint32_t>(random() % kMaxSlots);
  const sf::SlotRef ref{index, board.published[index].load()};
  if (ref.generation == 0) return;
  try {
    auto lease = std::make_unique<sf::Lease>(consumer.lease(ref));
    check_sample(*lease, {board.epoch, ref});
    // Acknowledged or not, its bytes must stay what they are for as long as it is held.
    if (random() % 4 != 0) consumer.acknowledge(ref);
    if (random() % 8 == 0) ::usleep(random() % 300);
    check_sample(*lease, {board.epoch, ref});
    ++board.num_read;
    if (random() % 4 == 0 && held.size() < 2) held.push_back(std::move(lease));
  } catch (const sf::StaleRef&) {
    ++board.num_stale;
    held.clear();
    ::usleep(50);
  }
}

// The producer was killed: what it published is read all the same, and nothing stays in WRITING.
void read_what_is_left(Board& board, sf::Consumer& consumer) {
  board.num_freed_writing += consumer.reap();
  for (uint32_t i = 0; i < kMaxSlots; ++i) {
    const sf::SlotRef ref{i, board.published[i].load()};
    if (ref.generation == 0) continue;
    try {
      check_sample(consumer.lease(ref), {board.epoch, ref});
      ++board.num_survived;
    } catch (const sf::StaleRef&) {
    }
  }
  for (uint32_t i = 0; i < kMaxSlots; ++i) {
    const uint64_t bits = consumer.mapping()->slot(i).word.load();
    expect(sf::SlotWord::unpack(bits).state != sf::SlotState::kWriting, "a slot stays in WRITING");
  }
}

void read(Board& board, std::mt19937_64 random) {
  const bool by_socket = random() % 2;
  const std::string address = by_socket ? board.socket_address : board.proc_address;
  std::shared_ptr<sf::Consumer> consumer;
  try {
    consumer = sf::Consumer::join(sf::Mapping::attach(address));
  } catch (const sf::ProducerLost&) {
    return;  // killed before we came
  }
  std::vector<std::unique_ptr<sf::Lease>> held;
  while (board.order.load() != static_cast<uint32_t>(Order::kStop)) {
    read_one(board, *consumer, random, held);
    if (random() % 64 == 0 && !consumer->producer_alive()) break;
  }
  if (!consumer->producer_alive()) read_what_is_left(board, *consumer);
}

// ---- the parent --------------------------------------------------------------------------------

template <typename Work>
pid_t start(const Work& work) {
  const pid_t child = ::fork();
  expect(child >= 0, "fork failed");
  if (child != 0) return child;
  try {
    work();
    ::_exit(0);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    ::_exit(1);
  }
}

// True if it ended by itself and well, false if SIGKILL ended it.
bool wait_for(pid_t child, const char* name) {
  const Clock::time_point start = Clock::now();
  int status = 0;
  while (::waitpid(child, &status, WNOHANG) == 0) {
    if (seconds_since(start) > kDeadlineS) {
      ::kill(child, SIGKILL);
      throw std::runtime_error(std::string(name) + " did not end within its deadline");
    }
    ::usleep(200);
  }
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) return false;
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, std::string(name) + " failed by itself");
  return true;
}

void wait_until_set(const std::atomic<uint32_t>& flag, const char* what) {
  const Clock::time_point start = Clock::now();
  while (flag.load() == 0) {
    expect(seconds_since(start) < kDeadlineS, std::string("waited too long for ") + what);
    ::usleep(100);
  }
}

class Stage {
 public:
  Stage(Board& board, uint64_t seed, std::string folder)
      : board_(board), random_(seed), folder_(std::move(folder)) {}

  // One arena's life. Returns the number of kills.
  int run(int max_kills) {
    set_up();
    const int num_rounds = std::min(max_kills, kRoundsPerArena);
    int num_kills = 0;
    // Half of the arenas end by the death of their producer.
    const bool kill_producer = random_() % 2 == 0;
    for (int i = 0; i < num_rounds - kill_producer; ++i) {
      ::usleep(random_() % 4000);
      num_kills += replace(readers_[random_() % kNumReaders]);
    }
    if (kill_producer) num_kills += end_by_death();
    if (!kill_producer) end_by_order();
    return num_kills;
  }

 private:
  void set_up() {
    board_.order.store(static_cast<uint32_t>(Order::kWork));
    board_.arena_ready.store(0);
    board_.stopped_producing.store(0);
    for (auto& generation : board_.published) generation.store(0);
    expect(::pipe(pipe_) == 0, "pipe failed");
    producer_ = start([&] {
      ::close(pipe_[1]);
      produce(board_, std::mt19937_64(random_()), folder_, pipe_[0]);
    });
    random_.discard(1);  // the child drew from a copy
    wait_until_set(board_.arena_ready, "an arena");
    for (pid_t& reader : readers_) reader = start_reader();
  }

  pid_t start_reader() {
    const uint64_t seed = random_();
    return start([&] {
      ::close(pipe_[0]);
      ::close(pipe_[1]);
      read(board_, std::mt19937_64(seed));
    });
  }

  int replace(pid_t& reader) {
    ::kill(reader, SIGKILL);
    expect(!wait_for(reader, "a reader"), "a reader ended before it was killed");
    reader = start_reader();
    return 1;
  }

  int end_by_death() {
    ::usleep(random_() % 4000);
    ::kill(producer_, SIGKILL);
    expect(!wait_for(producer_, "the producer"), "the producer ended before it was killed");
    for (const pid_t reader : readers_) expect(wait_for(reader, "a reader"), "a reader was killed");
    ::close(pipe_[0]);
    ::close(pipe_[1]);
    return 1;
  }

  void end_by_order() {
    board_.order.store(static_cast<uint32_t>(Order::kStopProducing));
    wait_until_set(board_.stopped_producing, "the end of the producer's work");
    board_.order.store(static_cast<uint32_t>(Order::kStop));
    for (const pid_t reader : readers_) expect(wait_for(reader, "a reader"), "a reader was killed");
    ::close(pipe_[0]);
    ::close(pipe_[1]);  // the producer's sign that all readers have ended
    expect(wait_for(producer_, "the producer"), "the producer was killed");
  }

  Board& board_;
  std::mt19937_64 random_;
  std::string folder_;
  int pipe_[2] = {-1, -1};
  pid_t producer_ = 0;
  pid_t readers_[kNumReaders] = {};
};

unsigned long long value(const std::atomic<uint64_t>& count) { return count.load(); }

void run(int num_kills, uint64_t seed, const std::string& folder) {
  void* shared =
      ::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  expect(shared != MAP_FAILED, "mmap failed");
  Board& board = *new (shared) Board{};
  Stage stage(board, seed, folder);
  int num_done = 0;
  int num_arenas = 0;
  const Clock::time_point begin = Clock::now();
  while (num_done < num_kills) {
    num_done += stage.run(num_kills - num_done);
    ++num_arenas;
  }
  std::printf(
      "%d kills, %d arenas, %.1f s; published %llu, read %llu, stale %llu, timeouts %llu, "
      "freed in writing %llu, read after the producer's death %llu\n",
      num_done, num_arenas, seconds_since(begin), value(board.num_published), value(board.num_read),
      value(board.num_stale), value(board.num_timeouts), value(board.num_freed_writing),
      value(board.num_survived));
  expect(board.num_read > static_cast<uint64_t>(num_kills), "hardly anything was read");
}

}  // namespace

int main(int argc, char** argv) {
  const int num_kills = argc > 1 ? std::atoi(argv[1]) : 200;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  try {
    run(num_kills, seed, argc > 3 ? argv[3] : ".");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "seed %llu: %s\n", static_cast<unsigned long long>(seed), e.what());
    return 1;
  }
  std::puts("ok");
  return 0;
}
