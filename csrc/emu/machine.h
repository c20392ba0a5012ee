// What the emulator's own files share: the fibers of the cluster that runs, and what they wait for.
// These files are compiled WITHOUT sanitizer instrumentation even in sanitizer builds (SF_EMU_TSAN
// / SF_EMU_ASAN then only switch the fiber annotations on): their bookkeeping must neither race in
// TSan's eyes nor order the kernel's memory.
#pragma once

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "emu/emu.h"

namespace sf::emu {

constexpr unsigned kWarp = 32;

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

extern Machine machine;

inline unsigned block_of(unsigned fiber) { return fiber / machine.num_threads; }

inline Block& running_block() { return machine.blocks[block_of(machine.running)]; }

// The thread and its block, for errors.
std::string thread_name(unsigned fiber);

[[noreturn]] void divergent(const Place& place, unsigned fiber, const std::string& other);

// In TSan's eyes: what one fiber released at the address comes before what another acquires there.
void order_memory(void* address, bool acquire);

// A block that has ended no longer has its memory: a peer that still reads it sees NaN, and ASan
// names it.
void poison_shared(void* memory, bool ended);

// The calling thread is the one that fibers give the core back to.
void become_scheduler();
void to_scheduler();
void to_fiber(unsigned fiber);

// Ready to run the kernel from its start, on its own stack.
void reset_fiber(Fiber& fiber);

}  // namespace sf::emu
