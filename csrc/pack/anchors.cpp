#include "pack/anchors.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "core/check.h"
#include "pack/bounds.h"

namespace sf {
namespace {

constexpr const char* kOp = "draw_anchors";

void check(const TensorView& loss_mask, const TensorView& cu_seqlens, const TensorView& sample_keys,
           AnchorDraw draw, const TensorView& anchors, const TensorView& cu_anchors) {
  Dim T{"T"}, N{"N"}, room{"C"};
  expect(kOp, "loss_mask", loss_mask).dtype({kU8}).shape({&T}).contiguous().device({});
  expect(kOp, "sample_keys", sample_keys).dtype({kI64}).shape({&N}).contiguous().device({});
  Dim bounds{"N+1", N + 1};
  expect(kOp, "cu_seqlens", cu_seqlens).dtype({kI32}).shape({&bounds}).contiguous().device({});
  expect(kOp, "anchors", anchors).dtype({kI32}).shape({&room}).contiguous().device({});
  expect(kOp, "cu_anchors", cu_anchors).dtype({kI32}).shape({&bounds}).contiguous().device({});
  require(T <= std::numeric_limits<int32_t>::max(), kOp, "T must be below 2^31", T);
  require(draw.max_anchors >= 1, kOp, "max_anchors must be at least 1", draw.max_anchors);
  require(draw.step >= 0 && draw.step <= std::numeric_limits<uint32_t>::max(), kOp,
          "step must be in [0, 2^32)", draw.step);
  require_prefix_sums(kOp, "cu_seqlens", cu_seqlens, T);
  const int32_t* begins = cu_seqlens.as<const int32_t>();
  int64_t wanted = 0;
  for (int64_t k = 0; k < N; ++k) {
    wanted += std::min<int64_t>(draw.max_anchors, std::max(begins[k + 1] - begins[k] - 1, 0));
  }
  require(room >= wanted, kOp, "anchors must have room for all that may be drawn", room);
}

}  // namespace

void draw_anchors(const TensorView& loss_mask, const TensorView& cu_seqlens,
                  const TensorView& sample_keys, AnchorDraw draw, const TensorView& anchors,
                  const TensorView& cu_anchors) {
  check(loss_mask, cu_seqlens, sample_keys, draw, anchors, cu_anchors);
  const uint8_t* mask = loss_mask.as<const uint8_t>();
  const int32_t* begins = cu_seqlens.as<const int32_t>();
  int32_t *drawn = anchors.as<int32_t>(), *counts = cu_anchors.as<int32_t>();
  std::vector<std::pair<uint64_t, int32_t>> candidates;
  counts[0] = 0;
  for (int64_t k = 0; k < sample_keys.shape[0]; ++k) {
    const uint64_t sample_key = sample_keys.as<const uint64_t>()[k];
    candidates.clear();
    for (int32_t t = begins[k]; t + 1 < begins[k + 1]; ++t) {
      if (mask[t] == 0 || mask[t + 1] == 0) continue;
      candidates.emplace_back(anchor_key(draw.seed, static_cast<uint32_t>(draw.step), sample_key,
                                         static_cast<uint32_t>(t - begins[k])),
                              t);
    }
    if (static_cast<int64_t>(candidates.size()) > draw.max_anchors) {
      std::nth_element(candidates.begin(), candidates.begin() + draw.max_anchors, candidates.end());
      candidates.resize(static_cast<size_t>(draw.max_anchors));
    }
    int32_t* out = drawn + counts[k];
    std::transform(candidates.begin(), candidates.end(), out, [](auto& c) { return c.second; });
    std::sort(out, out + candidates.size());
    counts[k + 1] = counts[k] + static_cast<int32_t>(candidates.size());
  }
}

}  // namespace sf
