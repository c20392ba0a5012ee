#include <algorithm>
#include <vector>

#include "core/check.h"
#include "core/isa.h"
#include "loss/soft_ce_rows.h"
#include "loss/soft_ce_rows_cpu_impl.h"

namespace sf::cpu {

const SoftCeKernels kSoftCePlain = kKernels;

namespace {

const SoftCeKernels& kernels() {
  switch (isa()) {
    case Isa::kAvx512:
      return kSoftCeAvx512;
    case Isa::kAvx2:
      return kSoftCeAvx2;
    case Isa::kPlain:
      break;
  }
  return kSoftCePlain;
}

// Rows [begin, end) share a teacher. One thread takes them together.
struct Run {
  int64_t begin, end;
};

// A teacher with very many students is cut, so that every thread gets work.
constexpr int64_t kMaxRun = 16;

std::vector<Run> runs_of(const int32_t* row_to_teacher, int64_t rows) {
  std::vector<Run> runs;
  for (int64_t n = 0; n < rows; ++n) {
    const bool joins = !runs.empty() && row_to_teacher[runs.back().begin] == row_to_teacher[n] &&
                       n - runs.back().begin < kMaxRun;
    if (joins) {
      runs.back().end = n + 1;
    } else {
      runs.push_back({n, n + 1});
    }
  }
  return runs;
}

TeacherRow teacher_of(const SoftCeKernels& kernels, const TensorView& teacher, int64_t r,
                      float* exps) {
  const int64_t vocab = teacher.shape[1];
  return teacher.dtype == kBF16
             ? kernels.teacher_b16(teacher.as<const bf16>() + r * vocab, vocab, exps)
             : kernels.teacher_f32(teacher.as<const float>() + r * vocab, vocab, exps);
}

StudentRow student_of(const SoftCeKernels& kernels, const TensorView& logits, int64_t n,
                      const TeacherRow& teacher, float teacher_lse, float weight, float* exps) {
  const int64_t vocab = logits.shape[1];
  return logits.dtype == kBF16 ? kernels.student_b16(logits.as<bf16>() + n * vocab, vocab, teacher,
                                                     teacher_lse, weight, exps)
                               : kernels.student_f32(logits.as<float>() + n * vocab, vocab, teacher,
                                                     teacher_lse, weight, exps);
}

void clear_row(const TensorView& logits, int64_t n) {
  const int64_t row_bytes = logits.shape[1] * static_cast<int64_t>(dtype_size(logits.dtype));
  std::memset(logits.as<char>() + n * row_bytes, 0, static_cast<size_t>(row_bytes));
}

// exps: [2, vocab] scratch, the teacher's and the student's.
void process(const SoftCeRows& args, const SoftCeKernels& kernels, Run run, float* exps) {
  const int64_t vocab = args.logits.shape[1];
  const int64_t r = args.row_to_teacher.as<const int32_t>()[run.begin];
  const float* weight = args.weight.as<const float>();
  TeacherRow teacher{};
  for (int64_t n = run.begin; n < run.end; ++n) {
    StudentRow row{0, 0, false};
    if (weight[n] == 0) {
      clear_row(args.logits, n);
    } else {
      if (teacher.exps == nullptr) teacher = teacher_of(kernels, args.teacher, r, exps);
      row = student_of(kernels, args.logits, n, teacher, args.teacher_lse.as<const float>()[r],
                       weight[n], exps + vocab);
    }
    args.loss.as<float>()[n] = row.loss;
    args.accepted.as<float>()[n] = row.accepted;
    args.correct.as<uint8_t>()[n] = row.correct;
  }
}

}  // namespace

void soft_ce_rows(const SoftCeRows& args, Stream) {
  const int64_t rows = args.logits.shape[0], vocab = args.logits.shape[1];
  const int64_t teacher_rows = args.teacher.shape[0];
  const int32_t* row_to_teacher = args.row_to_teacher.as<const int32_t>();
  for (int64_t n = 0; n < rows; ++n) {
    if (row_to_teacher[n] < 0 || row_to_teacher[n] >= teacher_rows) {
      fail_argument("soft_ce_rows",
                    "row_to_teacher must be in [0, " + std::to_string(teacher_rows) + ")",
                    std::to_string(row_to_teacher[n]) + " at row " + std::to_string(n));
    }
  }
  const std::vector<Run> runs = runs_of(row_to_teacher, rows);
  const SoftCeKernels& table = kernels();
  const int64_t num_runs = static_cast<int64_t>(runs.size());
#pragma omp parallel for schedule(dynamic) if (num_runs > 1 && rows * vocab > kBlock * 16)
  for (int64_t k = 0; k < num_runs; ++k) {
    thread_local std::vector<float> scratch;
    if (static_cast<int64_t>(scratch.size()) < 2 * vocab) scratch.resize(2 * vocab);
    process(args, table, runs[k], scratch.data());
  }
}

}  // namespace sf::cpu
