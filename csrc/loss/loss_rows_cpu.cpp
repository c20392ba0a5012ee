#include <string>
#include <vector>

#include "core/check.h"
#include "core/isa.h"
#include "loss/loss_rows.h"
#include "loss/loss_rows_cpu_impl.h"

namespace sf::cpu {

const LossKernels kLossPlain = kKernels;

namespace {

const LossKernels& kernels() {
  switch (isa()) {
    case Isa::kAvx512:
      return kLossAvx512;
    case Isa::kAvx2:
      return kLossAvx2;
    case Isa::kPlain:
      break;
  }
  return kLossPlain;
}

bool present(const TensorView& view) { return view.rank > 0; }

template <class T>
T* data_of(const TensorView& view) {
  return present(view) ? view.as<T>() : nullptr;
}

char* row_of(const TensorView& matrix, int64_t n) {
  return matrix.as<char>() + n * matrix.shape[1] * static_cast<int64_t>(dtype_size(matrix.dtype));
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

void check_indices(const LossRows& args) {
  const auto check = [](const char* name, int64_t value, int64_t size, int64_t n) {
    if (value >= 0 && value < size) return;
    fail_argument("loss_rows", std::string(name) + " must be in [0, " + std::to_string(size) + ")",
                  std::to_string(value) + " at row " + std::to_string(n));
  };
  const int32_t* row_to_teacher = args.row_to_teacher.as<const int32_t>();
  const int32_t* label = data_of<const int32_t>(args.label);
  const float* weight = args.weight.as<const float>();
  const int64_t teachers = present(args.teacher) ? args.teacher.shape[0] : args.label.shape[0];
  for (int64_t n = 0; n < args.logits.shape[0]; ++n) {
    check("row_to_teacher", row_to_teacher[n], teachers, n);
    if (label == nullptr || weight[n] == 0) continue;
    check("label", label[row_to_teacher[n]], args.logits.shape[1], n);
  }
}

// A thread's own memory, which it keeps.
struct Scratch {
  std::vector<float> teacher_exps, teacher_d, exps, scores;
  std::vector<SoftmaxBlock> teacher_blocks, blocks;

  void reserve(int64_t vocab, LossKind kind) {
    const auto grow = [](auto& memory, int64_t size) {
      if (static_cast<int64_t>(memory.size()) < size) memory.resize(static_cast<size_t>(size));
    };
    for (std::vector<float>* row : {&teacher_exps, &exps}) grow(*row, vocab);
    if (needs_logits(kind)) grow(teacher_d, vocab);
    if (kind == LossKind::kJsd) grow(scores, vocab);
    for (std::vector<SoftmaxBlock>* row : {&teacher_blocks, &blocks}) grow(*row, num_blocks(vocab));
  }
};

struct Op {
  const LossRows& args;
  const LossSpec& spec;
  const LossKernels& kernels;

  TeacherRow teacher(int64_t r, Scratch& scratch) const {
    const float* lse = data_of<const float>(args.teacher_lse);
    const int32_t* argmax = data_of<const int32_t>(args.teacher_argmax);
    const TeacherArgs row{row_of(args.teacher, r),
                          args.logits.shape[1],
                          args.teacher.shape[1],
                          spec.temperature,
                          lse == nullptr ? nullptr : lse + r,
                          argmax == nullptr ? nullptr : argmax + r,
                          needs_logits(spec.kind),
                          scratch.teacher_exps.data(),
                          scratch.teacher_d.data(),
                          scratch.teacher_blocks.data()};
    return args.teacher.dtype == kBF16 ? kernels.teacher_b16(row) : kernels.teacher_f32(row);
  }

  StudentRow student(int64_t n, int64_t r, const TeacherRow* teacher, Scratch& scratch) const {
    const int32_t* label = data_of<const int32_t>(args.label);
    const float* kl_weight = data_of<const float>(args.kl_weight);
    char* row = row_of(args.logits, n);
    const bool bf16_row = args.logits.dtype == kBF16;
    // The gradient will replace the logits: a float row can hold the exponentials until then.
    const bool in_place = spec.writes_gradient && !bf16_row && !needs_logits(spec.kind);
    float* exps = in_place ? reinterpret_cast<float*>(row) : scratch.exps.data();
    const StudentArgs student{row,
                              args.logits.shape[1],
                              teacher,
                              label == nullptr ? -1 : label[r],
                              args.weight.as<const float>()[n],
                              kl_weight == nullptr ? 0 : kl_weight[n],
                              spec.temperature,
                              spec.beta,
                              spec.hard_weight,
                              spec.writes_gradient,
                              exps,
                              scratch.scores.data(),
                              scratch.blocks.data()};
    const StudentKernels& table = bf16_row ? kernels.student_b16 : kernels.student_f32;
    return table.of[static_cast<int>(spec.kind)](student);
  }

  void write(int64_t n, const StudentRow& row) const {
    args.loss.as<float>()[n] = row.loss;
    args.accepted.as<float>()[n] = row.accepted;
    args.correct.as<uint8_t>()[n] = row.correct;
    args.top_prob.as<float>()[n] = row.top_prob;
    args.entropy.as<float>()[n] = row.entropy;
  }

  void process(Run run, Scratch& scratch) const {
    const int64_t r = args.row_to_teacher.as<const int32_t>()[run.begin];
    const float* weight = args.weight.as<const float>();
    TeacherRow teacher{};
    for (int64_t n = run.begin; n < run.end; ++n) {
      StudentRow row{0, 0, false, 0, 0};
      if (weight[n] != 0) {
        if (present(args.teacher) && teacher.exps == nullptr) teacher = this->teacher(r, scratch);
        row = student(n, r, present(args.teacher) ? &teacher : nullptr, scratch);
      } else if (spec.writes_gradient) {
        const int64_t bytes = args.logits.nbytes() / args.logits.shape[0];
        std::memset(row_of(args.logits, n), 0, static_cast<size_t>(bytes));
      }
      write(n, row);
    }
  }
};

}  // namespace

void loss_rows(const LossRows& args, const LossSpec& spec, Stream) {
  check_indices(args);
  const int64_t rows = args.logits.shape[0], vocab = args.logits.shape[1];
  const std::vector<Run> runs = runs_of(args.row_to_teacher.as<const int32_t>(), rows);
  const Op op{args, spec, kernels()};
  const int64_t num_runs = static_cast<int64_t>(runs.size());
#pragma omp parallel for schedule(dynamic) if (num_runs > 1 && rows * vocab > kBlock * 16)
  for (int64_t k = 0; k < num_runs; ++k) {
    thread_local Scratch scratch;
    scratch.reserve(vocab, spec.kind);
    op.process(runs[k], scratch);
  }
}

}  // namespace sf::cpu
