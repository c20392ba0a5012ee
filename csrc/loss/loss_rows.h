// The draft losses of rows of logits, with statistics, and the gradient in place of the logits.
//
//   r  = row_to_teacher[n]             tau = temperature
//   z  = logits[n] / tau               q   = softmax(z)                   over vocab
//   t  = teacher[r] / tau              p   = softmax(t[0, vocab))         over vocab
//   Zf = teacher_lse[r], or the logsumexp of all of t;   pt = exp(t[0, vocab) - Zf)
//   a  = sum_v min(pt, q)              b   = sum_v q [q < pt]
//   m  = beta p + (1 - beta) q         w   = kl_weight[n]
//
//   kind        loss K[n], nats                        g = d K / d logits[n], times tau
//   kHardCe     -log q[y], y = label[r]                q - onehot(y)
//   kSoftCe     -sum p log q                           q - p
//   kReverseKl  sum q log(q / p)                       q (s - sum q s),  s = log(q / p)
//   kJsd        beta KL(p, m) + (1 - beta) KL(q, m)    (1 - beta) q (s - sum q s),  s = log(q / m)
//   kL1         sum |q - p|  (twice the TV distance)   q (s - sum q s),  s = sign(q - p)
//   kLkAlpha    -log a; 0 where a = 0                  -q ([q < pt] - b) / a; 0 where a = 0
//   kLkLambda   w (-sum p log q) + (1 - w) (1 - a)     w (q - p) - (1 - w) q ([q < pt] - b)
//
//   loss[n]   = K[n] + hard_weight * (-log q[y])       hard_weight 0: label is not read
//   logits[n] = weight[n] * (g + hard_weight (q - onehot(y))) / tau
//   accepted[n] = a           chance that a token drawn from q is accepted (1 - TV distance to the
//                             target; Leviathan et al., arXiv 2211.17192). kHardCe: q[y]
//   correct[n]  = argmax z == argmax of the teacher, lowest index on ties. kHardCe: == y
//   top_prob[n] = max q,  entropy[n] = -sum q log q, nats
//
// Sources: JSD of GKD, arXiv 2306.13649; LK-alpha and LK-lambda, arXiv 2602.23881.
//
//   logits          [rows, vocab]                 f32 | bf16  in: finite; out: the gradient
//   teacher         [teacher_rows, teacher_vocab] f32 | bf16  teacher_vocab >= vocab: the draft's
//                                                 vocabulary comes first. kHardCe: absent
//   row_to_teacher  [rows]          i32   in [0, teacher_rows)
//   weight          [rows]          f32   may be 0 or negative
//   teacher_lse     [teacher_rows]  f32   optional: Zf, at this temperature, nats
//   teacher_argmax  [teacher_rows]  i32   optional: in [0, vocab), or anything else where the
//                                         teacher's first choice is a token the draft cannot say
//   label           [teacher_rows]  i32   kHardCe, or hard_weight != 0: in [0, vocab)
//   kl_weight       [rows]          f32   kLkLambda
//   loss, accepted, top_prob, entropy  [rows]  f32   not weighted
//   correct         [rows]          u8
//
// LK-alpha takes an a below the least normal float (1.2e-38) for 0: 1 / a may not overflow.
//
// Absent: a view of rank 0. With teacher_lse, columns of teacher at and past vocab are not read,
// and the argmax is teacher_argmax, or that of the first vocab columns. Without teacher_lse both
// come from all columns, and teacher_argmax must be absent.
//
// writes_gradient false: logits are left as they are (metrics, the first phase of LK-lambda).
// weight[n] = 0: neither the row nor (for this row) its teacher, label and kl_weight are read, so
// that these may hold NaN and any index; the row becomes zeros where gradients are written, and all
// its results are 0. Its row_to_teacher must still be in range.
// An index or label outside its range is an ArgumentError on the CPU; on CUDA, where looking would
// synchronise, the row is treated as one of weight 0 and its loss is NaN.
//
// All contiguous, on one device. Logits of +-1e4 are fine. Accumulation in f32 or better; a row is
// read from memory once (it stays in registers, L2 or shared memory) and written once. Runs of rows
// with the same teacher share its work; any order is right. No rows: nothing happens.
// Deterministic: a row's result depends on its inputs alone.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace sf {

enum class LossKind : uint8_t { kHardCe, kSoftCe, kReverseKl, kJsd, kL1, kLkAlpha, kLkLambda };

struct LossSpec {
  LossKind kind = LossKind::kSoftCe;
  float temperature = 1;  // tau > 0
  float beta = 0.5f;      // JSD only, in (0, 1)
  float hard_weight = 0;  // >= 0; 0 for kHardCe
  bool writes_gradient = true;
};

struct LossRows {
  TensorView logits, teacher, row_to_teacher, weight;
  TensorView teacher_lse, teacher_argmax, label, kl_weight;  // optional
  TensorView loss, accepted, correct, top_prob, entropy;
};

void loss_rows(const LossRows& args, const LossSpec& spec, Stream stream = {});

// The same after the checks: what a backend implements. rows >= 1.
namespace cpu {
void loss_rows(const LossRows& args, const LossSpec& spec, Stream);
}
namespace cuda {
void loss_rows(const LossRows& args, const LossSpec& spec, Stream stream);
}

}  // namespace sf
