#include "loss/step_sums.h"

#include "core/backends.h"
#include "core/check.h"

namespace sf {

void step_sums(const StepSums& args, Stream stream) {
  constexpr const char* kOp = "step_sums";
  const Device device = args.loss.device;
  Dim rows{"rows"}, seven{"7", 7}, num_steps{"num_steps"};
  const auto arg = [&](const char* name, const TensorView& view) {
    return expect(kOp, name, view).contiguous().device(device);
  };
  arg("loss", args.loss).dtype({kF32}).shape({&rows});
  arg("accepted", args.accepted).dtype({kF32}).shape({&rows});
  arg("correct", args.correct).dtype({kU8}).shape({&rows});
  arg("top_prob", args.top_prob).dtype({kF32}).shape({&rows});
  arg("entropy", args.entropy).dtype({kF32}).shape({&rows});
  arg("weight", args.weight).dtype({kF32}).shape({&rows});
  arg("step", args.step).dtype({kI32}).shape({&rows});
  arg("sums", args.sums).dtype({kF64}).shape({&seven, &num_steps});
  require(num_steps >= 1, kOp, "num_steps must be at least 1", num_steps);
  backend(kOp, device, &cpu::step_sums, SF_CUDA_FN(cuda::step_sums))(args, stream);
}

}  // namespace sf
