#include "loss/soft_ce_rows.h"

#include <limits>

#include "core/backends.h"
#include "core/check.h"

namespace sf {

void soft_ce_rows(const SoftCeRows& args, Stream stream) {
  constexpr const char* kOp = "soft_ce_rows";
  const Device device = args.logits.device;
  Dim rows{"rows"}, vocab{"vocab"}, teacher_rows{"teacher_rows"};
  const auto arg = [&](const char* name, const TensorView& view) {
    return expect(kOp, name, view).contiguous().device(device);
  };
  arg("logits", args.logits).dtype({kF32, kBF16}).shape({&rows, &vocab});
  arg("teacher", args.teacher).dtype({kF32, kBF16}).shape({&teacher_rows, &vocab});
  arg("row_to_teacher", args.row_to_teacher).dtype({kI32}).shape({&rows});
  arg("weight", args.weight).dtype({kF32}).shape({&rows});
  arg("teacher_lse", args.teacher_lse).dtype({kF32}).shape({&teacher_rows});
  arg("loss", args.loss).dtype({kF32}).shape({&rows});
  arg("accepted", args.accepted).dtype({kF32}).shape({&rows});
  arg("correct", args.correct).dtype({kU8}).shape({&rows});
  if (rows == 0) return;
  require(vocab >= 1 && vocab <= std::numeric_limits<int32_t>::max(), kOp,
          "vocab must be in [1, 2^31)", vocab);
  backend(kOp, device, &cpu::soft_ce_rows, SF_CUDA_FN(cuda::soft_ce_rows))(args, stream);
}

}  // namespace sf
