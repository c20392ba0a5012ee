// Runs CUDA kernels on one CPU core, thread by thread, to test the SAME .cu files where no GPU is.
//
// Every CUDA thread of a block is a fiber (own stack, hand-switched); blocks run one after another,
// the blocks of a cluster together.
// A fiber runs until it reaches a barrier or a warp collective, so the order of threads between two
// such points is ours: forward, reverse or random. A kernel whose result depends on it lacks a
// barrier.
//   * shared memory is a fresh heap block of exactly the launch's size, filled with 0xFF (float
//   NaN,
//     int -1) before every block: reading what was never written shows, ASan sees an overrun;
//   * under TSan only __syncthreads and __syncwarp order memory, so a missing one is named with its
//   line;
//   * threads that wait at different barriers, or for one that has returned, end the launch with
//   Error.
//   * a block's shared memory is poisoned again when its last thread returns, so a peer of the
//     cluster that reads it later sees NaN; one that touches it before any cluster barrier, when
//     the block may not have started, ends the launch with Error.
// Stricter than the hardware on purpose: warp collectives take the full mask only, blocks are whole
// warps, a thread may not return while others wait, and each arrival at the cluster barrier needs
// its wait. Not modelled: memory between blocks of one
// launch, inline PTX, asynchronous copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace sf::emu {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// What a kernel sees as threadIdx, blockIdx, blockDim, gridDim: of the fiber on the core.
struct ThreadContext {
  Index3 thread, block, block_dim, grid_dim;
};

enum class Order : int { kForward = 0, kReverse = 1, kRandom = 2 };

// Order of threads within a block, and of blocks within a grid, of all launches from now on.
void set_order(Order order, uint64_t seed);

using Body = void (*)(void* closure);

// Runs closure once per thread of the grid; throws Error, or what the kernel threw. cluster: blocks
// per cluster, along x.
void run_grid(Index3 grid, Index3 block, unsigned cluster, size_t shared_bytes, Body body,
              void* closure);

// The running block's shared memory. Throws Error if fewer than num_bytes were asked for at launch.
void* shared_memory(size_t num_bytes);

void sync_threads(const char* file, int line);
void sync_warp(unsigned mask, const char* file, int line);

// Of the cluster that the running block belongs to. map_shared: what own is in the running block's
// shared memory, in that of block `rank`.
void arrive_cluster(const char* file, int line);
void wait_cluster(const char* file, int line);
unsigned rank_in_cluster();
unsigned blocks_in_cluster();
void* map_shared(const void* own, unsigned rank);

// Every lane gives its bits and gets all 32 (valid until the lane's next collective).
const uint64_t* exchange(unsigned mask, uint64_t bits, const char* what, const char* file,
                         int line);

// This thread's index in its warp, 0..31.
unsigned lane();

}  // namespace sf::emu

// As in CUDA, names of the global namespace. Set whenever a fiber takes the core.
extern sf::emu::Index3 threadIdx, blockIdx, blockDim, gridDim;
