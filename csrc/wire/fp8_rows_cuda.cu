#include "core/launch.cuh"
#include "core/reduce.cuh"
#include "wire/crc32c_block.cuh"
#include "wire/fp8_chunk.cuh"
#include "wire/fp8_convert.h"
#include "wire/fp8_rows.h"

namespace sf::cuda {
namespace {

constexpr unsigned kMaxThreads = 256;
constexpr int kRowsPerBlock = 8;  // the tables are loaded once for so many
constexpr unsigned kSummaryThreads = 512;
static_assert(kChunkSize == kCrcChunk);

struct MaxBits {
  uint32_t bits;
  __device__ __forceinline__ static MaxBits identity() { return {0}; }
  __device__ __forceinline__ void merge(const MaxBits& other) {
    bits = bits > other.bits ? bits : other.bits;
  }
};

struct Shared {
  CrcTables tables;
  MaxBits max_partial[kMaxWarps];
  uint32_t crc_partial[kMaxWarps];
};

// One block takes kRowsPerBlock rows, one after another; a thread takes every blockDim-th chunk of
// 16. A row is read for its maximum and, from the caches, once more for its codes.
// Moves width * (sizeof(T) + 1) + 4 bytes per row, and 4 more for the checksum (row_crc null:
// none).
template <bool kVector, class T>
__global__ void __launch_bounds__(kMaxThreads)
    fp8_pack_kernel(const T* __restrict__ x, int64_t rows, int width, int stride_level,
                    uint8_t* __restrict__ payload, float* __restrict__ scale,
                    uint32_t* __restrict__ row_crc) {
  Shared& shared = shared_storage<Shared>();
  const Chunks chunks(width);
  if (row_crc != nullptr) load_crc_tables(shared.tables);
  const int64_t begin = int64_t{blockIdx.x} * kRowsPerBlock;
  const int64_t end = begin + kRowsPerBlock < rows ? begin + kRowsPerBlock : rows;
  for (int64_t row = begin; row < end; ++row) {
    const T* x_row = x + row * width;
    uint8_t* codes_row = payload + row * width;
    float v[kChunkSize];
    MaxBits most = MaxBits::identity();
    for (int round = 0; round < chunks.rounds; ++round) {
      const int chunk = chunks.index(round);
      if (chunk < 0) continue;
      load_values<kVector>(x_row, chunks.first(chunk), v);
#pragma unroll
      for (int i = 0; i < kChunkSize; ++i) most.merge({fp8::magnitude(v[i])});
    }
    most = block_reduce(most, shared.max_partial);
    const bool finite = most.bits < fp8::kInfinity<float>;
    const fp8::RowScale by = fp8::row_scale(finite ? __uint_as_float(most.bits) : 0.0f);
    uint32_t crc = 0;
    for (int round = 0; round < chunks.rounds; ++round) {
      const int chunk = chunks.index(round);
      if (chunk < 0) continue;
      const int first = chunks.first(chunk);
      uint4 codes{0x7f7f7f7fu, 0x7f7f7f7fu, 0x7f7f7f7fu, 0x7f7f7f7fu};
      if (finite) {
        load_values<kVector>(x_row, first, v);
        codes = uint4{encode_word(v, 0, by.inv), encode_word(v, 4, by.inv),
                      encode_word(v, 8, by.inv), encode_word(v, 12, by.inv)};
      }
      store_codes<kVector>(codes_row, first, codes);
      if (row_crc != nullptr) {
        crc = crc_over(shared.tables, stride_level, crc) ^ crc_of_chunk(shared.tables, codes);
      }
    }
    if (row_crc != nullptr) crc = crc_of_block(shared.tables, crc, shared.crc_partial);
    if (threadIdx.x == 0) {
      scale[row] = finite ? by.scale : __uint_as_float(fp8::kQuietNan);
      if (row_crc != nullptr) row_crc[row] = crc;
    }
    __syncthreads();  // the partial maxima are read no more
  }
}

// As above. Moves width * (1 + sizeof(T)) + 4 bytes per row.
template <bool kVector, class T>
__global__ void __launch_bounds__(kMaxThreads)
    fp8_unpack_kernel(const uint8_t* __restrict__ payload, const float* __restrict__ scale,
                      int64_t rows, int width, int stride_level, T* __restrict__ y,
                      uint32_t* __restrict__ row_crc) {
  Shared& shared = shared_storage<Shared>();
  const Chunks chunks(width);
  if (row_crc != nullptr) load_crc_tables(shared.tables);
  __syncthreads();
  const int64_t begin = int64_t{blockIdx.x} * kRowsPerBlock;
  const int64_t end = begin + kRowsPerBlock < rows ? begin + kRowsPerBlock : rows;
  for (int64_t row = begin; row < end; ++row) {
    const float by = scale[row];
    uint32_t crc = 0;
    for (int round = 0; round < chunks.rounds; ++round) {
      const int chunk = chunks.index(round);
      if (chunk < 0) continue;
      const int first = chunks.first(chunk);
      const uint4 codes = load_codes<kVector>(payload + row * width, first);
      if (row_crc != nullptr) {
        crc = crc_over(shared.tables, stride_level, crc) ^ crc_of_chunk(shared.tables, codes);
      }
      float v[kChunkSize];
#pragma unroll
      for (int i = 0; i < kChunkSize; ++i) {
        v[i] = fp8::decode(static_cast<uint8_t>(byte_of(codes, i))) * by;
      }
      store_values<kVector>(y + row * width, first, v);
    }
    if (row_crc == nullptr) continue;
    crc = crc_of_block(shared.tables, crc, shared.crc_partial);
    if (threadIdx.x == 0) row_crc[row] = crc;
    __syncthreads();  // the partial checksums are read no more
  }
}

struct Totals {
  uint32_t crc;  // of disjoint parts, each already shifted to its place: they add up
  uint32_t not_finite;
  __device__ __forceinline__ static Totals identity() { return {0, 0}; }
  __device__ __forceinline__ void merge(const Totals& other) {
    crc ^= other.crc;
    not_finite += other.not_finite;
  }
};

struct SummaryShared {
  Totals partial[kMaxWarps];
};

// One block; each thread joins the checksums of a range of rows. Reads 8 bytes per row.
__global__ void __launch_bounds__(kSummaryThreads)
    fp8_summary_kernel(const float* __restrict__ scale, const uint32_t* __restrict__ row_crc,
                       int64_t rows, int width, int64_t* __restrict__ summary) {
  const int64_t begin = rows * threadIdx.x / blockDim.x;
  const int64_t end = rows * (threadIdx.x + 1) / blockDim.x;
  const uint32_t over_row = gf2::over_bytes(static_cast<uint64_t>(width));
  const uint32_t over_scale = gf2::over_bytes(sizeof(float));
  uint32_t payload_crc = 0, scale_crc = 0;
  Totals totals = Totals::identity();
  for (int64_t row = begin; row < end; ++row) {
    const float value = scale[row];
    totals.not_finite += value != value;
    if (row_crc == nullptr) continue;
    payload_crc = gf2::multiply(payload_crc, over_row) ^ row_crc[row];
    scale_crc = gf2::multiply(scale_crc ^ __float_as_uint(value), over_scale);
  }
  const auto bytes = [](int64_t n) { return static_cast<uint64_t>(n); };
  const uint32_t rest = gf2::over_bytes(bytes((rows - end) * width + rows * 4));
  totals.crc = gf2::multiply(payload_crc, rest) ^
               gf2::multiply(scale_crc, gf2::over_bytes(bytes((rows - end) * 4)));
  totals = block_reduce(totals, shared_storage<SummaryShared>().partial);
  if (threadIdx.x == 0) {
    const uint32_t start = gf2::multiply(~0u, gf2::over_bytes(bytes(rows * (width + 4))));
    summary[0] =
        row_crc == nullptr ? 0 : static_cast<int64_t>(static_cast<uint32_t>(~(start ^ totals.crc)));
    summary[1] = totals.not_finite;
  }
}

struct Shape {
  int64_t rows;
  int width;
  LaunchShape launch;
  int stride_level;  // blockDim = 2^stride_level
};

Shape shape_of(const char* op, const TensorView& values) {
  Shape shape{values.shape[0], static_cast<int>(values.shape[1]), {}, 5};
  const unsigned wanted = threads_for((shape.width + kChunkSize - 1) / kChunkSize, kMaxThreads);
  while ((1u << shape.stride_level) < wanted) ++shape.stride_level;
  const int64_t blocks = (shape.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  shape.launch = {blocks_for_rows(op, blocks), 1u << shape.stride_level, sizeof(Shared)};
  return shape;
}

uint32_t* crc_of(const TensorView& row_crc, bool checksum) {
  return checksum ? row_crc.as<uint32_t>() : nullptr;
}

bool vectors_fit(const TensorView& values, const TensorView& payload) {
  return values.shape[1] % kChunkSize == 0 && vector_aligned(values.data) &&
         vector_aligned(payload.data);
}

template <class T>
void pack(const Fp8Pack& args, Stream stream) {
  const Shape shape = shape_of("fp8_pack", args.x);
  const auto kernel =
      vectors_fit(args.x, args.payload) ? fp8_pack_kernel<true, T> : fp8_pack_kernel<false, T>;
  launch(shape.launch, stream, kernel, args.x.as<const T>(), shape.rows, shape.width,
         shape.stride_level, args.payload.as<uint8_t>(), args.scale.as<float>(),
         crc_of(args.row_crc, args.checksum));
}

template <class T>
void unpack(const Fp8Unpack& args, Stream stream) {
  const Shape shape = shape_of("fp8_unpack", args.y);
  const auto kernel =
      vectors_fit(args.y, args.payload) ? fp8_unpack_kernel<true, T> : fp8_unpack_kernel<false, T>;
  launch(shape.launch, stream, kernel, args.payload.as<const uint8_t>(),
         args.scale.as<const float>(), shape.rows, shape.width, shape.stride_level, args.y.as<T>(),
         crc_of(args.row_crc, args.checksum));
}

template <class Args>
void summarise(const Args& args, int64_t rows, int64_t width, Stream stream) {
  const LaunchShape shape{1, kSummaryThreads, sizeof(SummaryShared)};
  launch(shape, stream, fp8_summary_kernel, args.scale.template as<const float>(),
         static_cast<const uint32_t*>(crc_of(args.row_crc, args.checksum)), rows,
         static_cast<int>(width), args.summary.template as<int64_t>());
}

}  // namespace

void fp8_pack(const Fp8Pack& args, Stream stream) {
  const DeviceScope device(args.x.device);
  if (args.x.shape[0] > 0) {
    if (args.x.dtype == kF32) pack<float>(args, stream);
    if (args.x.dtype == kBF16) pack<bf16>(args, stream);
    if (args.x.dtype == kF16) pack<f16>(args, stream);
  }
  summarise(args, args.x.shape[0], args.x.shape[1], stream);
}

void fp8_unpack(const Fp8Unpack& args, Stream stream) {
  const DeviceScope device(args.y.device);
  if (args.y.shape[0] > 0) {
    if (args.y.dtype == kF32) unpack<float>(args, stream);
    if (args.y.dtype == kBF16) unpack<bf16>(args, stream);
    if (args.y.dtype == kF16) unpack<f16>(args, stream);
  }
  summarise(args, args.y.shape[0], args.y.shape[1], stream);
}

}  // namespace sf::cuda
