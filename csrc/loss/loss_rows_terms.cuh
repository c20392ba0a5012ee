// The losses of loss_rows element by element and row by row, apart from how a row is read.
//
// With e = 2^u, u = (z - max z) log2(e) / tau, and likewise e', v of the teacher, every gradient is
//   weight / tau * (e (student + shape s) - teacher e')
// where student, shape and teacher are numbers of the row and s = s(u, v) is the kind's.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/online_softmax.cuh"
#include "loss/loss_rows.h"

namespace sf::cuda {
namespace {

// Kinds that one kernel serves: what differs within a group is uniform over a row.
enum class Group {
  kHard,   // no teacher; two passes
  kSoft,   // kSoftCe; two passes
  kRatio,  // s is a function of log2(q / p) or log2(q / pt); three passes
  kJsd,    // s = log2(q / m); three passes
};

constexpr Group group_of(LossKind kind) {
  if (kind == LossKind::kHardCe) return Group::kHard;
  if (kind == LossKind::kSoftCe) return Group::kSoft;
  return kind == LossKind::kJsd ? Group::kJsd : Group::kRatio;
}

constexpr bool has_teacher(Group group) { return group != Group::kHard; }
// The gradient needs sums over the row other than those of the softmax.
constexpr bool is_three_pass(Group group) { return group == Group::kRatio || group == Group::kJsd; }

// The loss as the kernels take it.
struct Recipe {
  LossKind kind;
  float temperature, rate;  // rate: log2(e) / temperature
  float beta, hard_weight;
  bool writes_gradient;
};

struct RowPair {
  OnlineSoftmax student, teacher;

  static __device__ __forceinline__ RowPair identity() {
    return {OnlineSoftmax::identity(), OnlineSoftmax::identity()};
  }
};

// What the second and third pass need of the first.
struct Scales {
  float rate;
  float student_max, teacher_max;
  float student_scale, teacher_scale;  // q = e student_scale, p = e' teacher_scale
  float accept;                        // pt = e' accept student_scale
  float student_log, teacher_log;      // kJsd: log2 of the scales
  float student_mix, teacher_mix;      // kJsd: m = e student_mix + e' teacher_mix
  float offset;                        // kRatio: log2 of the ratio is u - v + offset
  float below, above;                  // kRatio: s where the ratio is below 1, above 1
  bool is_log;                         // kRatio: s is log2 of the ratio itself (reverse KL)
};

// full: sum over the teacher's whole vocabulary of e', so that pt = e' / full.
template <Group kGroup>
__device__ __forceinline__ Scales make_scales(const Recipe& recipe, const RowPair& pair,
                                              float one_over_full) {
  Scales row{};
  row.rate = recipe.rate;
  row.student_max = pair.student.max;
  row.student_scale = 1.0f / pair.student.sum;
  if constexpr (has_teacher(kGroup)) {
    row.teacher_max = pair.teacher.max;
    row.teacher_scale = 1.0f / pair.teacher.sum;
    row.accept = one_over_full * pair.student.sum;
  }
  if constexpr (kGroup == Group::kJsd) {
    row.student_log = -log2f(pair.student.sum);
    row.teacher_log = -log2f(pair.teacher.sum);
    row.student_mix = (1.0f - recipe.beta) * row.student_scale;
    row.teacher_mix = recipe.beta * row.teacher_scale;
  }
  if constexpr (kGroup == Group::kRatio) {
    const bool lk = recipe.kind == LossKind::kLkAlpha || recipe.kind == LossKind::kLkLambda;
    row.offset = lk ? -log2f(row.accept) : log2f(pair.teacher.sum * row.student_scale);
    row.is_log = recipe.kind == LossKind::kReverseKl;
    row.below = lk ? 1.0f : -1.0f;
    row.above = lk ? 0.0f : 1.0f;
  }
  return row;
}

struct Terms {
  float u, v, student, teacher;  // student = 2^u, teacher = 2^v
};

template <Group kGroup>
__device__ __forceinline__ Terms make_terms(float x, float y, const Scales& row) {
  Terms t{};
  t.u = (x - row.student_max) * row.rate;
  t.student = exp2_nonpositive(t.u);
  if constexpr (has_teacher(kGroup)) {
    t.v = (y - row.teacher_max) * row.rate;
    t.teacher = exp2_nonpositive(t.v);
  }
  return t;
}

// log2 m. The floor keeps it finite where q and p are both 0; it is below any m that counts.
__device__ __forceinline__ float log2_mixture(const Terms& t, const Scales& row) {
  return log2_positive(fmaxf(t.student * row.student_mix + t.teacher * row.teacher_mix, FLT_MIN));
}

template <Group kGroup>
__device__ __forceinline__ float shape(const Terms& t, const Scales& row) {
  if constexpr (kGroup == Group::kJsd) return t.u + row.student_log - log2_mixture(t, row);
  const float d = t.u - t.v + row.offset;
  const float step = d < 0.0f ? row.below : (d > 0.0f ? row.above : 0.0f);
  return row.is_log ? d : step;
}

struct Sums {
  float entropy;   // sum e u
  float accepted;  // sum min(pt, q) / student_scale
  float cross;     // sum e' u; kJsd: sum e' log2(p / m)
  float shaped;    // sum e s
  float distance;  // sum |q - p|

  static __device__ __forceinline__ Sums identity() { return {}; }
};

template <Group kGroup>
__device__ __forceinline__ void merge_sums(Sums& into, const Sums& from) {
  into.entropy += from.entropy;
  if constexpr (!has_teacher(kGroup)) return;
  into.accepted += from.accepted;
  into.cross += from.cross;
  if constexpr (is_three_pass(kGroup)) into.shaped += from.shaped;
  if constexpr (kGroup == Group::kRatio) into.distance += from.distance;
}

template <Group kGroup>
__device__ __forceinline__ void add_terms(const Terms& t, const Scales& row, Sums& sums) {
  sums.entropy += t.student * t.u;
  if constexpr (!has_teacher(kGroup)) return;
  sums.accepted += fminf(t.teacher * row.accept, t.student);
  if constexpr (kGroup == Group::kJsd) {
    const float log2_m = log2_mixture(t, row);
    sums.cross += t.teacher * (t.v + row.teacher_log - log2_m);
    sums.shaped += t.student * (t.u + row.student_log - log2_m);
  } else {
    sums.cross += t.teacher * t.u;
  }
  if constexpr (kGroup == Group::kRatio) {
    sums.shaped += t.student * shape<kGroup>(t, row);
    sums.distance += fabsf(t.student * row.student_scale - t.teacher * row.teacher_scale);
  }
}

// Of the gradient; see the top.
struct Coefficients {
  float student, shape, teacher;
};

template <Group kGroup>
__device__ __forceinline__ float gradient(const Terms& t, const Scales& row,
                                          const Coefficients& c) {
  if constexpr (kGroup == Group::kHard) return t.student * c.student;
  if constexpr (kGroup == Group::kSoft) return t.student * c.student - t.teacher * c.teacher;
  return t.student * (c.student + c.shape * shape<kGroup>(t, row)) - t.teacher * c.teacher;
}

// For softmaxes with sum 1; a hard cross entropy adds its q.
__device__ __forceinline__ Coefficients scaled(float student, float shape, float teacher,
                                               const Recipe& recipe, const Scales& row,
                                               float weight) {
  const float factor = weight / recipe.temperature;
  return {(student + recipe.hard_weight) * factor * row.student_scale,
          shape * factor * row.student_scale, teacher * factor * row.teacher_scale};
}

struct Outcome {
  float loss, accepted;
  Coefficients coefficients;
};

// From the row's complete sums. log_sum: ln sum e of the student.
template <Group kGroup>
__device__ __forceinline__ Outcome outcome(const Recipe& recipe, const Scales& row,
                                           const Sums& sums, float log_sum, float weight,
                                           float kl_weight) {
  const float accepted = sums.accepted * row.student_scale;
  const float cross = log_sum - kLn2 * sums.cross * row.teacher_scale;
  const float shaped = sums.shaped * row.student_scale;  // sum q s
  const auto result = [&](float loss, float student, float shape_, float teacher) {
    return Outcome{loss, accepted, scaled(student, shape_, teacher, recipe, row, weight)};
  };
  if constexpr (kGroup == Group::kSoft) return result(cross, 1, 0, 1);
  if constexpr (kGroup == Group::kJsd) {
    const float other = 1.0f - recipe.beta;
    const float to_teacher = sums.cross * row.teacher_scale;  // KL(p, m), bits
    return result(kLn2 * (recipe.beta * to_teacher + other * shaped), -other * kLn2 * shaped,
                  other * kLn2, 0);
  }
  switch (recipe.kind) {
    case LossKind::kReverseKl:
      return result(kLn2 * shaped, -kLn2 * shaped, kLn2, 0);
    case LossKind::kL1:
      return result(sums.distance, -shaped, 1, 0);
    case LossKind::kLkAlpha: {
      if (accepted < FLT_MIN) return result(0, 0, 0, 0);  // 1 / accepted would overflow
      return result(-logf(accepted), shaped / accepted, -1.0f / accepted, 0);
    }
    default: {  // kLkLambda
      const float other = 1.0f - kl_weight;
      return result(kl_weight * cross + other * (1.0f - accepted), kl_weight + other * shaped,
                    -other, kl_weight);
    }
  }
}

}  // namespace
}  // namespace sf::cuda
