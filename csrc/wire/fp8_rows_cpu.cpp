#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "core/check.h"
#include "core/crc32c.h"
#include "core/isa.h"
#include "wire/fp8_rows.h"
#include "wire/fp8_rows_cpu_impl.h"

namespace sf::cpu {

const Fp8Kernels kFp8Plain = kKernels;

namespace {

constexpr int64_t kBytesPerThread = 256 << 10;       // below it, waking a thread costs more
constexpr int64_t kStreamBytes = int64_t{48} << 20;  // docs/kernels.md
constexpr int kMaxParts = 64;

const Fp8Kernels& kernels() {
  switch (isa()) {
    case Isa::kAvx512:
      return kFp8Avx512;
    case Isa::kAvx2:
      return kFp8Avx2;
    case Isa::kPlain:
      break;
  }
  return kFp8Plain;
}

// What one thread found in its rows.
struct Part {
  uint32_t crc = 0;
  int64_t rows_not_finite = 0;
};

// Calls each(first, last) -> Part for ranges of rows, and joins what they found in order.
template <class F>
Part over_rows(int64_t rows, int64_t width, const F& each) {
  const int64_t wanted = std::max<int64_t>(1, rows * width / kBytesPerThread);
  const int parts = static_cast<int>(std::min<int64_t>(
      {wanted, std::max<int64_t>(rows, 1), int64_t{omp_get_max_threads()}, int64_t{kMaxParts}}));
  std::array<Part, kMaxParts> found;
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
  for (int k = 0; k < parts; ++k) found[k] = each(rows * k / parts, rows * (k + 1) / parts);
  Part all = found[0];
  for (int k = 1; k < parts; ++k) {
    const int64_t size = rows * (k + 1) / parts - rows * k / parts;
    all.crc = crc32c_combine(all.crc, found[k].crc, static_cast<uint64_t>(size * width));
    all.rows_not_finite += found[k].rows_not_finite;
  }
  return all;
}

void write_summary(const Part& part, const TensorView& scale, bool checksum,
                   const TensorView& summary) {
  auto* out = summary.as<int64_t>();
  out[0] = checksum ? crc32c(scale.data, static_cast<size_t>(scale.nbytes()), part.crc) : 0;
  out[1] = part.rows_not_finite;
}

template <class T>
void pack(const Fp8RowKernels<T>& kernel, const Fp8Pack& args) {
  const int64_t rows = args.x.shape[0], width = args.x.shape[1];
  const T* x = args.x.as<const T>();
  auto* payload = args.payload.as<uint8_t>();
  auto* scale = args.scale.as<float>();
  const bool streams = rows * width >= kStreamBytes;
  const Crc32cPath& path = crc32c_paths().back();
  const auto each = [&](int64_t first, int64_t last) {
    Part part;
    std::vector<uint8_t> row_codes(streams ? static_cast<size_t>(width) : 0);
    for (int64_t n = first; n < last; ++n) {
      uint8_t* codes = payload + n * width;
      const auto size = static_cast<size_t>(width);
      scale[n] = kernel.pack(x + n * width, width, streams ? row_codes.data() : codes);
      part.rows_not_finite += std::isnan(scale[n]);
      // The row's codes are in L1 now, whichever way they leave it.
      if (streams) {
        part.crc = ~path.copy(~part.crc, codes, row_codes.data(), size, true);
      } else if (args.checksum) {
        part.crc = crc32c(codes, size, part.crc);
      }
    }
    return part;
  };
  write_summary(over_rows(rows, width, each), args.scale, args.checksum, args.summary);
}

template <class T>
void unpack(const Fp8RowKernels<T>& kernel, const Fp8Unpack& args) {
  const int64_t rows = args.y.shape[0], width = args.y.shape[1];
  T* y = args.y.as<T>();
  const auto* payload = args.payload.as<const uint8_t>();
  const auto* scale = args.scale.as<const float>();
  const bool streams = args.y.nbytes() >= kStreamBytes;
  const auto each = [&](int64_t first, int64_t last) {
    Part part;
    for (int64_t n = first; n < last; ++n) {
      const uint8_t* codes = payload + n * width;
      if (args.checksum) part.crc = crc32c(codes, static_cast<size_t>(width), part.crc);
      kernel.unpack(codes, width, scale[n], y + n * width, streams);
      part.rows_not_finite += std::isnan(scale[n]);
    }
    return part;
  };
  write_summary(over_rows(rows, width, each), args.scale, args.checksum, args.summary);
}

template <class T>
void decode_rows(const Fp8RowKernels<T>& kernel, const uint8_t* codes, const float* scale,
                 int64_t rows, int64_t width, void* y) {
  auto* to = static_cast<T*>(y);
  for (int64_t n = 0; n < rows; ++n) {
    kernel.unpack(codes + n * width, width, scale[n], to + n * width, false);
  }
}

}  // namespace

void fp8_decode_rows(const uint8_t* codes, const float* scale, int64_t rows, int64_t width,
                     DType dtype, void* y) {
  if (dtype == kBF16) return decode_rows(kernels().b16, codes, scale, rows, width, y);
  if (dtype == kF16) return decode_rows(kernels().h16, codes, scale, rows, width, y);
  decode_rows(kernels().f32, codes, scale, rows, width, y);
}

void fp8_pack(const Fp8Pack& args, Stream) {
  switch (args.x.dtype) {
    case kBF16:
      return pack(kernels().b16, args);
    case kF16:
      return pack(kernels().h16, args);
    default:
      return pack(kernels().f32, args);
  }
}

void fp8_unpack(const Fp8Unpack& args, Stream) {
  switch (args.y.dtype) {
    case kBF16:
      return unpack(kernels().b16, args);
    case kF16:
      return unpack(kernels().h16, args);
    default:
      return unpack(kernels().f32, args);
  }
}

}  // namespace sf::cpu

namespace sf {

void fp8_encode(const TensorView& x, const TensorView& q) {
  Dim n{"n"};
  expect("fp8_encode", "x", x).dtype({kF32}).shape({&n}).contiguous().device({});
  expect("fp8_encode", "q", q).dtype({kU8}).shape({&n}).contiguous().device({});
  cpu::kernels().encode(x.as<const float>(), n, q.as<uint8_t>());
}

}  // namespace sf
