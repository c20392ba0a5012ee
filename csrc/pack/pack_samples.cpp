#include "pack/pack_samples.h"

#include <limits>
#include <string>

#include "core/backends.h"
#include "core/check.h"

namespace sf {
namespace {

constexpr const char* kOp = "pack_samples";

std::string of_sample(const std::string& what, size_t k) {
  return what + " of sample " + std::to_string(k);
}

// A source lies where the outputs do, or, for outputs on CUDA, on the host.
Expect source(const std::string& name, const TensorView& view, Device device) {
  const bool from_host = device.type == DeviceType::kCUDA && view.device.type == DeviceType::kCPU;
  Expect expected = expect(kOp, name, view);
  expected.contiguous().device(from_host ? view.device : device);
  return expected;
}

void check_feature(const PackSource& sample, size_t k, size_t f, const TensorView& out, Dim& length,
                   Dim& width) {
  const std::string name = of_sample("feature " + std::to_string(f), k);
  const PackFeature feature = feature_of(sample, f);
  if (feature.scales == nullptr) {
    source(name, feature.data, out.device).dtype({out.dtype}).shape({&length, &width});
    return;
  }
  const bool half = out.dtype == kF16 && out.device.type == DeviceType::kCPU;
  if (out.dtype != kF32 && out.dtype != kBF16 && !half) {
    fail_argument(kOp,
                  "packed feature " + std::to_string(f) +
                      " must be f32, bf16 or, on the CPU, f16 to be decoded",
                  dtype_name(out.dtype));
  }
  source(name, feature.data, out.device).dtype({kU8}).shape({&length, &width});
  Dim groups{"groups"};
  source("scales of " + name, *feature.scales, out.device).dtype({kF32}).shape({&length, &groups});
  if (groups < 1 || width % groups != 0) {
    fail_argument(kOp, "groups of " + name + " must divide its width " + std::to_string(width),
                  std::to_string(groups));
  }
}

void check_sample(const PackSource& sample, size_t k, const PackedViews& out, Dim& length,
                  std::vector<Dim>& widths) {
  const Device device = out.ids.device;
  source(of_sample("ids", k), sample.ids, device).dtype({kI32}).shape({&length});
  source(of_sample("mask", k), sample.mask, device).dtype({kU8}).shape({&length});
  require(sample.features.size() == out.features.size(), kOp,
          "every sample must have as many features as the output",
          static_cast<int64_t>(sample.features.size()));
  require(sample.scales.empty() || sample.scales.size() == out.features.size(), kOp,
          "every sample must have as many scales as features, or none",
          static_cast<int64_t>(sample.scales.size()));
  for (size_t f = 0; f < sample.features.size(); ++f) {
    check_feature(sample, k, f, out.features[f], length, widths[f]);
  }
}

void check(const std::vector<PackSource>& samples, const PackedViews& out) {
  int64_t total = 0;
  std::vector<Dim> widths(out.features.size(), Dim{"width"});
  for (size_t k = 0; k < samples.size(); ++k) {
    Dim length{"S"};
    check_sample(samples[k], k, out, length, widths);
    total += length;
  }
  require(total <= std::numeric_limits<int32_t>::max(), kOp, "T must be below 2^31", total);
  Dim T{"T", total}, bounds{"N+1", static_cast<int64_t>(samples.size()) + 1};
  const auto packed = [&](const std::string& name, const TensorView& view) {
    return expect(kOp, name, view).contiguous().device(out.ids.device);
  };
  packed("packed ids", out.ids).dtype({kI64}).shape({&T});
  packed("packed mask", out.mask).dtype({kU8}).shape({&T});
  packed("positions", out.positions).dtype({kI64}).shape({&T});
  packed("cu_seqlens", out.cu_seqlens).dtype({kI32}).shape({&bounds});
  for (size_t f = 0; f < out.features.size(); ++f) {
    packed("packed feature " + std::to_string(f), out.features[f]).shape({&T, &widths[f]});
  }
}

}  // namespace

void pack_samples(const std::vector<PackSource>& samples, const PackedViews& out, Stream stream) {
  check(samples, out);
  backend(kOp, out.ids.device, &cpu::pack_samples, SF_CUDA_FN(cuda::pack_samples))(samples, out,
                                                                                   stream);
}

}  // namespace sf
