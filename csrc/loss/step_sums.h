// Sums of per-row results by TTT step: sums[k, i] = sum over rows n with step[n] = i, weight[n] !=
// 0 of
//   k = 0 loss[n];  1 correct[n];  2 accepted[n];  3 one;  4 weight[n] * loss[n];  5 top_prob[n];
//       6 entropy[n]
//
//   loss, accepted, top_prob, entropy, weight  [rows]  f32
//   correct  [rows]          u8
//   step     [rows]          i32   in [0, num_steps)
//   sums     [7, num_steps]  f64   written, not added to
//
// All contiguous, on one device. Added in f64 in a fixed order: deterministic for any number of
// threads. A step outside the range is an ArgumentError on the CPU; on CUDA such a row counts
// nowhere. No rows: zeros.
#pragma once

#include "core/tensor_view.h"

namespace sf {

struct StepSums {
  TensorView loss, accepted, correct, top_prob, entropy, weight, step;
  TensorView sums;
};

void step_sums(const StepSums& args, Stream stream = {});

// The same after the checks: what a backend implements. rows may be 0, num_steps >= 1.
namespace cpu {
void step_sums(const StepSums& args, Stream);
}
namespace cuda {
void step_sums(const StepSums& args, Stream stream);
}

}  // namespace sf
