// The part of loss_rows that exists once per instruction set. Internal.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "loss/loss_rows.h"

namespace sf::cpu {

inline constexpr int kNumLossKinds = 7;

// A block of a row's softmax at temperature tau. Within it d[v] = row[v] - max and exps[v] =
// exp(d[v] / tau).
struct SoftmaxBlock {
  float max;                        // of the row up to the end of this block
  float to_prob;                    // exps[v] * to_prob: the probability
  double shift;                     // (max - max of the row) / tau, <= 0
  double exp_sum, d_dot, loss_dot;  // sums over the block, relative to its max
};

// What the students of a teacher need of it.
struct TeacherRow {
  const float* exps;           // [vocab]
  const float* d;              // [vocab]; only if asked for
  const SoftmaxBlock* blocks;  // of the first vocab columns
  double log_sum;              // log sum exp(d[v] / tau + shift)
  double kept;                 // pt = kept * p: the share of its mass the draft can say
  int64_t argmax;
};

struct TeacherArgs {
  const void* row;
  int64_t vocab, columns;  // columns of `row`, >= vocab
  double tau;
  const float* lse;       // nullptr: from all columns
  const int32_t* argmax;  // nullptr: from the columns that are read
  bool keeps_d;
  float *exps, *d;  // [vocab] to write; d only with keeps_d
  SoftmaxBlock* blocks;
};

struct StudentArgs {
  void* row;
  int64_t vocab;
  const TeacherRow* teacher;  // nullptr: the hard cross entropy
  int64_t label;              // < 0: none
  float weight, kl_weight;
  double tau;
  float beta, hard_weight;
  bool writes_gradient;
  float *exps, *scores;  // [vocab] scratch, see needs_logits; scores only for the JSD
  SoftmaxBlock* blocks;
};

struct StudentRow {
  float loss, accepted;
  bool correct;
  float top_prob, entropy;
};

struct StudentKernels {
  StudentRow (*of[kNumLossKinds])(const StudentArgs& args);  // by LossKind
};

struct LossKernels {
  TeacherRow (*teacher_f32)(const TeacherArgs& args);
  TeacherRow (*teacher_b16)(const TeacherArgs& args);
  StudentKernels student_f32, student_b16;
};

extern const LossKernels kLossPlain, kLossAvx2, kLossAvx512;

// Whether the loss needs the logits themselves, beside their exponentials, once the row's softmax
// is known. If not, a float row that will hold the gradient may serve as `exps`.
constexpr bool needs_logits(LossKind kind) { return kind == LossKind::kReverseKl; }

}  // namespace sf::cpu
