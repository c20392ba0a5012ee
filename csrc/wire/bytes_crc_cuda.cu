#include "core/launch.cuh"
#include "core/reduce.cuh"
#include "wire/bytes_crc.h"
#include "wire/crc32c_block.cuh"
#include "wire/fp8_chunk.cuh"

namespace sf::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kStrideLevel = 8;  // kThreads = 2^kStrideLevel
constexpr unsigned kSummaryThreads = 512;

struct Shared {
  CrcTables tables;
  uint32_t partial[kMaxWarps];
};

// One block takes kCrcPartBytes, the last one what is left; a thread every blockDim-th chunk of 16.
// Moves every byte, and 4 per block.
__global__ void __launch_bounds__(kThreads)
    bytes_crc_kernel(const uint8_t* __restrict__ data, int64_t nbytes,
                     uint32_t* __restrict__ part_crc) {
  Shared& shared = shared_storage<Shared>();
  load_crc_tables(shared.tables);
  __syncthreads();
  const int64_t begin = int64_t{blockIdx.x} * kCrcPartBytes;
  const int64_t left = nbytes - begin;
  const Chunks chunks(static_cast<int>(left < kCrcPartBytes ? left : kCrcPartBytes));
  const uint8_t* from = data + begin;
  const bool vectors = chunks.width % kCrcChunk == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  uint32_t crc = 0;
  for (int round = 0; round < chunks.rounds; ++round) {
    const int chunk = chunks.index(round);
    if (chunk < 0) continue;
    const int first = chunks.first(chunk);
    const uint4 bytes = vectors ? load_codes<true>(from, first) : load_codes<false>(from, first);
    crc = crc_over(shared.tables, kStrideLevel, crc) ^ crc_of_chunk(shared.tables, bytes);
  }
  crc = crc_of_block(shared.tables, crc, shared.partial);
  if (threadIdx.x == 0) part_crc[blockIdx.x] = crc;
}

struct Sum {
  uint32_t crc;  // of disjoint parts, each already shifted to its place: they add up
  __device__ __forceinline__ static Sum identity() { return {0}; }
  __device__ __forceinline__ void merge(const Sum& other) { crc ^= other.crc; }
};

struct SummaryShared {
  Sum partial[kMaxWarps];
};

// One block; each thread joins the checksums of a range of parts. Reads 4 bytes per part.
__global__ void __launch_bounds__(kSummaryThreads)
    bytes_crc_summary_kernel(const uint32_t* __restrict__ part_crc, int64_t parts, int64_t nbytes,
                             int64_t* __restrict__ out) {
  const int64_t begin = parts * threadIdx.x / blockDim.x;
  const int64_t end = parts * (threadIdx.x + 1) / blockDim.x;
  const auto bytes = [](int64_t n) { return static_cast<uint64_t>(n); };
  const uint32_t over_part = gf2::over_bytes(bytes(kCrcPartBytes));
  Sum sum = Sum::identity();
  for (int64_t part = begin; part < end; ++part) {
    const bool is_last = part == parts - 1;
    const uint32_t over =
        is_last ? gf2::over_bytes(bytes(nbytes - part * kCrcPartBytes)) : over_part;
    sum.crc = gf2::multiply(sum.crc, over) ^ part_crc[part];
  }
  const int64_t past = end * kCrcPartBytes < nbytes ? end * kCrcPartBytes : nbytes;
  sum.crc = gf2::multiply(sum.crc, gf2::over_bytes(bytes(nbytes - past)));
  sum = block_reduce(sum, shared_storage<SummaryShared>().partial);
  if (threadIdx.x == 0) {
    const uint32_t start = gf2::multiply(~0u, gf2::over_bytes(bytes(nbytes)));
    out[0] = static_cast<int64_t>(static_cast<uint32_t>(~(start ^ sum.crc)));
  }
}

}  // namespace

void bytes_crc(const BytesCrc& args, Stream stream) {
  const DeviceScope device(args.data.device);
  const int64_t nbytes = args.data.shape[0], parts = args.part_crc.shape[0];
  if (parts > 0) {
    const LaunchShape shape{blocks_for_rows("bytes_crc", parts), kThreads, sizeof(Shared)};
    launch(shape, stream, bytes_crc_kernel, args.data.as<const uint8_t>(), nbytes,
           args.part_crc.as<uint32_t>());
  }
  const LaunchShape shape{1, kSummaryThreads, sizeof(SummaryShared)};
  launch(shape, stream, bytes_crc_summary_kernel, args.part_crc.as<const uint32_t>(), parts, nbytes,
         args.crc.as<int64_t>());
}

}  // namespace sf::cuda
