#include "pack/pack_samples.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

#include "core/check.h"

namespace sf {
namespace {

constexpr const char* kOp = "pack_samples";

// Below this many bytes a second thread costs more than it saves.
constexpr int64_t kParallelBytes = 256 * 1024;
// What a thread copies at a time.
constexpr int64_t kPieceBytes = 1 << 20;

struct Copy {
  char* to;
  const char* from;
  int64_t nbytes;
};

std::string of_sample(const char* what, size_t k) {
  return std::string(what) + " of sample " + std::to_string(k);
}

int64_t check(const std::vector<PackSource>& samples, const PackedViews& out) {
  int64_t total = 0;
  std::vector<Dim> widths(out.features.size(), Dim{"width"});
  for (size_t k = 0; k < samples.size(); ++k) {
    const PackSource& sample = samples[k];
    Dim length{"S"};
    expect(kOp, of_sample("ids", k), sample.ids)
        .dtype({kI32})
        .shape({&length})
        .contiguous()
        .device({});
    expect(kOp, of_sample("mask", k), sample.mask)
        .dtype({kU8})
        .shape({&length})
        .contiguous()
        .device({});
    require(sample.features.size() == out.features.size(), kOp,
            "every sample must have as many features as the output",
            static_cast<int64_t>(sample.features.size()));
    for (size_t f = 0; f < sample.features.size(); ++f) {
      expect(kOp, of_sample(("feature " + std::to_string(f)).c_str(), k), sample.features[f])
          .dtype({out.features[f].dtype})
          .shape({&length, &widths[f]})
          .contiguous()
          .device({});
    }
    total += length;
  }
  require(total <= std::numeric_limits<int32_t>::max(), kOp, "T must be below 2^31", total);
  Dim T{"T", total}, bounds{"N+1", static_cast<int64_t>(samples.size()) + 1};
  expect(kOp, "packed ids", out.ids).dtype({kI64}).shape({&T}).contiguous().device({});
  expect(kOp, "packed mask", out.mask).dtype({kU8}).shape({&T}).contiguous().device({});
  expect(kOp, "positions", out.positions).dtype({kI64}).shape({&T}).contiguous().device({});
  expect(kOp, "cu_seqlens", out.cu_seqlens).dtype({kI32}).shape({&bounds}).contiguous().device({});
  for (size_t f = 0; f < out.features.size(); ++f) {
    expect(kOp, "packed feature " + std::to_string(f), out.features[f])
        .shape({&T, &widths[f]})
        .contiguous()
        .device({});
  }
  return total;
}

void add_copy(std::vector<Copy>& copies, char* to, const char* from, int64_t nbytes) {
  for (int64_t at = 0; at < nbytes; at += kPieceBytes) {
    copies.push_back({to + at, from + at, std::min(kPieceBytes, nbytes - at)});
  }
}

}  // namespace

void pack_samples(const std::vector<PackSource>& samples, const PackedViews& out) {
  check(samples, out);
  std::vector<Copy> copies;
  int64_t start = 0, total_bytes = 0;
  int32_t* cu_seqlens = out.cu_seqlens.as<int32_t>();
  cu_seqlens[0] = 0;
  for (size_t k = 0; k < samples.size(); ++k) {
    const PackSource& sample = samples[k];
    const int64_t length = sample.ids.shape[0];
    std::copy_n(sample.ids.as<const int32_t>(), length, out.ids.as<int64_t>() + start);
    std::copy_n(sample.mask.as<const uint8_t>(), length, out.mask.as<uint8_t>() + start);
    std::iota(out.positions.as<int64_t>() + start, out.positions.as<int64_t>() + start + length,
              int64_t{0});
    for (size_t f = 0; f < out.features.size(); ++f) {
      const TensorView& to = out.features[f];
      const int64_t row_bytes = to.shape[1] * static_cast<int64_t>(dtype_size(to.dtype));
      add_copy(copies, to.as<char>() + start * row_bytes, sample.features[f].as<const char>(),
               length * row_bytes);
      total_bytes += length * row_bytes;
    }
    start += length;
    cu_seqlens[k + 1] = static_cast<int32_t>(start);
  }
  const int64_t num_copies = static_cast<int64_t>(copies.size());
#pragma omp parallel for schedule(dynamic) if (num_copies > 1 && total_bytes > kParallelBytes)
  for (int64_t i = 0; i < num_copies; ++i) {
    std::memcpy(copies[i].to, copies[i].from, static_cast<size_t>(copies[i].nbytes));
  }
}

}  // namespace sf
