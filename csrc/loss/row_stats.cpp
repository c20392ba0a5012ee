#include "loss/row_stats.h"

#include <limits>

#include "core/backends.h"
#include "core/check.h"

namespace sf {

void row_stats(const TensorView& logits, const TensorView& lse, const TensorView& argmax,
               Stream stream) {
  constexpr const char* kOp = "row_stats";
  Dim rows{"rows"}, vocab{"vocab"};
  expect(kOp, "logits", logits).dtype({kF32, kBF16}).shape({&rows, &vocab}).contiguous();
  expect(kOp, "lse", lse).dtype({kF32}).shape({&rows}).contiguous().device(logits.device);
  expect(kOp, "argmax", argmax).dtype({kI32}).shape({&rows}).contiguous().device(logits.device);
  if (rows == 0) return;
  require(vocab >= 1 && vocab <= std::numeric_limits<int32_t>::max(), kOp,
          "vocab must be in [1, 2^31)", vocab);
  backend(kOp, logits.device, &cpu::row_stats, SF_CUDA_FN(cuda::row_stats))(logits, lse, argmax,
                                                                            stream);
}

}  // namespace sf
