#include <cmath>
#include <string>
#include <type_traits>

#include "attention/own_keys.h"
#include "attention/own_keys_team.cuh"
#include "core/dtype.h"
#include "core/launch.cuh"
#include "core/online_softmax.cuh"

namespace sf::cuda {
namespace {

constexpr unsigned kThreads = 128;
constexpr size_t kMaxSharedBytes = 48 << 10;

template <class T>
struct MergeOperands {
  const T* query;
  T* out;
  float* lse;
  OwnTable<T> own;
  Sizes sizes;
};

template <class T>
struct GradsOperands {
  const T* grad_out;
  const T* query;
  const T* out;
  const float* lse;
  T* grad_query;
  OwnTable<T> own;
  T* grad_keys[kMaxOwnKeys];
  T* grad_values[kMaxOwnKeys];
  Sizes sizes;
};
static_assert(sizeof(GradsOperands<float>) <= 4096);

// One pass over the own keys per query head, softmax online. Keys and values of the team come from
// memory for its first head and from the first-level cache for the others.
// Bytes: query, out read and out written once; own keys and values read once.
template <int kLanes, class T>
__global__ void __launch_bounds__(kThreads) own_keys_merge_kernel(const MergeOperands<T> args) {
  const Sizes& sizes = args.sizes;
  const Team<kLanes> team(sizes);
  const int group = sizes.heads / sizes.kv_heads;
  for (int g = 0; g < group; ++g) {
    const int64_t at = team.query(sizes, g);
    const int64_t lse_at = team.row * sizes.heads + team.head(sizes, g);
    float q[kChunk], out[kChunk];
    read(args.query, at, team.active, q);
    read(args.out, at, team.active, out);
    // One lane reads what it will overwrite; the sum hands it to the others.
    const bool has_lse = team.computes && team.place == 0;
    float top = team_reduce<kLanes>(Sum{has_lse ? args.lse[lse_at] : 0.0f}).x;
    float sum = 1.0f;
    for (int j = 0; j < sizes.depth; ++j) {
      const int64_t source = team.computes ? own_row(args.own, j, team.row) : -1;
      const bool reads = team.active && source >= 0;
      float k[kChunk], v[kChunk];
      read(args.own.keys[j], team.own(sizes, source), reads, k);
      read(args.own.values[j], team.own(sizes, source), reads, v);
      float score = sizes.scale * team_reduce<kLanes>(Sum{dot(q, k)}).x;
      if (source < 0) score = NAN;
      const float new_top = fmaxf(top, score);
      const float keep = exp_nonpositive(top - new_top);
      const float weight = exp_nonpositive(score - new_top);
      sum = sum * keep + weight;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) out[i] = fmaf(weight, v[i], out[i] * keep);
      top = new_top;
    }
    const float to_weight = 1.0f / sum;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] *= to_weight;
    write(args.out, at, team.active, out);
    if (has_lse) args.lse[lse_at] = top + logf(sum);
  }
}

// What the second half of the backward needs of the first, per (head of the group, step).
struct Weights {
  float prob, score;  // w_j, u_j
};

// The first half: the query's gradient, and the weights of all pairs into `weights`.
template <int kLanes, class T>
__device__ __forceinline__ void query_grads(const GradsOperands<T>& args, const Team<kLanes>& team,
                                            Weights* weights) {
  const Sizes& sizes = args.sizes;
  const int group = sizes.heads / sizes.kv_heads;
  for (int g = 0; g < group; ++g) {
    const int64_t at = team.query(sizes, g);
    float grad[kChunk], q[kChunk], x[kChunk];
    read(args.grad_out, at, team.active, grad);
    read(args.query, at, team.active, q);
    read(args.out, at, team.active, x);
    const float delta = team_reduce<kLanes>(Sum{dot(grad, x)}).x;
    const float lse = team.computes ? args.lse[team.row * sizes.heads + team.head(sizes, g)] : 0.0f;
    read(args.grad_query, at, team.active, x);
    for (int j = 0; j < sizes.depth; ++j) {
      const int64_t source = team.computes ? own_row(args.own, j, team.row) : -1;
      const bool reads = team.active && source >= 0;
      float k[kChunk], v[kChunk];
      read(args.own.keys[j], team.own(sizes, source), reads, k);
      read(args.own.values[j], team.own(sizes, source), reads, v);
      const SumPair dots = team_reduce<kLanes>(SumPair{dot(q, k), dot(grad, v)});
      const float prob = source < 0 ? NAN : exp_nonpositive(sizes.scale * dots.x - lse);
      const float score = sizes.scale * prob * (dots.y - delta);
      add_scaled(x, score, k);
      if (team.place == 0) weights[g * sizes.depth + j] = {prob, score};
    }
    write(args.grad_query, at, team.active, x);
  }
}

// The second half: gradients of the team's own keys and values, one step after the other.
template <int kLanes, class T>
__device__ __forceinline__ void own_grads(const GradsOperands<T>& args, const Team<kLanes>& team,
                                          const Weights* weights) {
  const Sizes& sizes = args.sizes;
  const int group = sizes.heads / sizes.kv_heads;
  for (int j = 0; j < sizes.depth; ++j) {
    float grad_k[kChunk] = {}, grad_v[kChunk] = {};
    for (int g = 0; g < group; ++g) {
      const int64_t at = team.query(sizes, g);
      float grad[kChunk], q[kChunk];
      unpack(load_chunk(args.grad_out + at), grad);
      unpack(load_chunk(args.query + at), q);
      const Weights pair = weights[g * sizes.depth + j];
      add_scaled(grad_k, pair.score, q);
      add_scaled(grad_v, pair.prob, grad);
    }
    const int64_t target = own_row(args.own, j, team.row);
    write(args.grad_keys[j], team.own(sizes, target), target >= 0, grad_k);
    write(args.grad_values[j], team.own(sizes, target), target >= 0, grad_v);
  }
}

// Zeros for the rows of step j between the previous query's and this one's; a team past the last
// query takes those after it. So every row is written exactly once.
template <int kLanes, class T>
__device__ __forceinline__ void clear_gaps(const GradsOperands<T>& args, const Team<kLanes>& team) {
  const Sizes& sizes = args.sizes;
  if (team.row > sizes.num_rows || team.place >= sizes.head_dim) return;
  const float zero[kChunk] = {};
  for (int j = 0; j < sizes.depth; ++j) {
    // An empty tensor has no address either, so that nullptr is not a reason to have no gaps.
    const int64_t* rows = args.own.rows[j];
    const int64_t last = args.own.num_rows[j];
    int64_t begin = team.row > 0 ? place_of(rows, team.row - 1) + 1 : 0;
    int64_t end = team.computes ? place_of(rows, team.row) : last;
    begin = begin < 0 ? 0 : begin;
    end = end > last ? last : end;
    for (int64_t r = begin; r < end; ++r) {
      write(args.grad_keys[j], team.own(sizes, r), true, zero);
      write(args.grad_values[j], team.own(sizes, r), true, zero);
    }
  }
}

// Bytes: grad_out, query, out, grad_query read and grad_query written once; own keys and values
// read once, their gradients written once. Keys come again from the first-level cache per head of
// the group, queries per step.
template <int kLanes, class T>
__global__ void __launch_bounds__(kThreads) own_keys_grads_kernel(const GradsOperands<T> args) {
  const Team<kLanes> team(args.sizes);
  const int pairs = args.sizes.heads / args.sizes.kv_heads * args.sizes.depth;
  Weights* weights = &shared_storage<Weights>() + threadIdx.x / kLanes * pairs;
  query_grads(args, team, weights);
  __syncwarp(kFullWarp);
  if (team.active) own_grads(args, team, weights);
  clear_gaps(args, team);
}

Sizes sizes_of(const TensorView& query, std::span<const OwnKeys> own, float scale) {
  return {query.shape[0],
          static_cast<int>(query.shape[1]),
          static_cast<int>(own[0].keys.shape[1]),
          static_cast<int>(query.shape[2]),
          static_cast<int>(own.size()),
          scale};
}

void check_sizes(const char* op, const Sizes& sizes, std::initializer_list<const void*> addresses) {
  if (sizes.head_dim % kChunk != 0 || sizes.head_dim > kWarpSize * kChunk) {
    throw ArgumentError(std::string(op) +
                        ": head_dim must be a multiple of 8, at most 256, on CUDA, got " +
                        std::to_string(sizes.head_dim));
  }
  for (const void* address : addresses) {
    if (!vector_aligned(address)) {
      throw ArgumentError(std::string(op) + ": tensors must be 16-byte aligned on CUDA");
    }
  }
}

template <class T>
OwnTable<T> table_of(const char* op, const Sizes& sizes, std::span<const OwnKeys> own) {
  OwnTable<T> table{};
  for (size_t j = 0; j < own.size(); ++j) {
    table.keys[j] = own[j].keys.as<const T>();
    table.values[j] = own[j].values.as<const T>();
    table.rows[j] = own[j].rows.rank == 0 ? nullptr : own[j].rows.as<const int64_t>();
    table.num_rows[j] = own[j].keys.shape[0];
    check_sizes(op, sizes, {table.keys[j], table.values[j]});
  }
  return table;
}

unsigned blocks_for(const char* op, int64_t teams, int lanes, unsigned threads) {
  const int64_t teams_per_block = threads / static_cast<unsigned>(lanes);
  return blocks_for_rows(op, (teams + teams_per_block - 1) / teams_per_block);
}

// Calls run(lanes) with the width of a team as a type. Fewer than 8 lanes would save threads only
// for heads that nobody has.
template <class Run>
void with_lanes(int head_dim, Run run) {
  if (head_dim <= 8 * kChunk) return run(std::integral_constant<int, 8>());
  if (head_dim <= 16 * kChunk) return run(std::integral_constant<int, 16>());
  run(std::integral_constant<int, 32>());
}

template <class T>
void merge(const OwnKeysMerge& args, Stream stream) {
  constexpr const char* kOp = "own_keys_merge";
  const Sizes sizes = sizes_of(args.query, args.own, args.scale);
  if (sizes.num_rows == 0) return;
  check_sizes(kOp, sizes, {args.query.data, args.out.data});
  const MergeOperands<T> operands{args.query.as<const T>(), args.out.as<T>(), args.lse.as<float>(),
                                  table_of<T>(kOp, sizes, args.own), sizes};
  with_lanes(sizes.head_dim, [&](auto lanes) {
    const unsigned blocks = blocks_for(kOp, sizes.num_rows * sizes.kv_heads, lanes, kThreads);
    launch({blocks, kThreads, 0}, stream, own_keys_merge_kernel<lanes.value, T>, operands);
  });
}

// The largest block whose weights fit shared memory.
unsigned threads_of_grads(const Sizes& sizes, int lanes) {
  const int64_t team_bytes =
      int64_t{sizes.heads / sizes.kv_heads} * sizes.depth * static_cast<int64_t>(sizeof(Weights));
  for (unsigned threads = kThreads; threads >= kWarpSize; threads /= 2) {
    if (threads / lanes * team_bytes <= static_cast<int64_t>(kMaxSharedBytes)) return threads;
  }
  throw ArgumentError("own_keys_grads: heads per kv head times steps must be at most " +
                      std::to_string(kMaxSharedBytes / sizeof(Weights) * lanes / kWarpSize) +
                      " on CUDA, got " +
                      std::to_string(team_bytes / static_cast<int64_t>(sizeof(Weights))));
}

template <class T>
void grads(const OwnKeysGrads& args, Stream stream) {
  constexpr const char* kOp = "own_keys_grads";
  const Sizes sizes = sizes_of(args.query, args.own, args.scale);
  check_sizes(kOp, sizes,
              {args.grad_out.data, args.query.data, args.out.data, args.grad_query.data});
  GradsOperands<T> operands{args.grad_out.as<const T>(),
                            args.query.as<const T>(),
                            args.out.as<const T>(),
                            args.lse.as<const float>(),
                            args.grad_query.as<T>(),
                            table_of<T>(kOp, sizes, args.own),
                            {},
                            {},
                            sizes};
  for (size_t j = 0; j < args.grads.size(); ++j) {
    operands.grad_keys[j] = args.grads[j].keys.as<T>();
    operands.grad_values[j] = args.grads[j].values.as<T>();
    check_sizes(kOp, sizes, {operands.grad_keys[j], operands.grad_values[j]});
  }
  with_lanes(sizes.head_dim, [&](auto lanes) {
    const unsigned threads = threads_of_grads(sizes, lanes);
    const size_t shared = threads / lanes * static_cast<size_t>(sizes.heads / sizes.kv_heads) *
                          static_cast<size_t>(sizes.depth) * sizeof(Weights);
    // One team more per head of keys: for the rows after the last query's.
    const unsigned blocks = blocks_for(kOp, (sizes.num_rows + 1) * sizes.kv_heads, lanes, threads);
    launch({blocks, threads, shared}, stream, own_keys_grads_kernel<lanes.value, T>, operands);
  });
}

}  // namespace

void own_keys_merge(const OwnKeysMerge& args, Stream stream) {
  const DeviceScope device(args.query.device);
  args.query.dtype == kBF16 ? merge<bf16>(args, stream) : merge<float>(args, stream);
}

void own_keys_grads(const OwnKeysGrads& args, Stream stream) {
  const DeviceScope device(args.query.device);
  args.query.dtype == kBF16 ? grads<bf16>(args, stream) : grads<float>(args, stream);
}

}  // namespace sf::cuda
