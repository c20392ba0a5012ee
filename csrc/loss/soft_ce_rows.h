// Soft cross entropy of student rows against teacher rows, with its gradient in place of the
// logits.
//
//   t = teacher[row_to_teacher[n]],  p = softmax(t),  pt = exp(t - teacher_lse[row_to_teacher[n]]),
//   z = logits[n],  q = softmax(z)
//   loss[n]     = lse(z) - sum_v p[v] z[v]     nats: forward KL(p || q) plus the teacher's entropy
//   accepted[n] = sum_v min(pt[v], q[v])       chance that a draft token is accepted (1 - TV
//   distance;
//                                              Leviathan et al., arXiv 2211.17192)
//   correct[n]  = (argmax z == argmax t)       lowest index on ties
//   logits[n]   = weight[n] * (q - p)          d (weight[n] loss[n]) / d z
//
//   logits          [rows, vocab]          f32 | bf16   in: finite; out: the gradient
//   teacher         [teacher_rows, vocab]  f32 | bf16   finite; need not be the dtype of logits
//   row_to_teacher  [rows]                 i32          in [0, teacher_rows)
//   weight          [rows]                 f32          may be 0 or negative
//   teacher_lse     [teacher_rows]         f32          over the FULL vocabulary: >= lse(t), nats
//   loss, accepted  [rows]                 f32          not weighted
//   correct         [rows]                 u8
//
// weight[n] = 0: neither the row, nor (for this row) its teacher is read, so both may hold NaN; the
// row becomes zeros, and loss, accepted, correct are 0.
// A row_to_teacher outside the range is an ArgumentError on the CPU; on CUDA, where looking would
// synchronise, the row is treated as one of weight 0 and its loss is NaN.
//
// The vocabulary here is the draft's. All contiguous, on one device. Logits of +-1e4 are fine.
// Accumulation in f32 or better; each row is read from memory once (it stays in L2 / shared memory)
// and written once. Runs of rows with the same teacher share its exponentials; any order is right.
// No rows: nothing happens. Deterministic: a row's result depends on its inputs alone.
#pragma once

#include "core/tensor_view.h"

namespace sf {

struct SoftCeRows {
  TensorView logits, teacher, row_to_teacher, weight, teacher_lse;
  TensorView loss, accepted, correct;
};

void soft_ce_rows(const SoftCeRows& args, Stream stream = {});

// The same after the checks: what a backend implements. rows >= 1.
namespace cpu {
void soft_ce_rows(const SoftCeRows& args, Stream);
}
namespace cuda {
void soft_ce_rows(const SoftCeRows& args, Stream stream);
}

}  // namespace sf
