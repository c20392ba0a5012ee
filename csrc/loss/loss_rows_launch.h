// From the tensors of loss_rows to the operands of its kernels. For .cu files.
#pragma once

#include "core/launch.cuh"
#include "loss/loss_rows.cuh"

namespace sf::cuda {
namespace {

inline Recipe recipe_of(const LossSpec& spec) {
  return {spec.kind, spec.temperature, static_cast<float>(double{kLog2E} / spec.temperature),
          spec.beta, spec.hard_weight, spec.writes_gradient};
}

template <class Z, class T>
Operands<Z, T> operands_of(const LossRows& args, const LossSpec& spec, Z logits, T teacher) {
  const bool hard = group_of(spec.kind) == Group::kHard;
  const int vocab = static_cast<int>(args.logits.shape[1]);
  return {logits,
          teacher,
          args.row_to_teacher.as<const int32_t>(),
          args.weight.as<const float>(),
          args.teacher_lse.as<const float>(),
          args.teacher_argmax.as<const int32_t>(),
          args.label.as<const int32_t>(),
          args.kl_weight.as<const float>(),
          args.loss.as<float>(),
          args.accepted.as<float>(),
          args.top_prob.as<float>(),
          args.entropy.as<float>(),
          args.correct.as<uint8_t>(),
          args.logits.shape[0],
          hard ? args.label.shape[0] : args.teacher.shape[0],
          vocab,
          hard ? vocab : static_cast<int>(args.teacher.shape[1]),
          recipe_of(spec)};
}

// Calls f.template operator()<Group>() for the spec's group.
template <class F>
void for_group(LossKind kind, F f) {
  switch (group_of(kind)) {
    case Group::kHard:
      return f.template operator()<Group::kHard>();
    case Group::kSoft:
      return f.template operator()<Group::kSoft>();
    case Group::kRatio:
      return f.template operator()<Group::kRatio>();
    case Group::kJsd:
      return f.template operator()<Group::kJsd>();
  }
}

inline unsigned held_threads(int64_t chunks_per_block, DType dtype) {
  const int64_t chunks_per_thread = held_elements(dtype) / kChunk;
  return threads_for((chunks_per_block + chunks_per_thread - 1) / chunks_per_thread, kHeldThreads);
}

}  // namespace
}  // namespace sf::cuda
