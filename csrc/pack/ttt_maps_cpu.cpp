#include <algorithm>
#include <array>
#include <numeric>
#include <string>

#include "core/check.h"
#include "pack/ttt_maps.h"

namespace sf::cpu {
namespace {

struct Batch {
  const uint8_t* mask;
  const int32_t* cu_seqlens;
  int64_t tokens, samples, length;
};

Batch batch_of(const char* op, const TensorView& mask, const TensorView& cu_seqlens,
               const TensorView& counts) {
  const Batch b{mask.as<const uint8_t>(), cu_seqlens.as<const int32_t>(), mask.shape[0],
                cu_seqlens.shape[0] - 1, counts.shape[0] - 3};
  require(b.cu_seqlens[0] == 0, op, "cu_seqlens must start at 0", b.cu_seqlens[0]);
  require(b.cu_seqlens[b.samples] == b.tokens, op, "cu_seqlens must end at T",
          b.cu_seqlens[b.samples]);
  for (int64_t k = 0; k < b.samples; ++k) {
    require(b.cu_seqlens[k] <= b.cu_seqlens[k + 1], op, "cu_seqlens must not fall",
            b.cu_seqlens[k + 1]);
  }
  return b;
}

// At how many steps row t of a sample that ends at `end` is active.
int64_t depth_of(const Batch& b, int64_t t, int64_t end) {
  for (int64_t j = std::min(b.length, end - t) - 1; j >= 0; --j) {
    if (b.mask[t + j] != 0) return j + 1;
  }
  return 0;
}

// Calls visit(t, begin, end) for every row, in order, with the bounds of its sample.
template <class Visit>
void for_each_row(const Batch& b, Visit visit) {
  for (int64_t k = 0; k < b.samples; ++k) {
    for (int64_t t = b.cu_seqlens[k]; t < b.cu_seqlens[k + 1]; ++t) {
      visit(t, static_cast<int64_t>(b.cu_seqlens[k]), static_cast<int64_t>(b.cu_seqlens[k + 1]));
    }
  }
}

}  // namespace

void ttt_counts(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
                Stream) {
  const Batch b = batch_of("ttt_counts", mask, cu_seqlens, counts);
  int64_t* num_active = counts.as<int64_t>();
  int64_t &num_pairs = num_active[b.length], &num_teachers = num_active[b.length + 1];
  int64_t& misplaced = num_active[b.length + 2];
  std::fill_n(num_active, b.length + 2, 0);
  misplaced = -1;
  for_each_row(b, [&](int64_t t, int64_t begin, int64_t end) {
    for (int64_t i = depth_of(b, t, end) - 1; i >= 0; --i) ++num_active[i];
    if (b.mask[t] == 0) return;
    num_pairs += std::min(b.length, t - begin + 1);
    num_teachers += 1;
    if (t == end - 1 && misplaced < 0) misplaced = t;
  });
}

void ttt_fill(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
              const TttMaps& out, Stream) {
  constexpr const char* kOp = "ttt_fill";
  const Batch b = batch_of(kOp, mask, cu_seqlens, counts);
  const int64_t* num_active = counts.as<const int64_t>();
  std::array<int64_t, kMaxTttLength + 1> offset{};
  std::partial_sum(num_active, num_active + b.length, offset.begin() + 1);
  require(out.active.numel() == offset[b.length], kOp,
          "active must have as many entries as counts says", out.active.numel());
  require(out.parent.numel() == offset[b.length] - offset[1], kOp,
          "parent must have as many entries as counts says", out.parent.numel());
  require(out.pair_source.numel() == num_active[b.length], kOp,
          "pair_source must have as many entries as counts says", out.pair_source.numel());
  require(out.teacher_rows.numel() == num_active[b.length + 1], kOp,
          "teacher_rows must have as many entries as counts says", out.teacher_rows.numel());

  // filled[i]: rows of step i so far. place[t % L][i]: where row t lies in `active` at step i; a
  // pair (u, i) looks back at most L - 1 rows.
  std::array<int64_t, kMaxTttLength> filled{};
  std::array<std::array<int32_t, kMaxTttLength>, kMaxTttLength> place;
  int64_t pair = 0, teacher = 0;
  for_each_row(b, [&](int64_t t, int64_t begin, int64_t end) {
    const int64_t depth = depth_of(b, t, end);
    for (int64_t i = 0; i < depth; ++i) {
      const int64_t at = offset[i] + filled[i]++;
      out.active.as<int32_t>()[at] = static_cast<int32_t>(t);
      if (i > 0) out.parent.as<int32_t>()[at - offset[1]] = static_cast<int32_t>(filled[i - 1] - 1);
      place[t % b.length][i] = static_cast<int32_t>(at);
    }
    if (b.mask[t] == 0) return;
    for (int64_t i = 0; i < std::min(b.length, t - begin + 1); ++i, ++pair) {
      out.pair_source.as<int32_t>()[pair] = place[(t - i) % b.length][i];
      out.pair_step.as<int32_t>()[pair] = static_cast<int32_t>(i);
      out.pair_teacher.as<int32_t>()[pair] = static_cast<int32_t>(teacher);
    }
    out.teacher_rows.as<int32_t>()[teacher++] = static_cast<int32_t>(t);
  });
}

}  // namespace sf::cpu
