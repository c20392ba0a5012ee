// lse[n] = log sum_v exp(z[n, v]);  argmax[n] = the lowest v with z[n, v] = max z[n, :]
//
//   logits z  [rows, vocab]  f32 | bf16   finite; vocab in [1, 2^31)
//   lse       [rows]         f32          nats
//   argmax    [rows]         i32
//
// All contiguous, on one device. Accumulation in f32 or better. Reads each logit from memory once.
// No rows: nothing happens. Deterministic: a row's result depends on that row alone.
#pragma once

#include "core/tensor_view.h"

namespace sf {

void row_stats(const TensorView& logits, const TensorView& lse, const TensorView& argmax,
               Stream stream = {});

// The same after the checks: what a backend implements. rows >= 1.
namespace cpu {
void row_stats(const TensorView& logits, const TensorView& lse, const TensorView& argmax, Stream);
}
namespace cuda {
void row_stats(const TensorView& logits, const TensorView& lse, const TensorView& argmax,
               Stream stream);
}

}  // namespace sf
