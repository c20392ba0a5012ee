// Included by soft_ce_rows_cpu.cpp and its _avx2 and _avx512 sisters, each compiled for its own
// ISA.
//
// Bytes from memory per student row: vocab read, vocab written (plus the teacher's vocab once per
// run of students). The three passes over a row find it, and both rows of exponentials, in L2.
#pragma once

#include <cmath>

#include "loss/row_passes.h"
#include "loss/soft_ce_rows_cpu.h"

namespace sf::cpu {
namespace {

template <class T>
TeacherRow teacher_row(const T* t, int64_t vocab, float* exps) {
  const RowMax top = row_max(t, vocab);
  const double sum = sum_exp(
      t, vocab, top.value, [=](int64_t v, Vec e) { store(exps + v, e); },
      [=](int64_t v, int64_t n, Vec e) { store_tail(exps + v, n, e); });
  return {exps, sum, top.value, top.index};
}

struct StudentSums {
  double exp_sum;  // sum_v exp(z[v] - max z)
  double dot;      // sum_v exps_t[v] (z[v] - max z): terms of one sign, so that nothing cancels
};

// Second pass: exponentials into `exps`, and the sums.
template <class T>
SF_ALWAYS_INLINE StudentSums student_sums(const T* z, int64_t vocab, float max,
                                          const float* teacher_exps, float* exps) {
  StudentSums total{0, 0};
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    Vec exp_sum = set1(0), dot = set1(0);
    for_each_vec(
        begin, end,
        [&](int64_t v) {
          const Vec x = load(z + v) - set1(max);
          const Vec e = exp_nonpositive(x);
          store(exps + v, e);
          exp_sum = exp_sum + e;
          dot = fma(load(teacher_exps + v), x, dot);
        },
        [&](int64_t v, int64_t n) {
          // Lanes past the row: e must be 0, but 0 * -inf is NaN, so these lanes hold a finite
          // value.
          const Vec x = load_tail(z + v, n, max - 1e3f) - set1(max);
          const Vec e = exp_nonpositive(load_tail(z + v, n, -INFINITY) - set1(max));
          store_tail(exps + v, n, e);
          exp_sum = exp_sum + e;
          dot = fma(load_tail(teacher_exps + v, n, 0), x, dot);
        });
    total.exp_sum += sum_lanes(exp_sum);
    total.dot += sum_lanes(dot);
  }
  return total;
}

// Third pass: the gradient weight (q - p) over z. Returns sum_v min(pt, q).
template <class T>
SF_ALWAYS_INLINE double write_gradient(T* z, int64_t vocab, const float* exps,
                                       const TeacherRow& teacher, double exp_sum, float teacher_lse,
                                       float weight) {
  const Vec to_q = set1(static_cast<float>(1 / exp_sum));
  const Vec to_p = set1(static_cast<float>(1 / teacher.sum));
  const Vec to_pt = set1(static_cast<float>(::exp(static_cast<double>(teacher.max) - teacher_lse)));
  const Vec w = set1(weight);
  double accepted = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    Vec sum = set1(0);
    const auto gradient = [&](Vec e, Vec e_t) {
      const Vec q = e * to_q;
      sum = sum + min(e_t * to_pt, q);
      return w * (q - e_t * to_p);
    };
    for_each_vec(
        begin, end,
        [&](int64_t v) { store(z + v, gradient(load(exps + v), load(teacher.exps + v))); },
        [&](int64_t v, int64_t n) {
          store_tail(z + v, n,
                     gradient(load_tail(exps + v, n, 0), load_tail(teacher.exps + v, n, 0)));
        });
    accepted += sum_lanes(sum);
  }
  return accepted;
}

template <class T>
StudentRow student_row(T* z, int64_t vocab, const TeacherRow& teacher, float teacher_lse,
                       float weight, float* exps) {
  const RowMax top = row_max(z, vocab);
  const StudentSums sums = student_sums(z, vocab, top.value, teacher.exps, exps);
  const double accepted =
      write_gradient(z, vocab, exps, teacher, sums.exp_sum, teacher_lse, weight);
  const double loss = ::log(sums.exp_sum) - sums.dot / teacher.sum;
  return {static_cast<float>(loss), static_cast<float>(accepted), top.index == teacher.argmax};
}

constexpr SoftCeKernels kKernels{teacher_row<float>, teacher_row<bf16>, student_row<float>,
                                 student_row<bf16>};

}  // namespace
}  // namespace sf::cpu
