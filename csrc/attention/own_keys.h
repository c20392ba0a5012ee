// Attention over keys that a row made for itself, merged into attention that is there already, with
// the gradients: what training-time test adds to flash attention (EAGLE-3, arXiv 2503.01840).
//
// Query head h of row n sees own key j in row r = rows_j[n] of keys_j, head h / (heads / kv_heads):
//   s_j = scale * q . k_j[r]
// own_keys_merge, out and lse in place:
//   lse' = log(exp(lse) + sum_j exp(s_j)),   out' = exp(lse - lse') out + sum_j exp(s_j - lse')
//   v_j[r]
// own_keys_grads, from the merged out and lse (FlashAttention-2, arXiv 2307.08691, algorithm 2):
//   w_j = exp(s_j - lse),  u_j = scale w_j (grad_out . v_j[r] - grad_out . out)
//   grad_query += sum_j u_j k_j[r]
//   grad_keys_j[r] = sum_h u_j q,  grad_values_j[r] = sum_h w_j grad_out   over the heads of a
//   group rows of grad_keys_j, grad_values_j that no query uses become 0
//
//   query, out, grad_out, grad_query  [rows, heads, head_dim]        f32 | bf16, all the same
//   lse                               [rows, heads]                  f32, nats; -inf: out is empty
//   keys_j, values_j, their gradients [rows_j, kv_heads, head_dim]   as query
//   rows_j                            [rows]                         i64, strictly ascending, in
//                                     [0, rows_j); or none: rows_j = rows, all in order
//
// j = 1..depth, depth <= 63; read where they lie. All contiguous, on one device, no two overlap.
// Arithmetic in f32; results rounded once. Deterministic. depth 0 changes nothing.
// A row outside the range, or out of order, is an ArgumentError on the CPU. On CUDA, where looking
// would synchronise, a row outside the range makes its query's results NaN and is neither read nor
// written; rows out of order leave gradients undefined there. CUDA wants head_dim a multiple of 8,
// at most 256, and 16-byte aligned memory.
#pragma once

#include <span>

#include "core/tensor_view.h"

namespace sf {

inline constexpr int kMaxOwnKeys = 63;

// rows of rank 0 (a default TensorView): all in order.
struct OwnKeys {
  TensorView keys, values, rows;
};

struct OwnKeysMerge {
  TensorView query, out, lse;
  std::span<const OwnKeys> own;
  float scale;
};

struct OwnKeyGrads {
  TensorView keys, values;
};

struct OwnKeysGrads {
  TensorView grad_out, query, out, lse, grad_query;
  std::span<const OwnKeys> own;
  std::span<const OwnKeyGrads> grads;  // as many as own
  float scale;
};

void own_keys_merge(const OwnKeysMerge& args, Stream stream = {});
void own_keys_grads(const OwnKeysGrads& args, Stream stream = {});

// The same after the checks: what a backend implements. 1 <= depth <= kMaxOwnKeys; rows may be 0.
namespace cpu {
void own_keys_merge(const OwnKeysMerge& args, Stream);
void own_keys_grads(const OwnKeysGrads& args, Stream);
}  // namespace cpu
namespace cuda {
void own_keys_merge(const OwnKeysMerge& args, Stream stream);
void own_keys_grads(const OwnKeysGrads& args, Stream stream);
}  // namespace cuda

}  // namespace sf
