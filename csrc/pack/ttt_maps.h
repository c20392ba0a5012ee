// Row maps of training-time test (EAGLE-3, arXiv 2503.01840): which rows run, which are scored.
//
//   mask        [T]      u8    1: position u is scored, by row t = u - i at step i, i in [0, L)
//   cu_seqlens  [N + 1]  i32   exclusive prefix sums of the samples' lengths: 0 ... T
//
// With every index inside one sample:
//   depth(t) = 1 + max {j in [0, L) : mask[t + j]}, 0 without such j.   Row t is ACTIVE at the
//   steps i < depth(t): it is scored there or later. The active sets are nested, active_i in
//   active_{i-1}. PAIR (u, i): mask[u] = 1 and u - i is in the sample of u. Row u - i is then
//   active at step i.
//
// Two phases, so that the caller allocates:
//   1. ttt_counts: counts [L + 3] i64 = num_active[0..L), num_pairs, num_teacher_rows, misplaced.
//      misplaced: the lowest packed position with mask 1 at the last position of its sample, or -1.
//      Such a position has no next hidden row to be its teacher: the caller must refuse it.
//   2. ttt_fill, with A = sum num_active:
//      active        [A]                 i32  packed rows, ascending per step, step after step
//      parent        [A - num_active[0]] i32  steps 1..L-1: index of this row within active_{i-1}
//      pair_source   [num_pairs]         i32  index into `active`
//      pair_step     [num_pairs]         i32  i
//      pair_teacher  [num_pairs]         i32  index into `teacher_rows`; non-decreasing
//      teacher_rows  [num_teacher_rows]  i32  the u with mask[u] = 1, ascending
//      Pairs are in order of (u, i).
//
// All contiguous, on one device. L in [1, 64]. T * L < 2^31. T = 0 or N = 0: all counts 0.
// cu_seqlens must start at 0, never fall and end at T: an ArgumentError on the CPU, the caller's
// promise on CUDA. counts of phase 2 are those of phase 1, on the device; the sizes of the outputs
// must be these counts (checked on the CPU).
#pragma once

#include "core/tensor_view.h"

namespace sf {

inline constexpr int64_t kMaxTttLength = 64;

struct TttMaps {
  TensorView active, parent, pair_source, pair_step, pair_teacher, teacher_rows;
};

// L is counts' size - 3.
void ttt_counts(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
                Stream stream = {});
void ttt_fill(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
              const TttMaps& out, Stream stream = {});

// The same after the checks: what a backend implements. T may be 0 in ttt_counts, not in ttt_fill.
namespace cpu {
void ttt_counts(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
                Stream);
void ttt_fill(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
              const TttMaps& out, Stream);
}  // namespace cpu
namespace cuda {
void ttt_counts(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
                Stream stream);
void ttt_fill(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
              const TttMaps& out, Stream stream);
}  // namespace cuda

}  // namespace sf
