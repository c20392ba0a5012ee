// What a kernel calls: barriers, shared memory, collectives of warps and clusters.
#include "emu/machine.h"

namespace sf::emu {
namespace {

constexpr unsigned kFullMask = 0xffffffffu;

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

}  // namespace

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
