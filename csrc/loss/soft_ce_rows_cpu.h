// The part of soft_ce_rows that exists once per instruction set. Internal.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace sf::cpu {

// What the students of a teacher need of it.
struct TeacherRow {
  const float* exps;  // [vocab] exp(t - max t)
  double sum;         // of exps
  float max;
  int64_t argmax;
};

struct StudentRow {
  float loss, accepted;
  bool correct;
};

struct SoftCeKernels {
  // exps: [vocab], written.
  TeacherRow (*teacher_f32)(const float* t, int64_t vocab, float* exps);
  TeacherRow (*teacher_b16)(const bf16* t, int64_t vocab, float* exps);
  // z becomes its gradient. exps: [vocab] scratch.
  StudentRow (*student_f32)(float* z, int64_t vocab, const TeacherRow& teacher, float teacher_lse,
                            float weight, float* exps);
  StudentRow (*student_b16)(bf16* z, int64_t vocab, const TeacherRow& teacher, float teacher_lse,
                            float weight, float* exps);
};

extern const SoftCeKernels kSoftCePlain, kSoftCeAvx2, kSoftCeAvx512;

}  // namespace sf::cpu
