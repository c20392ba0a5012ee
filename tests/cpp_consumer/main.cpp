// One row of the loss kernel by hand, and an error that can be caught, without Python or torch.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

#include "core/error.h"
#include "core/tensor_view.h"
#include "loss/loss_rows.h"

namespace {

bool near(float a, double b) { return std::abs(a - b) < 1e-6; }

}  // namespace

int main() {
  // Student q = (1/4, 3/4), teacher p = (1/2, 1/2).
  float logits[2] = {0.0f, std::log(3.0f)};
  float teacher[2] = {1.0f, 1.0f};
  float weight = 2.0f, loss = 0, accepted = 0, top_prob = 0, entropy = 0;
  int32_t row_to_teacher = 0;
  uint8_t correct = 1;

  sf::LossRows args;
  args.logits = sf::view_of(logits, sf::kF32, {1, 2});
  args.teacher = sf::view_of(teacher, sf::kF32, {1, 2});
  args.row_to_teacher = sf::view_of(&row_to_teacher, sf::kI32, {1});
  args.weight = sf::view_of(&weight, sf::kF32, {1});
  args.loss = sf::view_of(&loss, sf::kF32, {1});
  args.accepted = sf::view_of(&accepted, sf::kF32, {1});
  args.correct = sf::view_of(&correct, sf::kU8, {1});
  args.top_prob = sf::view_of(&top_prob, sf::kF32, {1});
  args.entropy = sf::view_of(&entropy, sf::kF32, {1});
  sf::loss_rows(args, {.kind = sf::LossKind::kSoftCe});
  const bool right = near(loss, std::log(4.0) - std::log(3.0) / 2) && near(accepted, 0.75) &&
                     correct == 0 && near(top_prob, 0.75) &&
                     near(entropy, std::log(4.0) - 0.75 * std::log(3.0)) && near(logits[0], -0.5) &&
                     near(logits[1], 0.5);
  std::printf("loss %.6f accepted %.6f gradient %.6f %.6f\n", loss, accepted, logits[0], logits[1]);

  args.weight = sf::view_of(&weight, sf::kF32, {3});
  std::string message;
  try {
    sf::loss_rows(args, {});
  } catch (const sf::ArgumentError& error) {
    message = error.what();
  }
  std::printf("%s\n", message.c_str());
  return right && message == "loss_rows: weight must be [rows=1] f32, got [3] f32" ? 0 : 1;
}
