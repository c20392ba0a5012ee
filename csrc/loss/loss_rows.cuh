// One row of loss_rows, worked on by a team of threads: a block (loss_rows_cuda.cu) or a cluster of
// blocks (loss_rows_sm90.cu).
//
// A team has row(), rank() and size() (blocks), slots() (warps), begin(), put(value, partial),
// sync(); kSlots is the largest slots(). put() leaves a warp's partial result where, after sync(),
// every thread of the team finds all of them. Every warp reduces all of them in the same order, so
// all threads agree and the result depends on the row alone.
#pragma once

#include <cmath>

#include "core/reduce.cuh"
#include "loss/loss_rows_access.cuh"
#include "loss/loss_rows_terms.cuh"

namespace sf::cuda {
namespace {

template <class Z, class T>
struct Operands {
  Z logits;  // a pointer to the elements, or AnyRow
  T teacher;
  const int32_t* row_to_teacher;
  const float* weight;
  const float* teacher_lse;
  const int32_t* teacher_argmax;
  const int32_t* label;
  const float* kl_weight;
  float* loss;
  float* accepted;
  float* top_prob;
  float* entropy;
  uint8_t* correct;
  int64_t rows, teacher_rows;
  int vocab, teacher_vocab;
  Recipe recipe;
};

template <int kSlots>
struct Shared {
  RowPair pairs[kSlots];
  OnlineSoftmax rest[kSlots];  // of the teacher's columns past vocab
  Sums sums[kSlots];
  float hot_student, hot_teacher;  // logits at the label
};

struct RowInputs {
  int64_t source;
  bool known;   // its indices are in range
  bool scored;  // known, and not of weight 0
};

template <class Z, class T>
__device__ __forceinline__ RowInputs row_inputs(const Operands<Z, T>& args, int64_t row) {
  RowInputs in{args.row_to_teacher[row], false, false};
  in.known = in.source >= 0 && in.source < args.teacher_rows;
  in.scored = in.known && args.weight[row] != 0.0f;
  if (in.scored && args.label != nullptr) {
    const int label = args.label[in.source];
    in.known = in.scored = label >= 0 && label < args.vocab;
  }
  return in;
}

// Of a scored row. Read anew where it is needed: cheaper than a register over all passes.
template <class Z, class T>
__device__ __forceinline__ int label_of(const Operands<Z, T>& args, int64_t row) {
  return args.label[args.row_to_teacher[row]];
}

template <Access kAccess, class Z, class T, class Team>
__device__ __forceinline__ void skip_row(const Operands<Z, T>& args, const Team& team, Z z,
                                         const Slice& slice, bool known) {
  if (args.recipe.writes_gradient) fill_zero<kAccess>(z, slice);
  if (team.rank() != 0 || threadIdx.x != 0) return;
  const int64_t row = team.row();
  args.loss[row] = known ? 0.0f : NAN;
  args.accepted[row] = args.top_prob[row] = args.entropy[row] = 0.0f;
  args.correct[row] = 0;
}

template <class T, class Merge>
__device__ __forceinline__ T gather(const T* partial, unsigned slots, const Merge& merge) {
  const unsigned lane = threadIdx.x % kWarpSize;
  T value = T::identity();
  for (unsigned i = lane; i < slots; i += kWarpSize) merge(value, partial[i]);
  return warp_reduce(value, merge);
}

// Of the teacher's columns that the draft does not have.
template <Access kAccess, class T, class Team>
__device__ __forceinline__ OnlineSoftmax rest_stats(T t, int vocab, int teacher_vocab,
                                                    const Team& team, float rate) {
  constexpr int kSize = kWidth<kAccess>;
  OnlineSoftmax stats = OnlineSoftmax::identity();
  float y[kSize];
  const unsigned first = vocab / kSize + team.rank() * blockDim.x + threadIdx.x;
  const unsigned end = teacher_vocab / kSize;
  for (unsigned i = first; i < end; i += team.size() * blockDim.x) {
    load(t + int64_t{i} * kSize, y);
    stats.add(y, i * kSize, rate);
  }
  return stats;
}

__device__ __forceinline__ void shift_argmax(OnlineSoftmax& stats, int by) {
  if (stats.argmax != INT_MAX) stats.argmax += by;
}

template <class Team>
__device__ __forceinline__ Slice slice_of(const Team& team, unsigned steps) {
  const unsigned each = (steps + team.size() - 1) / team.size();
  const unsigned begin = min(team.rank() * each, steps);
  return {begin, min(each, steps - begin)};
}

// What pass 1 says about the whole teacher row.
struct TeacherChoice {
  float one_over_full;  // 1 / sum over all columns of e'
  int argmax;
};

template <class Z, class T>
__device__ __forceinline__ TeacherChoice teacher_choice(const Operands<Z, T>& args, int64_t source,
                                                        OnlineSoftmax stats,
                                                        const OnlineSoftmax* rest, unsigned slots) {
  if (args.teacher_lse != nullptr) {
    const float full = stats.max / args.recipe.temperature - args.teacher_lse[source];
    return {exp2_nonpositive(full * kLog2E),
            args.teacher_argmax != nullptr ? args.teacher_argmax[source] : stats.argmax};
  }
  if (args.teacher_vocab == args.vocab) return {1.0f / stats.sum, stats.argmax};
  const float rate = args.recipe.rate;
  const auto merge = [rate](OnlineSoftmax& a, const OnlineSoftmax& b) { a.merge(b, rate); };
  const float max = stats.max;
  merge(stats, gather(rest, slots, merge));
  return {exp2_nonpositive((max - stats.max) * rate) / stats.sum, stats.argmax};
}

// Three passes over a row at most: softmax; sums (and the gradient, where it needs none of them);
// gradient. From memory, per row: vocab * (student + teacher element) bytes in, vocab * student
// out; without teacher_lse also (teacher_vocab - vocab) * sizeof(T) in. Held rows are read once;
// the others again in every pass, from L2. Neighbouring rows with one teacher find it in L2 too. A
// row of weight 0: nothing in, vocab * sizeof(Z) out.
template <Group kGroup, Access kAccess, class Z, class T, class Team>
__device__ __forceinline__ void loss_row(const Operands<Z, T>& args, Team team) {
  constexpr bool kTeacher = has_teacher(kGroup);
  constexpr int kSize = kWidth<kAccess>;
  const Recipe& recipe = args.recipe;
  const float rate = recipe.rate;
  const int64_t row = team.row();
  const auto writes = [&] { return team.rank() == 0 && threadIdx.x == 0; };
  const bool has_label = args.label != nullptr;
  const Z z = args.logits + row * args.vocab;
  const Slice slice = slice_of(team, args.vocab / kSize);
  const RowInputs in = row_inputs(args, row);
  if (!in.scored) return skip_row<kAccess>(args, team, z, slice, in.known);

  team.begin();
  auto& shared = shared_storage<Shared<Team::kSlots>>();
  const T t = kTeacher ? args.teacher + in.source * args.teacher_vocab : args.teacher;
  Rows<kAccess, kTeacher, Z, T> rows;
  rows.z = z + slice.begin * kSize;
  rows.t = kTeacher ? t + slice.begin * kSize : t;
  rows.count = slice.count;
  rows.fetch();
  if (has_label && writes()) {
    const int label = label_of(args, row);
    shared.hot_student = load_one(z + label);
    shared.hot_teacher = kTeacher ? load_one(t + label) : 0.0f;
  }

  // Pass 1.
  RowPair pair = RowPair::identity();
  rows.visit([&](const auto& x, const auto& y, int first) {
    pair.student.add(x, first, rate);
    if constexpr (kTeacher) pair.teacher.add(y, first, rate);
  });
  if (team.rank() != 0) {
    shift_argmax(pair.student, slice.begin * kSize);
    shift_argmax(pair.teacher, slice.begin * kSize);
  }
  const auto merge_pairs = [rate](RowPair& a, const RowPair& b) {
    a.student.merge(b.student, rate);
    if constexpr (kTeacher) a.teacher.merge(b.teacher, rate);
  };
  team.put(warp_reduce(pair, merge_pairs), shared.pairs);
  if (kTeacher && args.teacher_lse == nullptr && args.teacher_vocab > args.vocab) {
    const auto merge = [rate](OnlineSoftmax& a, const OnlineSoftmax& b) { a.merge(b, rate); };
    const OnlineSoftmax rest = rest_stats<kAccess>(t, args.vocab, args.teacher_vocab, team, rate);
    team.put(warp_reduce(rest, merge), shared.rest);
  }
  team.sync();
  pair = gather(shared.pairs, team.slots(), merge_pairs);
  TeacherChoice choice{};
  if constexpr (kTeacher) {
    choice =
        teacher_choice(args, args.row_to_teacher[row], pair.teacher, shared.rest, team.slots());
  }
  const Scales scales = make_scales<kGroup>(recipe, pair, choice.one_over_full);
  if (writes()) {
    if constexpr (!kTeacher) choice.argmax = label_of(args, row);
    args.correct[row] = pair.student.argmax == choice.argmax;
    args.top_prob[row] = scales.student_scale;
  }

  // Pass 2. Without a third one it also writes the gradient.
  Coefficients coefficients = scaled(1, 0, 1, recipe, scales, args.weight[row]);
  Sums sums = Sums::identity();
  const auto add = [&](auto& x, const auto& y, int) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Terms terms = make_terms<kGroup>(x[i], y[i], scales);
      add_terms<kGroup>(terms, scales, sums);
      if constexpr (!is_three_pass(kGroup)) x[i] = gradient<kGroup>(terms, scales, coefficients);
    }
  };
  rows.rewrite(add, !is_three_pass(kGroup) && recipe.writes_gradient);
  team.put(warp_reduce(sums, merge_sums<kGroup>), shared.sums);
  team.sync();
  sums = gather(shared.sums, team.slots(), merge_sums<kGroup>);
  const float log_sum = -logf(scales.student_scale);
  Outcome result{};
  if constexpr (kTeacher) {
    const float kl_weight = args.kl_weight != nullptr ? args.kl_weight[row] : 0.0f;
    result = outcome<kGroup>(recipe, scales, sums, log_sum, args.weight[row], kl_weight);
    coefficients = result.coefficients;
  }
  if (has_label && writes()) {
    const float hard = log_sum - (shared.hot_student - scales.student_max) / recipe.temperature;
    if constexpr (kTeacher) {
      result.loss += recipe.hard_weight * hard;
    } else {
      result = {hard, expf(-hard), {}};
    }
  }
  if (writes()) {
    args.loss[row] = result.loss;
    args.accepted[row] = result.accepted;
    args.entropy[row] = log_sum - kLn2 * sums.entropy * scales.student_scale;
  }
  if (!recipe.writes_gradient) return;

  // Pass 3.
  if constexpr (is_three_pass(kGroup)) {
    const auto differentiate = [&](auto& x, const auto& y, int) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        x[i] = gradient<kGroup>(make_terms<kGroup>(x[i], y[i], scales), scales, coefficients);
      }
    };
    rows.rewrite(differentiate, true);
    if (has_label) team.sync();
  }

  // The label's element once more, after all threads wrote theirs.
  if (has_label && writes()) {
    const float hard_weight = kTeacher ? recipe.hard_weight : 1.0f;
    const Terms hot = make_terms<kGroup>(shared.hot_student, shared.hot_teacher, scales);
    store_one(z + label_of(args, row), gradient<kGroup>(hot, scales, coefficients) -
                                           hard_weight * args.weight[row] / recipe.temperature);
  }
}

}  // namespace
}  // namespace sf::cuda
