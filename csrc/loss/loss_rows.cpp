#include "loss/loss_rows.h"

#include <cmath>
#include <limits>
#include <string>

#include "core/backends.h"
#include "core/check.h"

namespace sf {
namespace {

constexpr const char* kOp = "loss_rows";

bool present(const TensorView& view) { return view.rank > 0; }

void check_presence(const char* name, const TensorView& view, bool wanted, const char* when) {
  if (present(view) == wanted) return;
  fail_argument(kOp,
                std::string(name) + (wanted ? " must be given " : " must not be given ") + when,
                wanted ? "none" : view.str());
}

void check_spec(const LossSpec& spec) {
  const auto check = [](bool ok, const char* wanted, float got) {
    if (!ok) fail_argument(kOp, wanted, std::to_string(got));
  };
  check(std::isfinite(spec.temperature) && spec.temperature > 0,
        "temperature must be finite and above 0", spec.temperature);
  check(spec.beta > 0 && spec.beta < 1, "beta must be between 0 and 1", spec.beta);
  check(std::isfinite(spec.hard_weight) && spec.hard_weight >= 0,
        "hard_weight must be finite and at least 0", spec.hard_weight);
  check(spec.kind != LossKind::kHardCe || spec.hard_weight == 0,
        "hard_weight must be 0 with the hard cross entropy", spec.hard_weight);
}

}  // namespace

void loss_rows(const LossRows& args, const LossSpec& spec, Stream stream) {
  check_spec(spec);
  const bool hard = spec.kind == LossKind::kHardCe;
  check_presence("teacher", args.teacher, !hard,
                 hard ? "with the hard cross entropy" : "with this loss");
  const bool has_label = hard || spec.hard_weight != 0;
  check_presence("label", args.label, has_label,
                 has_label ? "with a hard cross entropy" : "without a hard cross entropy");
  if (spec.kind == LossKind::kLkLambda) {
    check_presence("kl_weight", args.kl_weight, true, "with LK-lambda");
  } else {
    check_presence("kl_weight", args.kl_weight, false, "but with LK-lambda");
  }
  if (hard) check_presence("teacher_lse", args.teacher_lse, false, "without a teacher");
  if (!present(args.teacher_lse)) {
    check_presence("teacher_argmax", args.teacher_argmax, false, "without teacher_lse");
  }

  const Device device = args.logits.device;
  Dim rows{"rows"}, vocab{"vocab"}, teacher_rows{"teacher_rows"}, teacher_vocab{"teacher_vocab"};
  const auto arg = [&](const char* name, const TensorView& view) {
    return expect(kOp, name, view).contiguous().device(device);
  };
  arg("logits", args.logits).dtype({kF32, kBF16}).shape({&rows, &vocab});
  if (present(args.teacher)) {
    arg("teacher", args.teacher).dtype({kF32, kBF16}).shape({&teacher_rows, &teacher_vocab});
    require(teacher_vocab >= vocab, kOp, "teacher must have at least as many columns as logits",
            teacher_vocab);
  }
  arg("row_to_teacher", args.row_to_teacher).dtype({kI32}).shape({&rows});
  arg("weight", args.weight).dtype({kF32}).shape({&rows});
  const auto optional = [&](const char* name, const TensorView& view, DType dtype, Dim* size) {
    if (present(view)) arg(name, view).dtype({dtype}).shape({size});
  };
  optional("teacher_lse", args.teacher_lse, kF32, &teacher_rows);
  optional("teacher_argmax", args.teacher_argmax, kI32, &teacher_rows);
  optional("label", args.label, kI32, &teacher_rows);
  optional("kl_weight", args.kl_weight, kF32, &rows);
  arg("loss", args.loss).dtype({kF32}).shape({&rows});
  arg("accepted", args.accepted).dtype({kF32}).shape({&rows});
  arg("correct", args.correct).dtype({kU8}).shape({&rows});
  arg("top_prob", args.top_prob).dtype({kF32}).shape({&rows});
  arg("entropy", args.entropy).dtype({kF32}).shape({&rows});
  if (rows == 0) return;
  for (const Dim* size : {&vocab, &teacher_vocab}) {
    if (size == &teacher_vocab && hard) continue;
    require(*size >= 1 && *size <= std::numeric_limits<int32_t>::max(), kOp,
            "the vocabulary must be in [1, 2^31)", *size);
  }
  backend(kOp, device, &cpu::loss_rows, SF_CUDA_FN(cuda::loss_rows))(args, spec, stream);
}

}  // namespace sf
