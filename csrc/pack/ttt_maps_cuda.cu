#include "core/launch.cuh"
#include "core/reduce.cuh"
#include "pack/ttt_maps.h"

namespace sf::cuda {
namespace {

constexpr unsigned kThreads = 1024;

struct Batch {
  const uint8_t* mask;
  const int32_t* cu_seqlens;
  int tokens;
  int samples;
  int ttt_length;
};

struct Sample {
  int begin, end;
};

// The sample that holds position t: the last one that begins at or before t (empty ones lose).
__device__ __forceinline__ Sample sample_of(const Batch& batch, int t) {
  int low = 0, high = batch.samples;  // cu_seqlens[low] <= t < cu_seqlens[high]
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (batch.cu_seqlens[middle] <= t) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return {batch.cu_seqlens[low], batch.cu_seqlens[low + 1]};
}

// Row t runs at `step`: some mask[t + j] with j in [step, L) inside t's sample.
__device__ __forceinline__ bool active_at(const Batch& batch, int t, Sample sample, int step) {
  for (int j = step; j < batch.ttt_length && t + j < sample.end; ++j) {
    if (batch.mask[t + j]) return true;
  }
  return false;
}

// How many rows u - i, i in [0, L), lie in u's sample.
__device__ __forceinline__ int rows_that_score(const Batch& batch, int u, Sample sample) {
  const int before = u - sample.begin + 1;
  return before < batch.ttt_length ? before : batch.ttt_length;
}

struct Total {
  int64_t sum;
  int lowest, unused;

  static __device__ __forceinline__ Total identity() { return {0, INT32_MAX, 0}; }
  __device__ __forceinline__ void merge(const Total& other) {
    sum += other.sum;
    lowest = other.lowest < lowest ? other.lowest : lowest;
  }
};

struct CountShared {
  Total partial[kMaxWarps];
};

// Block k computes counts[k], reading the mask (T bytes, and up to L - k bytes around each from L1)
// and cu_seqlens. Integers only: no order of additions can change a result.
__global__ void __launch_bounds__(kThreads) ttt_counts_kernel(const Batch batch, int64_t* counts) {
  const int kind = blockIdx.x;
  const int length = batch.ttt_length;
  Total total = Total::identity();
  for (int64_t position = threadIdx.x; position < batch.tokens; position += blockDim.x) {
    const int t = static_cast<int>(position);
    const Sample sample = sample_of(batch, t);
    if (kind < length) {
      total.sum += active_at(batch, t, sample, kind);
    } else if (batch.mask[t]) {
      total.sum += kind == length ? rows_that_score(batch, t, sample) : 1;
      if (t == sample.end - 1 && t < total.lowest) total.lowest = t;
    }
  }
  total = block_reduce(total, shared_storage<CountShared>().partial);
  if (threadIdx.x != 0) return;
  const bool is_misplaced = kind == length + 2;
  counts[kind] = !is_misplaced ? total.sum : total.lowest == INT32_MAX ? -1 : total.lowest;
}

// Running numbers of what the scan has passed.
struct Ranks {
  int active;    // rows active at this step
  int previous;  // rows active at the step before
  int teachers;  // masked positions
  int pairs;

  static __device__ __forceinline__ Ranks identity() { return {0, 0, 0, 0}; }
  __device__ __forceinline__ void merge(const Ranks& other) {
    active += other.active;
    previous += other.previous;
    teachers += other.teachers;
    pairs += other.pairs;
  }
};

struct FillShared {
  Ranks partial[kMaxWarps];
};

struct MapPointers {
  int32_t *active, *parent, *pair_source, *pair_step, *pair_teacher, *teacher_rows;
};

__device__ __forceinline__ int64_t active_before(const int64_t* counts, int step) {
  int64_t sum = 0;
  for (int k = 0; k < step; ++k) sum += counts[k];
  return sum;
}

// Block i writes everything of step i. It walks u = 0 .. T - 1 + i in tiles of one position per
// thread and pairs masked position u with row t = u - i, so that one scan numbers both: rows by t,
// pairs and teacher rows by u. Reads T (L + 1) mask bytes at most, mostly from L1; writes each
// output once.
__global__ void __launch_bounds__(kThreads)
    ttt_fill_kernel(const Batch batch, const int64_t* counts, const MapPointers out) {
  const int step = blockIdx.x;
  const int64_t active_base = active_before(counts, step);
  const int64_t parent_base = active_base - counts[0];
  FillShared& shared = shared_storage<FillShared>();
  Ranks passed = Ranks::identity();
  for (int64_t tile = 0; tile < int64_t{batch.tokens} + step; tile += blockDim.x) {
    const int64_t position = tile + threadIdx.x;
    const bool has_row = position >= step && position - step < batch.tokens;
    const bool has_teacher = position < batch.tokens && batch.mask[position];
    const int u = static_cast<int>(position);
    const int t = static_cast<int>(position - step);
    Ranks mine = Ranks::identity();
    bool is_pair = false;
    if (has_row) {
      const Sample sample = sample_of(batch, t);
      mine.active = active_at(batch, t, sample, step);
      mine.previous = step > 0 && active_at(batch, t, sample, step - 1);
      is_pair = has_teacher && u < sample.end;
    }
    if (has_teacher) {
      mine.teachers = 1;
      mine.pairs = rows_that_score(batch, u, sample_of(batch, u));
    }
    const ScanResult<Ranks> scan = block_scan(mine, shared.partial);
    Ranks rank = passed;
    rank.merge(scan.before);
    passed.merge(scan.total);
    if (mine.active) {
      out.active[active_base + rank.active] = t;
      if (step > 0) out.parent[parent_base + rank.active] = rank.previous;
    }
    if (has_teacher && step == 0) out.teacher_rows[rank.teachers] = u;
    if (is_pair) {
      const int64_t pair = int64_t{rank.pairs} + step;
      out.pair_source[pair] = static_cast<int32_t>(active_base + rank.active);
      out.pair_step[pair] = step;
      out.pair_teacher[pair] = rank.teachers;
    }
  }
}

Batch batch_of(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts) {
  return {mask.as<const uint8_t>(), cu_seqlens.as<const int32_t>(), static_cast<int>(mask.shape[0]),
          static_cast<int>(cu_seqlens.shape[0] - 1), static_cast<int>(counts.shape[0] - 3)};
}

}  // namespace

void ttt_counts(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
                Stream stream) {
  const DeviceScope device(counts.device);
  const Batch batch = batch_of(mask, cu_seqlens, counts);
  launch({static_cast<unsigned>(batch.ttt_length) + 3, threads_for(batch.tokens, kThreads),
          sizeof(CountShared)},
         stream, ttt_counts_kernel, batch, counts.as<int64_t>());
}

void ttt_fill(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
              const TttMaps& out, Stream stream) {
  const DeviceScope device(counts.device);
  const Batch batch = batch_of(mask, cu_seqlens, counts);
  const MapPointers pointers{out.active.as<int32_t>(),       out.parent.as<int32_t>(),
                             out.pair_source.as<int32_t>(),  out.pair_step.as<int32_t>(),
                             out.pair_teacher.as<int32_t>(), out.teacher_rows.as<int32_t>()};
  launch({static_cast<unsigned>(batch.ttt_length), threads_for(batch.tokens, kThreads),
          sizeof(FillShared)},
         stream, ttt_fill_kernel, batch, counts.as<const int64_t>(), pointers);
}

}  // namespace sf::cuda
