// Included by loss_rows_cpu.cpp and its _avx2 and _avx512 sisters, each compiled for its own ISA.
//
// Bytes from memory per student row: vocab read, vocab written (plus the teacher's vocab once per
// run of students). The first pass, the online softmax, reads the row; the later ones find it, or
// its exponentials, in L2, together with the teacher's.
#pragma once

#include <cmath>
#include <utility>

#include "loss/loss_rows_cpu.h"
#include "loss/row_passes.h"

namespace sf::cpu {
namespace {

constexpr float kLeastNormal = std::numeric_limits<float>::min();

// Brings the blocks to one scale. Returns sum exp(d[v] / tau + shift).
SF_ALWAYS_INLINE double normalize(SoftmaxBlock* blocks, int64_t vocab, float max,
                                  double inverse_tau) {
  double sum = 0, shift = 0, scale = 1;
  const int64_t count = num_blocks(vocab);
  for (int64_t k = count; k-- > 0;) {  // from the last one, whose maximum is the row's
    const double new_shift = (static_cast<double>(blocks[k].max) - max) * inverse_tau;
    if (new_shift != shift) {
      shift = new_shift;
      scale = ::exp(shift);
    }
    blocks[k].shift = shift;
    sum += blocks[k].exp_sum * scale;
  }
  shift = 0;
  scale = 1 / sum;
  for (int64_t k = count; k-- > 0;) {
    if (blocks[k].shift != shift) {
      shift = blocks[k].shift;
      scale = ::exp(shift) / sum;
    }
    blocks[k].to_prob = static_cast<float>(scale);
  }
  return sum;
}

template <class T, bool kKeepsD>
SF_ALWAYS_INLINE RowMax teacher_exps(const TeacherArgs& args, const T* row) {
  const Exp exp(args.tau);
  float *exps = args.exps, *ds = args.d;
  SoftmaxBlock* blocks = args.blocks;
  return for_each_block_and_max(row, args.vocab,
                                [&](int64_t k, int64_t begin, int64_t end, float max) {
                                  Vec exp_sum = set1(0);
                                  for_each_vec(begin, end, [&](int64_t v, auto lanes) {
                                    fetch_ahead(row + v);
                                    const Vec d = lanes.load(row + v, max) - set1(max);
                                    const Vec e = lanes.only(exp(d));
                                    lanes.store(exps + v, e);
                                    if constexpr (kKeepsD) lanes.store(ds + v, d);
                                    exp_sum = exp_sum + e;
                                  });
                                  blocks[k] = {max, 0, 0, sum_lanes(exp_sum), 0, 0};
                                });
}

template <class T>
TeacherRow teacher_row(const TeacherArgs& args) {
  const T* row = static_cast<const T*>(args.row);
  const RowMax top =
      args.keeps_d ? teacher_exps<T, true>(args, row) : teacher_exps<T, false>(args, row);
  const double inverse_tau = 1 / args.tau;
  const double sum = normalize(args.blocks, args.vocab, top.value, inverse_tau);
  TeacherRow out{args.exps, args.d, args.blocks, ::log(sum), 1, top.index};
  if (args.lse != nullptr) {
    out.kept = ::exp(top.value * inverse_tau + out.log_sum - static_cast<double>(*args.lse));
    if (args.argmax != nullptr) out.argmax = *args.argmax;
  } else if (args.columns > args.vocab) {
    const SoftmaxStat rest = softmax_stat(row + args.vocab, args.columns - args.vocab, args.tau);
    const double above = (static_cast<double>(rest.top.value) - top.value) * inverse_tau;
    out.kept = sum / (sum + rest.sum * ::exp(above));
    if (rest.top.value > top.value) out.argmax = args.vocab + rest.top.index;
  }
  return out;
}

template <LossKind kKind, class T>
class Student {
 public:
  explicit Student(const StudentArgs& args)
      : args_(args), row_(static_cast<T*>(args.row)), inverse_tau_(1 / args.tau) {}

  StudentRow process() {
    const float label_logit = args_.label < 0 ? 0 : to_f32(row_[args_.label]);
    const RowMax top = softmax();
    const double sum = normalize(args_.blocks, args_.vocab, top.value, inverse_tau_);
    log_sum_ = ::log(sum);
    label_loss_ = log_sum_ - (static_cast<double>(label_logit) - top.value) * inverse_tau_;
    collect();
    later_passes();
    const double hard = args_.hard_weight == 0 ? 0 : args_.hard_weight * label_loss_;
    const int64_t wanted = kTaught ? args_.teacher->argmax : args_.label;
    return {static_cast<float>(kind_loss() + hard), static_cast<float>(accepted_),
            top.index == wanted, static_cast<float>(1 / sum),
            static_cast<float>(log_sum_ - x_mean_)};
  }

 private:
  static constexpr bool kTaught = kKind != LossKind::kHardCe;
  // sum p x is a term of the loss.
  static constexpr bool kSoft = kKind == LossKind::kSoftCe || kKind == LossKind::kLkLambda;
  // sum q [q < pt] is a term of the gradient.
  static constexpr bool kCounts = kKind == LossKind::kLkAlpha || kKind == LossKind::kLkLambda;
  // The gradient needs sums of probabilities, which so take a pass of their own.
  static constexpr bool kThreePasses = kCounts || kKind == LossKind::kJsd || kKind == LossKind::kL1;

  // What the loops over a block use. A local copy: the compiler keeps it in registers, which it
  // could not do with members that a store to the row might change.
  struct Block {
    T* row;
    float *exps, *scores;
    const float *teacher_exps, *teacher_d;
    bool writes_scores;
    Vec max, inverse_tau;
    Vec to_q, to_p, to_pt;
    Vec centre, centre_rest;  // of the gradient's s: their sum is its mean
    Vec below, above, sign_mean;
    Vec beta, one_minus_beta, kl_weight, one_minus_kl_weight;
    Vec inverse_a, weight, hard_weight;
  };

  Block block(int64_t k) const {
    const SoftmaxBlock& own = args_.blocks[k];
    Block b{};
    b.row = row_;
    b.exps = args_.exps;
    b.scores = args_.scores;
    b.writes_scores = args_.writes_gradient;
    b.max = set1(own.max);
    b.inverse_tau = set1(static_cast<float>(inverse_tau_));
    b.to_q = set1(own.to_prob);
    b.beta = set1(args_.beta);
    b.one_minus_beta = set1(1 - args_.beta);
    b.kl_weight = set1(args_.kl_weight);
    b.one_minus_kl_weight = set1(1 - args_.kl_weight);
    // s - mean may be far below either, so that the mean is subtracted in two floats.
    double centre = mean_;
    if constexpr (kKind == LossKind::kReverseKl) centre -= log_ratio(k);
    const float centre_float = static_cast<float>(centre);
    b.centre = set1(centre_float);
    b.centre_rest = set1(static_cast<float>(centre - centre_float));
    b.below = set1(static_cast<float>(below_));
    b.above = set1(static_cast<float>(above_));
    b.sign_mean = set1(static_cast<float>((above_ - below_) / 2));
    b.inverse_a = set1(inverse_a());
    b.weight = set1(static_cast<float>(args_.weight * inverse_tau_));
    b.hard_weight = set1(args_.hard_weight);
    if constexpr (kTaught) {
      const TeacherRow& teacher = *args_.teacher;
      const SoftmaxBlock& other = teacher.blocks[k];
      b.teacher_exps = teacher.exps;
      b.teacher_d = teacher.d;
      b.to_p = set1(other.to_prob);
      b.to_pt = set1(static_cast<float>(other.to_prob * teacher.kept));
    }
    return b;
  }

  // log q - log p = (d - the teacher's d) / tau + this
  double log_ratio(int64_t k) const {
    const TeacherRow& teacher = *args_.teacher;
    return args_.blocks[k].shift - log_sum_ - (teacher.blocks[k].shift - teacher.log_sum);
  }

  // First pass: exponentials, and what can be summed of them before their scale is known.
  RowMax softmax() {
    const T* row = row_;
    float* exps = args_.exps;
    const float* teacher_exps = kTaught ? args_.teacher->exps : nullptr;
    const float* teacher_d = kTaught ? args_.teacher->d : nullptr;
    const Exp exp(args_.tau);
    SoftmaxBlock* blocks = args_.blocks;
    return for_each_block_and_max(
        row, args_.vocab, [&](int64_t k, int64_t begin, int64_t end, float max) {
          Vec exp_sum = set1(0), d_dot = set1(0), loss_dot = set1(0);
          for_each_vec(begin, end, [&](int64_t v, auto lanes) {
            fetch_ahead(row + v);
            const Vec d = lanes.load(row + v, max) - set1(max);
            const Vec e = lanes.only(exp(d));
            if constexpr (kSoft) loss_dot = fma(lanes.load(teacher_exps + v, 0), d, loss_dot);
            if constexpr (kKind == LossKind::kReverseKl) {
              loss_dot = fma(e, d - lanes.load(teacher_d + v, 0), loss_dot);
            }
            lanes.store(exps + v, e);
            exp_sum = exp_sum + e;
            d_dot = fma(e, d, d_dot);
          });
          blocks[k] = {max, 0, 0, sum_lanes(exp_sum), sum_lanes(d_dot), sum_lanes(loss_dot)};
        });
  }

  // The sums of the blocks on one scale. The terms of x_mean_ and of cross_ have one sign.
  void collect() {
    double mass = 0;  // sum q: to_q is rounded, which would not cancel in s - mean
    for (int64_t k = 0; k < num_blocks(args_.vocab); ++k) {
      const SoftmaxBlock& own = args_.blocks[k];
      const double to_q = own.to_prob;
      x_mean_ += to_q * (own.d_dot * inverse_tau_ + own.shift * own.exp_sum);
      if constexpr (kSoft) {
        const SoftmaxBlock& other = args_.teacher->blocks[k];
        cross_ += other.to_prob * (own.loss_dot * inverse_tau_ + own.shift * other.exp_sum);
      }
      if constexpr (kKind == LossKind::kReverseKl) {
        mean_ += to_q * (own.loss_dot * inverse_tau_ + log_ratio(k) * own.exp_sum);
        mass += to_q * own.exp_sum;
      }
    }
    if constexpr (kKind == LossKind::kReverseKl) mean_ /= mass;
  }

  void later_passes() {
    if constexpr (!kTaught) {
      accepted_ = ::exp(-label_loss_);
      if (args_.writes_gradient) pass<false, true>();
    } else if constexpr (kThreePasses) {
      pass<true, false>();
      if (args_.writes_gradient) pass<false, true>();
    } else if (args_.writes_gradient) {
      pass<true, true>();
    } else {
      pass<true, false>();
    }
  }

  struct Sums {
    Vec accepted, value, mean, below, above;
    Vec rest;  // JSD: sum q; L1: sum q [q = p]
  };

  template <bool kSums, bool kWrites>
  void pass() {
    const bool labelled = kWrites && args_.label >= 0;
    const float at_label = labelled ? gradient_at_label() : 0;  // before its inputs are overwritten
    double rest = 0;
    for_each_block(args_.vocab, [&](int64_t k, int64_t begin, int64_t end) {
      const Block b = block(k);
      Sums sums{set1(0), set1(0), set1(0), set1(0), set1(0), set1(0)};
      for_each_vec(begin, end, [&](int64_t v, auto lanes) {
        const Vec e = lanes.load(b.exps + v, 0);
        const Vec t = kTaught ? lanes.load(b.teacher_exps + v, 0) : set1(0);
        if constexpr (kSums) add(b, v, lanes, e, t, &sums);
        if constexpr (kWrites) lanes.store(b.row + v, b.weight * gradient(b, v, lanes, e, t));
      });
      if constexpr (kSums) {
        accepted_ += sum_lanes(sums.accepted);
        value_ += sum_lanes(sums.value);
        if constexpr (kThreePasses) mean_ += sum_lanes(sums.mean);
        rest += sum_lanes(sums.rest);
        below_ += sum_lanes(sums.below);
        above_ += sum_lanes(sums.above);
      }
    });
    if constexpr (kSums && kKind == LossKind::kJsd) mean_ /= rest;
    if constexpr (kSums && kKind == LossKind::kL1) {
      below_ = 2 * below_ + rest;
      above_ = 2 * above_ + rest;
    }
    if (labelled) store_tail(row_ + args_.label, 1, set1(at_label));
  }

  template <class Lanes>
  static SF_ALWAYS_INLINE void add(const Block& b, int64_t v, Lanes lanes, Vec e, Vec t,
                                   Sums* sums) {
    const Vec q = e * b.to_q, p = t * b.to_p, pt = t * b.to_pt;
    sums->accepted = sums->accepted + min(pt, q);
    if constexpr (kCounts) {
      const Vec below = keep_less(q, q, pt);
      sums->below = sums->below + below;
      sums->above = sums->above + (q - below);
    }
    if constexpr (kKind == LossKind::kL1) {
      sums->value = sums->value + abs(q - p);
      const Vec below = keep_less(q, q, p), above = keep_less(q, p, q);
      sums->below = sums->below + below;
      sums->above = sums->above + above;
      sums->rest = sums->rest + (q - below - above);
    }
    if constexpr (kKind == LossKind::kJsd) {
      const Vec m = fma(b.beta, p, b.one_minus_beta * q);
      const Vec log_q_m = log_of_ratio(q, m);
      sums->value = fma(p, log_of_ratio(p, m), sums->value);
      sums->mean = fma(q, log_q_m, sums->mean);
      sums->rest = sums->rest + q;
      if (b.writes_scores) lanes.store(b.scores + v, log_q_m);
    }
  }

  // Of a ratio, not a difference of logarithms: those are large where the ratio is near 1.
  static SF_ALWAYS_INLINE Vec log_of_ratio(Vec a, Vec b) {
    return log_positive(max(a, set1(kLeastNormal)) / max(b, set1(kLeastNormal)));
  }

  // The gradient before the row's weight, and without the label's own term.
  template <class Lanes>
  static SF_ALWAYS_INLINE Vec gradient(const Block& b, int64_t v, Lanes lanes, Vec e, Vec t) {
    const Vec q = e * b.to_q;
    return fma(b.hard_weight, q, kind_gradient(b, v, lanes, q, t));
  }

  template <class Lanes>
  static SF_ALWAYS_INLINE Vec kind_gradient(const Block& b, int64_t v, Lanes lanes, Vec q, Vec t) {
    if constexpr (kKind == LossKind::kHardCe) {
      return q;
    } else if constexpr (kKind == LossKind::kSoftCe) {
      return q - t * b.to_p;
    } else if constexpr (kKind == LossKind::kReverseKl) {
      const Vec difference = lanes.load(b.row + v, 0) - b.max - lanes.load(b.teacher_d + v, 0);
      return q * (fma(difference, b.inverse_tau, set1(0) - b.centre) - b.centre_rest);
    } else if constexpr (kKind == LossKind::kJsd) {
      return b.one_minus_beta * q * (lanes.load(b.scores + v, 0) - b.centre - b.centre_rest);
    } else if constexpr (kKind == LossKind::kL1) {
      const Vec p = t * b.to_p, less = keep_less(q, q, p), more = keep_less(q, p, q);
      return more * b.below - less * b.above - (q - less - more) * b.sign_mean;
    } else {
      const Vec less = keep_less(q, q, t * b.to_pt);
      const Vec g = (q - less) * b.below - less * b.above;  // -q ([q < pt] - b), b = 1 - above
      if constexpr (kKind == LossKind::kLkAlpha) return g * b.inverse_a;
      return fma(b.kl_weight, q - t * b.to_p, b.one_minus_kl_weight * g);
    }
  }

  float gradient_at_label() const {
    const int64_t v = args_.label;
    const Tail lane{1};
    const Block b = block(v / kBlock);
    const Vec e = lane.load(b.exps + v, 0);
    const Vec t = kTaught ? lane.load(b.teacher_exps + v, 0) : set1(0);
    const Vec own = kTaught ? b.hard_weight : set1(1);
    float out;
    lane.store(&out, b.weight * (gradient(b, v, lane, e, t) - own));
    return out;
  }

  // LK-alpha has no gradient where a is 0, nor where its inverse would be infinite.
  float inverse_a() const {
    return accepted_ >= kLeastNormal ? static_cast<float>(1 / accepted_) : 0;
  }

  double kind_loss() const {
    if constexpr (kKind == LossKind::kHardCe) return label_loss_;
    if constexpr (kKind == LossKind::kSoftCe) return log_sum_ - cross_;
    if constexpr (kKind == LossKind::kReverseKl) return mean_;
    if constexpr (kKind == LossKind::kJsd) {
      return args_.beta * value_ + (1 - static_cast<double>(args_.beta)) * mean_;
    }
    if constexpr (kKind == LossKind::kL1) return value_;
    if constexpr (kKind == LossKind::kLkAlpha) {
      return accepted_ >= kLeastNormal ? -::log(accepted_) : 0;
    }
    const double w = args_.kl_weight;
    return w * (log_sum_ - cross_) + (1 - w) * (1 - accepted_);
  }

  const StudentArgs& args_;
  T* row_;
  double inverse_tau_;
  double log_sum_ = 0, label_loss_ = 0;
  double x_mean_ = 0;    // sum q x, x = (z - max z) / tau
  double cross_ = 0;     // sum p x
  double accepted_ = 0;  // sum min(pt, q)
  double value_ = 0;     // L1: sum |q - p|; JSD: sum p log(p / m)
  double mean_ = 0;      // sum q s of the gradient's s
  // The complement of a sum that may be near 1 is summed too, as 1 - sum would cancel.
  double below_ = 0;  // LK: sum q [q < pt]; L1: 1 - sum q sign(q - p)
  double above_ = 0;  // LK: sum q [q >= pt]; L1: 1 + sum q sign(q - p)
};

template <LossKind kKind, class T>
StudentRow student_row(const StudentArgs& args) {
  return Student<kKind, T>(args).process();
}

template <class T, size_t... kKinds>
constexpr StudentKernels students(std::index_sequence<kKinds...>) {
  return {{student_row<static_cast<LossKind>(kKinds), T>...}};
}

constexpr auto kKinds = std::make_index_sequence<kNumLossKinds>{};
constexpr LossKernels kKernels{teacher_row<float>, teacher_row<bf16>, students<float>(kKinds),
                               students<bf16>(kKinds)};

}  // namespace
}  // namespace sf::cpu
