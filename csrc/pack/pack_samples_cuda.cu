#include "core/dtype.h"
#include "core/launch.cuh"
#include "core/vector.cuh"
#include "pack/pack_samples.h"
#include "wire/fp8_convert.h"

namespace sf::cuda {
namespace {

constexpr unsigned kThreads = 256;
// Elements (bytes of a copy) that one block moves: 8 vectors of 16 bytes a thread.
constexpr int64_t kTile = int64_t{kThreads} * 16 * 8;
constexpr int kMaxSegments = 64;

enum class Task : int32_t { kBytes, kTokens, kToF32, kToBF16 };

// One tensor of one sample, all of it.
struct Segment {
  const void* from;
  const float* scales;  // kToF32, kToBF16
  void* to;             // kTokens: the packed ids
  int64_t count;        // elements; kBytes: bytes
  int32_t group_width;  // elements that share a scale; kTokens: the sample's index, -1: no samples
  Task task;
};

struct Segments {
  Segment segment[kMaxSegments];
  int32_t first_tile[kMaxSegments + 1];
  int32_t size;
  int64_t* ids;
  int64_t* positions;
  int32_t* cu_seqlens;
};

static_assert(sizeof(Segments) <= 4096, "kernel parameters");

__device__ __forceinline__ int segment_of(const Segments& all, int tile) {
  int low = 0, high = all.size;  // first_tile[low] <= tile < first_tile[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (all.first_tile[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ bool aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0;
}

__device__ __forceinline__ void copy_bytes(const Segment& s, int64_t begin, int64_t end) {
  const auto* from = static_cast<const uint8_t*>(s.from);
  auto* to = static_cast<uint8_t*>(s.to);
  if (aligned(from) && aligned(to)) {  // so is begin, a multiple of the tile
    const int64_t whole = begin + (end - begin) / 16 * 16;
    for (int64_t i = begin + threadIdx.x * 16; i < whole; i += kThreads * 16) {
      *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
    }
    begin = whole;
  }
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) to[i] = from[i];
}

__device__ __forceinline__ void widen_tokens(const Segments& all, const Segment& s, int64_t begin,
                                             int64_t end) {
  const auto* from = static_cast<const int32_t*>(s.from);
  auto* to = static_cast<int64_t*>(s.to);
  const int64_t start = to - all.ids;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    to[i] = from[i];
    all.positions[start + i] = i;
  }
  if (begin == 0 && threadIdx.x == 0) {
    if (s.group_width == 0) all.cu_seqlens[0] = 0;
    all.cu_seqlens[s.group_width + 1] = static_cast<int32_t>(start + s.count);
  }
}

// Four codes of a word, times the scale.
__device__ __forceinline__ void decode_word(uint32_t word, float scale, float* x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = fp8::decode(static_cast<uint8_t>(word >> (8 * i))) * scale;
  }
}

template <class T>
__device__ __forceinline__ void decode(const Segment& s, int64_t begin, int64_t end) {
  const auto* from = static_cast<const uint8_t*>(s.from);
  auto* to = static_cast<T*>(s.to);
  if (aligned(from) && aligned(to) && s.group_width % 16 == 0) {
    for (int64_t i = begin + threadIdx.x * 16; i < end; i += kThreads * 16) {
      const uint4 codes = *reinterpret_cast<const uint4*>(from + i);
      const float scale = s.scales[i / s.group_width];
      float x[kChunk];
      Chunk<T> chunk;
      decode_word(codes.x, scale, x);
      decode_word(codes.y, scale, x + 4);
      pack(x, chunk);
      store_chunk(to + i, chunk);
      decode_word(codes.z, scale, x);
      decode_word(codes.w, scale, x + 4);
      pack(x, chunk);
      store_chunk(to + i + kChunk, chunk);
    }
    return;
  }
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    store_one(to + i, fp8::decode(from[i]) * s.scales[i / s.group_width]);
  }
}

// A block moves one tile of one segment; the table lies in the kernel's parameters. From memory:
// the bytes of the segments once in, the packed batch once out.
__global__ void __launch_bounds__(kThreads) pack_samples_kernel(const Segments all) {
  const int tile = static_cast<int>(blockIdx.x);
  const int index = segment_of(all, tile);
  const Segment& s = all.segment[index];
  const int64_t begin = (tile - all.first_tile[index]) * kTile;
  const int64_t end = begin + kTile < s.count ? begin + kTile : s.count;
  switch (s.task) {
    case Task::kBytes:
      return copy_bytes(s, begin, end);
    case Task::kTokens:
      return widen_tokens(all, s, begin, end);
    case Task::kToF32:
      return decode<float>(s, begin, end);
    case Task::kToBF16:
      return decode<bf16>(s, begin, end);
  }
}

// Collects segments and launches them when the table is full.
class Batch {
 public:
  Batch(const PackedViews& out, Stream stream) : stream_(stream) {
    all_.ids = out.ids.as<int64_t>();
    all_.positions = out.positions.as<int64_t>();
    all_.cu_seqlens = out.cu_seqlens.as<int32_t>();
  }

  void add(const Segment& segment) {
    if (all_.size == kMaxSegments) flush();
    // A sample without tokens still writes its end.
    const int64_t tiles = segment.task == Task::kTokens && segment.count == 0
                              ? 1
                              : (segment.count + kTile - 1) / kTile;
    if (tiles == 0) return;
    if (tiles > INT32_MAX - all_.first_tile[all_.size]) flush();
    all_.segment[all_.size] = segment;
    all_.first_tile[all_.size + 1] = all_.first_tile[all_.size] + static_cast<int32_t>(tiles);
    ++all_.size;
  }

  void flush() {
    if (all_.size == 0) return;
    const auto blocks = static_cast<unsigned>(all_.first_tile[all_.size]);
    launch({blocks, kThreads, 0}, stream_, pack_samples_kernel, all_);
    all_.size = 0;
  }

 private:
  Segments all_{};
  Stream stream_;
};

void add_feature(Batch& batch, const PackFeature& feature, const TensorView& out, int64_t start) {
  const int64_t row_bytes = out.shape[1] * static_cast<int64_t>(dtype_size(out.dtype));
  char* to = out.as<char>() + start * row_bytes;
  if (feature.scales == nullptr) {
    batch.add({feature.data.data, nullptr, to, feature.data.nbytes(), 0, Task::kBytes});
    return;
  }
  const int64_t group_width = feature.data.shape[1] / feature.scales->shape[1];
  batch.add({feature.data.data, feature.scales->as<const float>(), to, feature.data.numel(),
             static_cast<int32_t>(group_width), out.dtype == kBF16 ? Task::kToBF16 : Task::kToF32});
}

}  // namespace

void pack_samples(const std::vector<PackSource>& samples, const PackedViews& out, Stream stream) {
  const DeviceScope device(out.ids.device);
  Batch batch(out, stream);
  int64_t start = 0;
  for (size_t k = 0; k < samples.size(); ++k) {
    const PackSource& sample = samples[k];
    const int64_t length = sample.ids.shape[0];
    batch.add({sample.ids.data, nullptr, out.ids.as<int64_t>() + start, length,
               static_cast<int32_t>(k), Task::kTokens});
    batch.add({sample.mask.data, nullptr, out.mask.as<uint8_t>() + start, length, 0, Task::kBytes});
    for (size_t f = 0; f < out.features.size(); ++f) {
      add_feature(batch, feature_of(sample, f), out.features[f], start);
    }
    start += length;
  }
  if (samples.empty()) batch.add({nullptr, nullptr, out.ids.data, 0, -1, Task::kTokens});
  batch.flush();
}

}  // namespace sf::cuda
