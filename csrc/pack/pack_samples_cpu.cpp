#include <algorithm>
#include <cstring>
#include <numeric>

#include "pack/pack_samples.h"
#include "wire/fp8_rows.h"

namespace sf::cpu {
namespace {

// Below this many bytes a second thread costs more than it saves.
constexpr int64_t kParallelBytes = 256 * 1024;
// What a thread writes at a time.
constexpr int64_t kPieceBytes = 1 << 20;

// A run of bytes to copy, or rows to decode.
struct Piece {
  char* to;
  const char* from;
  int64_t nbytes;       // of the output
  const float* scales;  // nullptr: copy
  int64_t group_width;
  DType dtype;
};

void run(const Piece& piece) {
  if (piece.scales == nullptr) {
    std::memcpy(piece.to, piece.from, static_cast<size_t>(piece.nbytes));
    return;
  }
  const int64_t runs =
      piece.nbytes / static_cast<int64_t>(dtype_size(piece.dtype)) / piece.group_width;
  fp8_decode_rows(reinterpret_cast<const uint8_t*>(piece.from), piece.scales, runs,
                  piece.group_width, piece.dtype, piece.to);
}

void add_copy(std::vector<Piece>& pieces, char* to, const char* from, int64_t nbytes) {
  for (int64_t at = 0; at < nbytes; at += kPieceBytes) {
    pieces.push_back({to + at, from + at, std::min(kPieceBytes, nbytes - at), nullptr, 0, kU8});
  }
}

void add_decode(std::vector<Piece>& pieces, char* to, const PackFeature& feature, DType dtype) {
  const int64_t rows = feature.data.shape[0], width = feature.data.shape[1];
  const int64_t groups = feature.scales->shape[1];
  const int64_t row_bytes = width * static_cast<int64_t>(dtype_size(dtype));
  if (row_bytes == 0) return;
  const int64_t piece_rows = std::max<int64_t>(1, kPieceBytes / row_bytes);
  for (int64_t row = 0; row < rows; row += piece_rows) {
    const int64_t nbytes = std::min(piece_rows, rows - row) * row_bytes;
    pieces.push_back({to + row * row_bytes, feature.data.as<const char>() + row * width, nbytes,
                      feature.scales->as<const float>() + row * groups, width / groups, dtype});
  }
}

}  // namespace

void pack_samples(const std::vector<PackSource>& samples, const PackedViews& out, Stream) {
  std::vector<Piece> pieces;
  int64_t start = 0;
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
      const TensorView& packed = out.features[f];
      const int64_t row_bytes = packed.shape[1] * static_cast<int64_t>(dtype_size(packed.dtype));
      char* to = packed.as<char>() + start * row_bytes;
      const PackFeature feature = feature_of(sample, f);
      if (feature.scales == nullptr) {
        add_copy(pieces, to, feature.data.as<const char>(), length * row_bytes);
      } else {
        add_decode(pieces, to, feature, packed.dtype);
      }
    }
    start += length;
    cu_seqlens[k + 1] = static_cast<int32_t>(start);
  }
  const int64_t num_pieces = static_cast<int64_t>(pieces.size());
  const int64_t total_bytes =
      std::accumulate(pieces.begin(), pieces.end(), int64_t{0},
                      [](int64_t sum, const Piece& piece) { return sum + piece.nbytes; });
#pragma omp parallel for schedule(dynamic) if (num_pieces > 1 && total_bytes > kParallelBytes)
  for (int64_t i = 0; i < num_pieces; ++i) run(pieces[i]);
}

}  // namespace sf::cpu
