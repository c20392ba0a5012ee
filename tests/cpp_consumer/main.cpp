// The row loss by hand, and an error that can be caught, without Python or torch. The part between
// the marks is the example of docs/embedding.md.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/tensor_view.h"
#include "loss/loss_rows.h"

namespace {

bool near(float a, double b) { return std::abs(a - b) < 1e-6; }

// [example
struct RowLosses {
  std::vector<float> loss, accepted, top_prob, entropy;
  std::vector<uint8_t> correct;
  explicit RowLosses(size_t rows)
      : loss(rows), accepted(rows), top_prob(rows), entropy(rows), correct(rows) {}
};

// Jensen-Shannon divergence of rows of logits; row n is taught by row n of the teacher. The logits
// become d sum(weight * loss) / d logits. On a GPU every pointer is to device memory, every view
// names the device ({sf::DeviceType::kCUDA, 0}, last argument), and stream is a cudaStream_t.
void jsd_rows(float* logits, float* teacher, float* weight, int32_t* row_to_teacher, int64_t rows,
              int64_t vocab, RowLosses& out, void* stream) {
  sf::LossRows args;
  args.logits = sf::view_of(logits, sf::kF32, {rows, vocab});
  args.teacher = sf::view_of(teacher, sf::kF32, {rows, vocab});
  args.row_to_teacher = sf::view_of(row_to_teacher, sf::kI32, {rows});
  args.weight = sf::view_of(weight, sf::kF32, {rows});
  args.loss = sf::view_of(out.loss.data(), sf::kF32, {rows});
  args.accepted = sf::view_of(out.accepted.data(), sf::kF32, {rows});
  args.correct = sf::view_of(out.correct.data(), sf::kU8, {rows});
  args.top_prob = sf::view_of(out.top_prob.data(), sf::kF32, {rows});
  args.entropy = sf::view_of(out.entropy.data(), sf::kF32, {rows});
  sf::loss_rows(args, {.kind = sf::LossKind::kJsd, .temperature = 2, .beta = 0.5f},
                sf::Stream{stream});
}
// example]

bool jsd_is_right() {
  // At temperature 2: q = (1/4, 3/4) and p = (1/2, 1/2); the second row has no weight.
  const float nan = std::nanf("");
  std::vector<float> logits = {0.0f, 2 * std::log(3.0f), nan, nan};
  std::vector<float> teacher = {1.0f, 1.0f, nan, nan}, weight = {3.0f, 0.0f};
  std::vector<int32_t> row_to_teacher = {0, 1};
  RowLosses out(2);
  jsd_rows(logits.data(), teacher.data(), weight.data(), row_to_teacher.data(), 2, 2, out, nullptr);
  // m = (3/8, 5/8)
  const double kl_p = 0.5 * std::log(4.0 / 3) + 0.5 * std::log(4.0 / 5);
  const double s0 = std::log(2.0 / 3), s1 = std::log(6.0 / 5);
  const double kl_q = 0.25 * s0 + 0.75 * s1;
  const double gradient0 = 3 * 0.5 * 0.25 * (s0 - kl_q) / 2;
  return near(out.loss[0], (kl_p + kl_q) / 2) && near(logits[0], gradient0) &&
         near(logits[1], -gradient0) && near(out.accepted[0], 0.75) && out.loss[1] == 0 &&
         logits[2] == 0 && logits[3] == 0;
}

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
  return right && jsd_is_right() && message == "loss_rows: weight must be [rows=1] f32, got [3] f32"
             ? 0
             : 1;
}
