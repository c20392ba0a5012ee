// Fibers: their stacks, the switch between them and the scheduler, and what sanitizers are told.
#include <sys/mman.h>

#include "emu/fiber_switch.h"
#include "emu/machine.h"

namespace sf::emu {

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 32 * kPage;

}  // namespace

Machine machine;

std::string thread_name(unsigned index) {
  return "thread " + std::to_string(index % machine.num_threads) + " of block " +
         std::to_string(machine.fibers[index].context.block.x);
}

void divergent(const Place& place, unsigned index, const std::string& other) {
  throw Error("emu: divergent barrier: " + thread_name(index) + " waits in " + place.text() + ", " +
              other);
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

void become_scheduler() {
#if defined(SF_EMU_TSAN)
  machine.tsan = __tsan_get_current_fiber();
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

namespace {

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

}  // namespace

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

}  // namespace sf::emu

sf::emu::Index3 threadIdx, blockIdx, blockDim, gridDim;
