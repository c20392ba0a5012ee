// The scheduler: runs the clusters of a grid one after another, the fibers of each in the order
// asked for.
#include <utility>

#include "emu/machine.h"

namespace sf::emu {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxCluster = 8;
constexpr size_t kSharedAlignment = 128;

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
  become_scheduler();
  std::vector<unsigned> order = arranged(total);
  for (unsigned i : arranged(grid.x * grid.y * grid.z / cluster)) {
    run_cluster(i * cluster, grid, block, order);
  }
}

}  // namespace sf::emu
