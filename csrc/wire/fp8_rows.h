// The wire encoding fp8_e4m3_row: one f32 scale per row, e4m3fn codes (OCP 8-bit floating point
// specification 1.0), and one crc32c over all of it.
//
//   amax[n]  = max_i |x[n, i]|
//   scale[n] = max(amax[n], 448 * 2^-126) / 448        1 where amax is 0
//   inv[n]   = 1 / scale[n]
//   q[n, i]  = e4m3(x[n, i] * inv[n])
//   y[n, i]  = T(f32(q[n, i]) * scale[n])
//
// All arithmetic in f32, each operation rounded to nearest even; e4m3 rounds to nearest even and
// saturates at 448. The floor keeps 1 / scale finite where amax is subnormal. A row that holds a
// NaN or an infinity gets scale NaN and codes 0x7f (NaN), and is counted.
// The checksum covers the payload's bytes, then those of the scales (little endian).
//
//   x, y     [rows, width]  f32 | bf16 | f16
//   payload  [rows, width]  u8
//   scale    [rows]         f32
//   row_crc  [rows]         i32   workspace of CUDA; the CPU leaves it alone
//   summary  [2]            i64   the checksum (0 unless asked for), rows that are not finite
//
// All contiguous, on one device. Deterministic, whatever the number of threads. Reads each input
// byte from memory once (CUDA reads x a second time, from L1 or L2).
#pragma once

#include "core/tensor_view.h"

namespace sf {

struct Fp8Pack {
  TensorView x, payload, scale, row_crc, summary;
  bool checksum = true;
};
void fp8_pack(const Fp8Pack& args, Stream stream = {});

// Writes y whether or not the checksum that it finds is the one that was sent: compare first.
// summary[1]: rows whose scale is NaN.
struct Fp8Unpack {
  TensorView payload, scale, y, row_crc, summary;
  bool checksum = true;
};
void fp8_unpack(const Fp8Unpack& args, Stream stream = {});

// q[i] = e4m3(x[i]), for every f32: infinities give +-448, NaN 0x7f with its sign. Both [n], on the
// CPU.
void fp8_encode(const TensorView& x, const TensorView& q);

namespace cpu {
// As fp8_unpack without its checksum, by the calling thread: for kernels that decode on their way.
// dtype: kF32 | kBF16 | kF16, of y.
void fp8_decode_rows(const uint8_t* codes, const float* scale, int64_t rows, int64_t width,
                     DType dtype, void* y);

void fp8_pack(const Fp8Pack& args, Stream);
void fp8_unpack(const Fp8Unpack& args, Stream);
}  // namespace cpu
namespace cuda {
void fp8_pack(const Fp8Pack& args, Stream stream);
void fp8_unpack(const Fp8Unpack& args, Stream stream);
}  // namespace cuda

}  // namespace sf
