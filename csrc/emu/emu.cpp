// The scheduler and the fibers. Compiled WITHOUT sanitizer instrumentation even in sanitizer builds
// (SF_EMU_TSAN / SF_EMU_ASAN then only switch the fiber annotations on): its own bookkeeping must
// neither race in TSan's eyes nor order the kernel's memory.
#include "emu/emu.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emu/fiber_switch.h"

namespace sf::emu {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxCluster = 8;
constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 32 * kPage;
constexpr size_t kSharedAlignment = 128;

enum class State { kReady, kAtBarrier, kAtClusterBarrier, kAtCollective, kReturned };

struct Place {
  const char* what = "";
  const char* file = "";
  int line = 0;
  bool operator==(const Place& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0 &&
           std::strcmp(what, other.what) == 0;
  }
  std::string text() const {
    return std::string(what) + " at " + file + ":" + std::to_string(line);
  }
};

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;  // lowest usable byte
  State state = State::kReturned;
  Place place;                      // where it waits
  bool arrived = false;             // at the cluster barrier, without having waited yet
  unsigned cluster_generation = 0;  // of that barrier
  ThreadContext context;
#if defined(SF_EMU_TSAN)
  void* tsan = nullptr;
#endif
#if defined(SF_EMU_ASAN)
  void* fake_stack = nullptr;
#endif
};

struct Warp {
  unsigned arrived = 0;
  unsigned generation =
      0;  // parity picks the slot set: a lane can be one collective ahead, not two
  uint64_t slots[2][kWarp] = {};
  uint64_t order[2] = {};
};

// One block of the cluster that runs.
struct Block {
  unsigned alive = 0;       // threads that have not returned
  unsigned at_barrier = 0;  // threads that wait in __syncthreads
  unsigned barriers = 0;    // passed so far
  // An address for order_memory. A thread that is one barrier ahead must not order those behind it:
  // hence two, by parity. Likewise below.
  uint64_t barrier_order[2] = {};
  std::unique_ptr<void, decltype(&std::free)> shared{nullptr, &std::free};
};

struct ClusterBarrier {
  unsigned arrived = 0;
  unsigned generation = 0;  // barriers passed so far
  uint64_t order[2] = {};
};

struct Machine {
  std::vector<Fiber> fibers;  // num_threads of block 0, of block 1, ...
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  ClusterBarrier cluster;
  unsigned num_threads = 0;                 // of one block
  uint64_t block_begin = 0, block_end = 0;  // addresses for order_memory
  unsigned running = 0;                     // index of the fiber on the core
  void* scheduler_sp = nullptr;
  std::exception_ptr failure;
  Body body = nullptr;
  void* closure = nullptr;
  size_t shared_bytes = 0;
  Order order = Order::kForward;
  uint64_t random = 1;
  bool in_grid = false;
#if defined(SF_EMU_TSAN)
  void* tsan = nullptr;
#endif
#if defined(SF_EMU_ASAN)
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
#endif
};

Machine machine;

uint64_t next_random() {  // xorshift64
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

void arrange(std::vector<unsigned>& order) {
  if (machine.order != Order::kRandom) return;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
}

std::vector<unsigned> arranged(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) {
    order[i] = machine.order == Order::kReverse ? count - 1 - i : i;
  }
  arrange(order);
  return order;
}

void order_memory([[maybe_unused]] void* address, [[maybe_unused]] bool acquire) {
#if defined(SF_EMU_TSAN)
  if (acquire) {
    __tsan_acquire(address);
  } else {
    __tsan_release(address);
  }
#endif
}

unsigned block_of(unsigned fiber) { return fiber / machine.num_threads; }

Block& running_block() { return machine.blocks[block_of(machine.running)]; }

// A block that has ended no longer has its memory: a peer that still reads it sees NaN, and ASan
// names it.
void poison_shared(void* memory, [[maybe_unused]] bool ended) {
  if (memory == nullptr) return;
#if defined(SF_EMU_ASAN)
  __asan_unpoison_memory_region(memory, machine.shared_bytes);
#endif
  std::memset(memory, 0xff, machine.shared_bytes);
#if defined(SF_EMU_ASAN)
  if (ended) __asan_poison_memory_region(memory, machine.shared_bytes);
#endif
}

void to_scheduler() {
  Fiber& fiber = machine.fibers[machine.running];
#if defined(SF_EMU_TSAN)
  __tsan_switch_to_fiber(machine.tsan, 1);  // 1: the switch itself orders nothing
#endif
#if defined(SF_EMU_ASAN)
  __sanitizer_start_switch_fiber(fiber.state == State::kReturned ? nullptr : &fiber.fake_stack,
                                 machine.stack_bottom, machine.stack_size);
#endif
  sf_emu_switch(&fiber.sp, machine.scheduler_sp);
#if defined(SF_EMU_ASAN)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void to_fiber(unsigned index) {
  Fiber& fiber = machine.fibers[index];
  machine.running = index;
  threadIdx = fiber.context.thread;
  blockIdx = fiber.context.block;
  blockDim = fiber.context.block_dim;
  gridDim = fiber.context.grid_dim;
#if defined(SF_EMU_TSAN)
  __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
#if defined(SF_EMU_ASAN)
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack, kStackBytes - kPage);
#endif
  sf_emu_switch(&machine.scheduler_sp, fiber.sp);
#if defined(SF_EMU_ASAN)
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
}

std::string thread_name(unsigned index) {
  return "thread " + std::to_string(index % machine.num_threads) + " of block " +
         std::to_string(machine.fibers[index].context.block.x);
}

void fiber_main() {
#if defined(SF_EMU_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
#endif
  order_memory(&machine.block_begin, true);  // what earlier blocks and the host wrote
  try {
    machine.body(machine.closure);
    const Fiber& fiber = machine.fibers[machine.running];
    if (fiber.arrived) {
      throw Error("emu: " + thread_name(machine.running) + " returned without having waited at " +
                  "the cluster barrier where it arrived, " + fiber.place.text());
    }
  } catch (...) {
    machine.failure = std::current_exception();
  }
  order_memory(&machine.block_end, false);
  machine.fibers[machine.running].state = State::kReturned;
  to_scheduler();
  std::abort();  // a returned fiber is never resumed
}

void make_stack(Fiber& fiber) {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
    throw Error("emu: no memory for a fiber's stack");
  }
  fiber.stack = static_cast<char*>(memory) + kPage;
#if defined(SF_EMU_TSAN)
  fiber.tsan = __tsan_create_fiber(0);
#endif
}

void reset_fiber(Fiber& fiber) {
  if (!fiber.stack) make_stack(fiber);
#if defined(SF_EMU_ASAN)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes - kPage);
#endif
  // Six zeroed registers, then the address that `ret` takes; 16-aligned plus 8, as after a call.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - kPage) - 2;
  *top = reinterpret_cast<void*>(&fiber_main);
  std::memset(top - 6, 0, 6 * sizeof(void*));
  fiber.sp = top - 6;
  fiber.state = State::kReady;
  fiber.arrived = false;
}

[[noreturn]] void divergent(const Place& place, unsigned index, const std::string& other) {
  throw Error("emu: divergent barrier: " + thread_name(index) + " waits in " + place.text() + ", " +
              other);
}

// No fiber can run and not all have returned: say who waits where and for whom.
[[noreturn]] void report_deadlock() {
  const auto is_waiting = [](unsigned i, bool for_cluster) {
    const State state = machine.fibers[i].state;
    return state != State::kReturned && (state == State::kAtClusterBarrier) == for_cluster;
  };
  const auto total = static_cast<unsigned>(machine.blocks.size()) * machine.num_threads;
  // Those who wait for their own block come first: their peers may wait because of them.
  unsigned waiting = 0;
  while (waiting < total && !is_waiting(waiting, false)) ++waiting;
  const bool for_cluster = waiting == total;
  if (for_cluster) {
    waiting = 0;
    while (!is_waiting(waiting, true)) ++waiting;
  }
  const Fiber& first = machine.fibers[waiting];
  const unsigned begin = for_cluster ? 0 : block_of(waiting) * machine.num_threads;
  for (unsigned i = begin; i < (for_cluster ? total : begin + machine.num_threads); ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.state == State::kReturned)
      divergent(first.place, waiting, thread_name(i) + " has returned");
    if (!(fiber.place == first.place)) {
      divergent(first.place, waiting, thread_name(i) + " in " + fiber.place.text());
    }
  }
  divergent(first.place, waiting, "and no thread can go on");
}

void wait_here(State state, const Place& place) {
  Fiber& fiber = machine.fibers[machine.running];
  fiber.state = state;
  fiber.place = place;
  to_scheduler();
}

void check_mask(unsigned mask, const Place& place) {
  if (mask != kFullMask) throw Error("emu: " + place.text() + ": only the full mask is supported");
}

// Waits until all 32 lanes are in the same collective; returns the generation that it completed.
unsigned join_warp(const Place& place) {
  const unsigned index = machine.running;
  Warp& warp = machine.warps[index / kWarp];
  const unsigned first = index / kWarp * kWarp;
  for (unsigned i = first; i < first + kWarp; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.state == State::kAtCollective && !(fiber.place == place)) {
      divergent(fiber.place, i, thread_name(index) + " in " + place.text());
    }
  }
  const unsigned generation = warp.generation;
  if (++warp.arrived < kWarp) {
    wait_here(State::kAtCollective, place);
    return generation;
  }
  warp.arrived = 0;
  ++warp.generation;
  for (unsigned i = first; i < first + kWarp; ++i) machine.fibers[i].state = State::kReady;
  return generation;
}

void prepare_block(unsigned rank, Index3 index, Index3 grid, Index3 block_dim) {
  Block& block = machine.blocks[rank];
  poison_shared(block.shared.get(), false);
  block.at_barrier = 0;
  block.alive = machine.num_threads;
  for (unsigned i = 0; i < machine.num_threads; ++i) {
    Fiber& fiber = machine.fibers[rank * machine.num_threads + i];
    reset_fiber(fiber);
    const Index3 thread{i % block_dim.x, i / block_dim.x % block_dim.y,
                        i / block_dim.x / block_dim.y};
    fiber.context = {thread, index, block_dim, grid};
  }
}

// Runs blocks first, first + 1, ... of the grid, one cluster.
void run_cluster(unsigned first, Index3 grid, Index3 block_dim, std::vector<unsigned>& order) {
  for (unsigned rank = 0; rank < machine.blocks.size(); ++rank) {
    const unsigned linear = first + rank;
    const Index3 index{linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
    prepare_block(rank, index, grid, block_dim);
  }
  for (Warp& warp : machine.warps) warp = Warp{};
  machine.cluster.arrived = machine.cluster.generation = 0;
  order_memory(&machine.block_begin, false);
  size_t alive = order.size();
  while (alive > 0) {
    bool progress = false;
    for (unsigned index : order) {
      if (machine.fibers[index].state != State::kReady) continue;
      progress = true;
      to_fiber(index);
      if (machine.failure) std::rethrow_exception(std::exchange(machine.failure, nullptr));
      if (machine.fibers[index].state != State::kReturned) continue;
      --alive;
      Block& block = machine.blocks[block_of(index)];
      if (--block.alive > 0) continue;
      order_memory(&machine.block_end, true);
      poison_shared(block.shared.get(), true);
    }
    if (!progress) report_deadlock();
    arrange(order);
  }
  order_memory(&machine.block_end, true);
}

// Leaves the machine ready for the next launch, also after an exception.
struct GridScope {
  GridScope() {
    if (machine.in_grid) throw Error("emu: a kernel launched a kernel");
    machine.in_grid = true;
  }
  ~GridScope() {
    machine.in_grid = false;
    for (Block& block : machine.blocks) poison_shared(block.shared.get(), false);
    machine.blocks.clear();
    machine.shared_bytes = 0;
  }
};

}  // namespace

void set_order(Order order, uint64_t seed) {
  machine.order = order;
  machine.random = seed * 0x9e3779b97f4a7c15u | 1u;
}

void run_grid(Index3 grid, Index3 block, unsigned cluster, size_t shared_bytes, Body body,
              void* closure) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || threads % kWarp != 0) {
    throw Error("emu: a block must have 32 to 1024 threads in whole warps, got " +
                std::to_string(threads));
  }
  if (cluster == 0 || cluster > kMaxCluster || grid.x % cluster != 0) {
    throw Error("emu: a cluster must have 1 to 8 blocks and divide the grid's " +
                std::to_string(grid.x) + ", got " + std::to_string(cluster));
  }
  const GridScope scope;
  machine.num_threads = static_cast<unsigned>(threads);
  const unsigned total = cluster * machine.num_threads;
  if (machine.fibers.size() < total) machine.fibers.resize(total);
  machine.warps.resize(total / kWarp);
  machine.body = body;
  machine.closure = closure;
  machine.shared_bytes = shared_bytes;
  machine.blocks.resize(cluster);
  for (Block& one : machine.blocks) {
    void* memory = nullptr;
    if (shared_bytes > 0 && posix_memalign(&memory, kSharedAlignment, shared_bytes) != 0) {
      throw std::bad_alloc();
    }
    one.shared.reset(memory);
  }
#if defined(SF_EMU_TSAN)
  machine.tsan = __tsan_get_current_fiber();
#endif
  std::vector<unsigned> order = arranged(total);
  for (unsigned i : arranged(grid.x * grid.y * grid.z / cluster)) {
    run_cluster(i * cluster, grid, block, order);
  }
}

void* shared_memory(size_t num_bytes) {
  if (num_bytes > machine.shared_bytes) {
    throw Error("emu: the kernel uses " + std::to_string(num_bytes) +
                " bytes of shared memory, the launch gave " + std::to_string(machine.shared_bytes));
  }
  return running_block().shared.get();
}

void sync_threads(const char* file, int line) {
  const Place place{"__syncthreads", file, line};
  Block& block = running_block();
  uint64_t* const order = &block.barrier_order[block.barriers & 1];
  order_memory(order, false);
  if (++block.at_barrier < machine.num_threads) {
    wait_here(State::kAtBarrier, place);
  } else {
    machine.fibers[machine.running].place = place;
    const unsigned first = block_of(machine.running) * machine.num_threads;
    for (unsigned i = first; i < first + machine.num_threads; ++i) {
      const Fiber& fiber = machine.fibers[i];
      if (!(fiber.place == place)) {
        divergent(fiber.place, i, thread_name(machine.running) + " in " + place.text());
      }
    }
    for (unsigned i = first; i < first + machine.num_threads; ++i) {
      machine.fibers[i].state = State::kReady;
    }
    block.at_barrier = 0;
    ++block.barriers;
  }
  order_memory(order, true);
}

void arrive_cluster(const char* file, int line) {
  const Place place{"__cluster_barrier_arrive", file, line};
  Fiber& fiber = machine.fibers[machine.running];
  ClusterBarrier& barrier = machine.cluster;
  if (fiber.arrived) {
    throw Error("emu: " + thread_name(machine.running) + " arrives twice without a wait, " +
                fiber.place.text() + " and " + place.text());
  }
  fiber.arrived = true;
  fiber.cluster_generation = barrier.generation;
  fiber.place = place;
  order_memory(&barrier.order[barrier.generation & 1], false);
  if (++barrier.arrived < machine.blocks.size() * machine.num_threads) return;
  barrier.arrived = 0;
  ++barrier.generation;
  for (unsigned i = 0; i < machine.blocks.size() * machine.num_threads; ++i) {
    Fiber& other = machine.fibers[i];
    if (other.state == State::kAtClusterBarrier) other.state = State::kReady;
  }
}

void wait_cluster(const char* file, int line) {
  const Place place{"__cluster_barrier_wait", file, line};
  Fiber& fiber = machine.fibers[machine.running];
  ClusterBarrier& barrier = machine.cluster;
  if (!fiber.arrived) {
    throw Error("emu: " + thread_name(machine.running) + " waits without having arrived, " +
                place.text());
  }
  const unsigned generation = fiber.cluster_generation;
  if (barrier.generation == generation) wait_here(State::kAtClusterBarrier, place);
  fiber.arrived = false;
  order_memory(&barrier.order[generation & 1], true);
}

unsigned rank_in_cluster() { return block_of(machine.running); }

unsigned blocks_in_cluster() { return static_cast<unsigned>(machine.blocks.size()); }

void* map_shared(const void* own, unsigned rank) {
  const Block& block = running_block();
  const auto offset = static_cast<const char*>(own) - static_cast<char*>(block.shared.get());
  if (rank >= machine.blocks.size() || block.shared == nullptr || offset < 0 ||
      static_cast<size_t>(offset) >= machine.shared_bytes) {
    throw Error("emu: " + thread_name(machine.running) + " maps byte " + std::to_string(offset) +
                " of " + std::to_string(machine.shared_bytes) + " to block " +
                std::to_string(rank) + " of " + std::to_string(machine.blocks.size()));
  }
  if (rank != rank_in_cluster() && machine.cluster.generation == 0) {
    throw Error("emu: " + thread_name(machine.running) + " maps the shared memory of block " +
                std::to_string(rank) + ", which may not have started: no cluster barrier yet");
  }
  return static_cast<char*>(machine.blocks[rank].shared.get()) + offset;
}

void sync_warp(unsigned mask, const char* file, int line) {
  const Place place{"__syncwarp", file, line};
  check_mask(mask, place);
  Warp& warp = machine.warps[machine.running / kWarp];
  uint64_t* const order = &warp.order[warp.generation & 1];
  order_memory(order, false);
  join_warp(place);
  order_memory(order, true);
}

const uint64_t* exchange(unsigned mask, uint64_t bits, const char* what, const char* file,
                         int line) {
  const Place place{what, file, line};
  check_mask(mask, place);
  Warp& warp = machine.warps[machine.running / kWarp];
  warp.slots[warp.generation & 1][machine.running % kWarp] = bits;
  return warp.slots[join_warp(place) & 1];
}

unsigned lane() { return machine.running % kWarp; }

}  // namespace sf::emu

sf::emu::Index3 threadIdx, blockIdx, blockDim, gridDim;
