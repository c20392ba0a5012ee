#include <algorithm>

#include "core/check.h"
#include "loss/step_sums.h"

namespace sf::cpu {

void step_sums(const StepSums& args, Stream) {
  const int64_t rows = args.loss.shape[0], num_steps = args.sums.shape[1];
  const float* loss = args.loss.as<const float>();
  const float* accepted = args.accepted.as<const float>();
  const float* top_prob = args.top_prob.as<const float>();
  const float* entropy = args.entropy.as<const float>();
  const float* weight = args.weight.as<const float>();
  const uint8_t* correct = args.correct.as<const uint8_t>();
  const int32_t* step = args.step.as<const int32_t>();
  double* sums = args.sums.as<double>();
  std::fill_n(sums, 7 * num_steps, 0.0);
  for (int64_t n = 0; n < rows; ++n) {
    if (step[n] < 0 || step[n] >= num_steps) {
      fail_argument("step_sums", "step must be in [0, " + std::to_string(num_steps) + ")",
                    std::to_string(step[n]) + " at row " + std::to_string(n));
    }
    if (weight[n] == 0) continue;
    sums[0 * num_steps + step[n]] += loss[n];
    sums[1 * num_steps + step[n]] += correct[n];
    sums[2 * num_steps + step[n]] += accepted[n];
    sums[3 * num_steps + step[n]] += 1;
    sums[4 * num_steps + step[n]] += static_cast<double>(weight[n]) * loss[n];
    sums[5 * num_steps + step[n]] += top_prob[n];
    sums[6 * num_steps + step[n]] += entropy[n];
  }
}

}  // namespace sf::cpu
