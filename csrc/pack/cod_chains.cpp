#include "pack/cod_chains.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "core/check.h"
#include "pack/bounds.h"

namespace sf {
namespace {

constexpr const char* kOp = "cod_chains";

void require_share(const char* name, double share, bool positive) {
  if (share <= 1 && (positive ? share > 0 : share >= 0)) return;
  fail_argument(kOp, std::string(name) + (positive ? " must be in (0, 1]" : " must be in [0, 1]"),
                std::to_string(share));
}

void check(const TensorView& loss_mask, const TensorView& cu_seqlens, const TensorView& sample_keys,
           const CodDraw& draw, const TensorView& anchors, const TensorView& cu_depths) {
  Dim T{"T"}, N{"N"}, room{"C"}, depths{"depths"};
  expect(kOp, "loss_mask", loss_mask).dtype({kU8}).shape({&T}).contiguous().device({});
  expect(kOp, "sample_keys", sample_keys).dtype({kI64}).shape({&N}).contiguous().device({});
  Dim bounds{"N+1", N + 1};
  expect(kOp, "cu_seqlens", cu_seqlens).dtype({kI32}).shape({&bounds}).contiguous().device({});
  expect(kOp, "anchors", anchors).dtype({kI32}).shape({&room}).contiguous().device({});
  expect(kOp, "cu_depths", cu_depths).dtype({kI32}).shape({&depths}).contiguous().device({});
  require(T <= std::numeric_limits<int32_t>::max(), kOp, "T must be below 2^31", T);
  require(depths >= 1, kOp, "depths must be at least 1", depths);
  require(draw.step >= 0 && draw.step <= std::numeric_limits<uint32_t>::max(), kOp,
          "step must be in [0, 2^32)", draw.step);
  require_share("ratio", draw.ratio, true);
  require_share("min_ratio", draw.min_ratio, false);
  require_prefix_sums(kOp, "cu_seqlens", cu_seqlens, T);
  const uint8_t* mask = loss_mask.as<const uint8_t>();
  const int64_t valid = std::count_if(mask, mask + T, [](uint8_t m) { return m != 0; });
  const int64_t wanted = (depths - 1) * valid;
  require(wanted <= std::numeric_limits<int32_t>::max(), kOp, "rows must be below 2^31", wanted);
  require(room >= wanted, kOp, "anchors must have room for all that may be drawn", room);
}

// One sample's chains: what is kept at each depth, packed positions ascending.
struct Sample {
  int32_t begin, end;
  uint64_t key;
  int64_t valid = 0;
  std::vector<int32_t> kept = {};
};

std::vector<int32_t> candidates_of(const Sample& sample, const uint8_t* mask, int64_t depth) {
  std::vector<int32_t> out;
  if (depth == 1) {
    for (int32_t t = sample.begin + 1; t < sample.end; ++t) {
      if (mask[t] != 0) out.push_back(t);
    }
    return out;
  }
  for (const int32_t t : sample.kept) {
    if (t + 1 < sample.end && mask[t + 1] != 0) out.push_back(t + 1);
  }
  return out;
}

void keep_some(Sample& sample, const uint8_t* mask, const CodDraw& draw, int64_t depth) {
  std::vector<int32_t> candidates = candidates_of(sample, mask, depth);
  const double share = std::max(std::pow(draw.ratio, static_cast<double>(depth)), draw.min_ratio);
  const double left = static_cast<double>(std::max<int64_t>(0, sample.valid - depth));
  const size_t wanted = static_cast<size_t>(left * share);
  if (candidates.size() > wanted) {
    std::vector<std::pair<uint64_t, int32_t>> keyed;
    keyed.reserve(candidates.size());
    for (const int32_t t : candidates) {
      keyed.emplace_back(
          cod_key(draw.seed, static_cast<uint32_t>(draw.step), sample.key,
                  static_cast<uint32_t>(depth), static_cast<uint32_t>(t - sample.begin)),
          t);
    }
    std::nth_element(keyed.begin(), keyed.begin() + static_cast<ptrdiff_t>(wanted), keyed.end());
    candidates.resize(wanted);
    for (size_t i = 0; i < wanted; ++i) candidates[i] = keyed[i].second;
    std::sort(candidates.begin(), candidates.end());
  }
  sample.kept = std::move(candidates);
}

}  // namespace

void cod_chains(const TensorView& loss_mask, const TensorView& cu_seqlens,
                const TensorView& sample_keys, CodDraw draw, const TensorView& anchors,
                const TensorView& cu_depths) {
  check(loss_mask, cu_seqlens, sample_keys, draw, anchors, cu_depths);
  const uint8_t* mask = loss_mask.as<const uint8_t>();
  const int32_t* begins = cu_seqlens.as<const int32_t>();
  std::vector<Sample> samples;
  for (int64_t k = 0; k < sample_keys.shape[0]; ++k) {
    Sample sample{begins[k], begins[k + 1], sample_keys.as<const uint64_t>()[k]};
    for (int32_t t = sample.begin; t < sample.end; ++t) sample.valid += mask[t] != 0;
    samples.push_back(std::move(sample));
  }
  int32_t *out = anchors.as<int32_t>(), *counts = cu_depths.as<int32_t>();
  counts[0] = 0;
  for (int64_t depth = 1; depth < cu_depths.shape[0]; ++depth) {
    int32_t n = counts[depth - 1];
    for (Sample& sample : samples) {
      keep_some(sample, mask, draw, depth);
      for (const int32_t t : sample.kept) out[n++] = t - static_cast<int32_t>(depth);
    }
    counts[depth] = n;
  }
}

}  // namespace sf
