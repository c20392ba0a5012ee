#include <cmath>

#include "core/dtype.h"
#include "core/launch.cuh"
#include "core/online_softmax.cuh"
#include "core/reduce.cuh"
#include "core/vector.cuh"
#include "loss/soft_ce_rows.h"

namespace sf::cuda {
namespace {

// How a kernel gets at its two rows.
enum class Access {
  kHeld,      // both rows stay in registers, each thread kHeldChunks chunks of each
  kStreamed,  // 16-byte vectors, read again in the second pass (from L2)
  kScalar,    // the same, one element at a time: rows that are not all 16-byte aligned
};

// Raw logits of both rows take 2 * kHeldChunks * sizeof(Chunk<T>) / 4 = 32 of the 64 registers that
// a thread of a 1024-thread block may have. So a bf16 row may have 32768 elements, a float row
// 16384.
template <class T>
constexpr int kHeldChunks = 16 / static_cast<int>(sizeof(T)) / 2;
constexpr unsigned kHeldThreads = 1024;
constexpr unsigned kStreamedThreads = 512;

template <class T>
constexpr int64_t kHeldVocab = int64_t{kHeldChunks<T>} * kHeldThreads * kChunk;

template <class Z, class T>
struct Operands {
  Z* logits;
  const T* teacher;
  const int32_t* row_to_teacher;
  const float* weight;
  const float* teacher_lse;
  float* loss;
  float* accepted;
  uint8_t* correct;
  int64_t teacher_rows;
  int vocab;
};

struct RowPair {
  OnlineSoftmax student, teacher;

  static __device__ __forceinline__ RowPair identity() {
    return {OnlineSoftmax::identity(), OnlineSoftmax::identity()};
  }
  __device__ __forceinline__ void merge(const RowPair& other) {
    student.merge(other.student);
    teacher.merge(other.teacher);
  }
};

struct Sums {
  float cross;     // sum p (z - max z)
  float accepted;  // sum min(pt, q)

  static __device__ __forceinline__ Sums identity() { return {0.0f, 0.0f}; }
  __device__ __forceinline__ void merge(const Sums& other) {
    cross += other.cross;
    accepted += other.accepted;
  }
};

struct Shared {
  RowPair pairs[kMaxWarps];
  Sums sums[kMaxWarps];
};

// What the second pass needs of the first, per row.
struct Scales {
  float student_max, teacher_max;
  float student_scale, teacher_scale;  // 1 / sum exp(x - max)
  float full_scale;                    // exp(t - teacher_max) * full_scale = pt
  float weight;
};

// Turns student logits x into their gradient and adds to the row's sums. y: teacher logits.
template <int kCount>
__device__ __forceinline__ void gradient(float (&x)[kCount], const float (&y)[kCount],
                                         const Scales& row, Sums& sums) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float z = x[i] - row.student_max;
    const float q = exp_nonpositive(z) * row.student_scale;
    const float e = exp_nonpositive(y[i] - row.teacher_max);
    const float p = e * row.teacher_scale;
    sums.cross += p * z;
    sums.accepted += fminf(e * row.full_scale, q);
    x[i] = row.weight * (q - p);
  }
}

template <Access kAccess, class Z>
__device__ __forceinline__ void fill_zero(Z* z, unsigned vocab) {
  if constexpr (kAccess == Access::kScalar) {
    for (unsigned i = threadIdx.x; i < vocab; i += blockDim.x) store_one(z + i, 0.0f);
  } else {
    const Chunk<Z> zero{};
    for (unsigned i = threadIdx.x; i < vocab / kChunk; i += blockDim.x) {
      store_chunk(z + i * kChunk, zero);
    }
  }
}

template <class Z, class T>
__device__ __forceinline__ void load_pair(const Z* z, const T* t, float (&x)[kChunk],
                                          float (&y)[kChunk]) {
  const Chunk<Z> student = load_chunk(z);
  const Chunk<T> teacher = load_chunk(t);
  unpack(student, x);
  unpack(teacher, y);
}

template <class Z, class T>
__device__ __forceinline__ void load_pair(const Z* z, const T* t, float (&x)[1], float (&y)[1]) {
  x[0] = load_one(z);
  y[0] = load_one(t);
}

template <class Z>
__device__ __forceinline__ void store(Z* z, const float (&x)[kChunk]) {
  Chunk<Z> chunk;
  pack(x, chunk);
  store_chunk(z, chunk);
}

template <class Z>
__device__ __forceinline__ void store(Z* z, const float (&x)[1]) {
  store_one(z, x[0]);
}

// Pass 1 leaves max, sum and argmax of both rows in every thread; pass 2 writes the gradient over
// the logits. Each object serves one thread and sees only the elements that this thread owns.
template <Access kAccess, class Z, class T>
struct Rows {
  static constexpr int kWidth = kAccess == Access::kScalar ? 1 : kChunk;
  Z* z;
  const T* t;
  unsigned count;  // steps of kWidth elements in a row

  __device__ __forceinline__ RowPair stats() {
    RowPair pair = RowPair::identity();
    float x[kWidth], y[kWidth];
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
      load_pair(z + i * kWidth, t + i * kWidth, x, y);
      pair.student.add(x, i * kWidth);
      pair.teacher.add(y, i * kWidth);
    }
    return pair;
  }

  __device__ __forceinline__ Sums write_gradient(const Scales& row) {
    Sums sums = Sums::identity();
    float x[kWidth], y[kWidth];
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
      load_pair(z + i * kWidth, t + i * kWidth, x, y);
      gradient(x, y, row, sums);
      store(z + i * kWidth, x);
    }
    return sums;
  }
};

template <class Z, class T>
struct Rows<Access::kHeld, Z, T> {
  Z* z;
  const T* t;
  unsigned count;
  Chunk<Z> student[kHeldChunks<Z>];
  Chunk<T> teacher[kHeldChunks<Z>];

  __device__ __forceinline__ RowPair stats() {
    // All loads are issued before the first is used.
#pragma unroll
    for (int k = 0; k < kHeldChunks<Z>; ++k) {
      const unsigned i = threadIdx.x + k * blockDim.x;
      if (i < count) {
        student[k] = load_chunk(z + i * kChunk);
        teacher[k] = load_chunk(t + i * kChunk);
      }
    }
    RowPair pair = RowPair::identity();
    float x[kChunk];
#pragma unroll
    for (int k = 0; k < kHeldChunks<Z>; ++k) {
      const unsigned i = threadIdx.x + k * blockDim.x;
      if (i < count) {
        unpack(student[k], x);
        pair.student.add(x, i * kChunk);
        unpack(teacher[k], x);
        pair.teacher.add(x, i * kChunk);
      }
    }
    return pair;
  }

  __device__ __forceinline__ Sums write_gradient(const Scales& row) {
    Sums sums = Sums::identity();
    float x[kChunk], y[kChunk];
#pragma unroll
    for (int k = 0; k < kHeldChunks<Z>; ++k) {
      const unsigned i = threadIdx.x + k * blockDim.x;
      if (i < count) {
        unpack(student[k], x);
        unpack(teacher[k], y);
        gradient(x, y, row, sums);
        store(z + i * kChunk, x);
      }
    }
    return sums;
  }
};

// One row per block; a thread owns every blockDim-th chunk of 8 elements (kScalar: element) of the
// student row and of its teacher row. From memory per row: vocab * (sizeof(Z) + sizeof(T)) bytes
// in, vocab * sizeof(Z) out; kStreamed and kScalar read the two rows a second time, from L2.
// Neighbouring rows with one teacher find it in L2 too. A row of weight 0: 0 in, vocab * sizeof(Z)
// out.
template <Access kAccess, class Z, class T>
__global__ void __launch_bounds__(kAccess == Access::kHeld ? kHeldThreads : kStreamedThreads,
                                  kAccess == Access::kHeld ? 1 : 2)
    soft_ce_rows_kernel(const Operands<Z, T> args) {
  constexpr int kWidth = kAccess == Access::kScalar ? 1 : kChunk;
  const int64_t row = blockIdx.x;
  const int vocab = args.vocab;
  Z* z = args.logits + row * vocab;
  const int64_t source = args.row_to_teacher[row];
  const float weight = args.weight[row];
  const bool known = source >= 0 && source < args.teacher_rows;
  if (weight == 0.0f || !known) {
    fill_zero<kAccess>(z, vocab);
    if (threadIdx.x == 0) {
      args.loss[row] = known ? 0.0f : NAN;
      args.accepted[row] = 0.0f;
      args.correct[row] = 0;
    }
    return;
  }

  Shared& shared = shared_storage<Shared>();
  Rows<kAccess, Z, T> rows;
  rows.z = z;
  rows.t = args.teacher + source * vocab;
  rows.count = vocab / kWidth;
  const RowPair pair = block_reduce(rows.stats(), shared.pairs);
  const Scales scales{pair.student.max,
                      pair.teacher.max,
                      1.0f / pair.student.sum,
                      1.0f / pair.teacher.sum,
                      exp_nonpositive(pair.teacher.max - args.teacher_lse[source]),
                      weight};
  const Sums sums = block_reduce(rows.write_gradient(scales), shared.sums);
  if (threadIdx.x == 0) {
    args.loss[row] = logf(pair.student.sum) - sums.cross;
    args.accepted[row] = sums.accepted;
    args.correct[row] = pair.student.argmax == pair.teacher.argmax;
  }
}

template <Access kAccess, class Z, class T>
void launch_rows(const Operands<Z, T>& operands, unsigned blocks, Stream stream) {
  const int64_t width = kAccess == Access::kScalar ? 1 : kChunk;
  const int64_t steps = operands.vocab / width;
  const unsigned threads =
      kAccess == Access::kHeld
          ? threads_for((steps + kHeldChunks<Z> - 1) / kHeldChunks<Z>, kHeldThreads)
          : threads_for(steps, kStreamedThreads);
  launch({blocks, threads, sizeof(Shared)}, stream, soft_ce_rows_kernel<kAccess, Z, T>, operands);
}

template <class Z, class T>
void run(const SoftCeRows& args, Stream stream) {
  const Operands<Z, T> operands{args.logits.as<Z>(),
                                args.teacher.as<const T>(),
                                args.row_to_teacher.as<const int32_t>(),
                                args.weight.as<const float>(),
                                args.teacher_lse.as<const float>(),
                                args.loss.as<float>(),
                                args.accepted.as<float>(),
                                args.correct.as<uint8_t>(),
                                args.teacher.shape[0],
                                static_cast<int>(args.logits.shape[1])};
  const unsigned blocks = blocks_for_rows("soft_ce_rows", args.logits.shape[0]);
  const bool vectors = operands.vocab % kChunk == 0 && vector_aligned(operands.logits) &&
                       vector_aligned(operands.teacher);
  if (!vectors) return launch_rows<Access::kScalar>(operands, blocks, stream);
  if constexpr (std::is_same_v<Z, T>) {
    if (operands.vocab <= kHeldVocab<Z>) {
      return launch_rows<Access::kHeld>(operands, blocks, stream);
    }
  }
  launch_rows<Access::kStreamed>(operands, blocks, stream);
}

}  // namespace

void soft_ce_rows(const SoftCeRows& args, Stream stream) {
  const DeviceScope device(args.logits.device);
  const bool student_bf16 = args.logits.dtype == kBF16;
  const bool teacher_bf16 = args.teacher.dtype == kBF16;
  if (student_bf16 && teacher_bf16) return run<bf16, bf16>(args, stream);
  if (student_bf16) return run<bf16, float>(args, stream);
  if (teacher_bf16) return run<float, bf16>(args, stream);
  run<float, float>(args, stream);
}

}  // namespace sf::cuda
