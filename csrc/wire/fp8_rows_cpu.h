// The part of fp8_rows that exists once per instruction set. Internal.
#pragma once

#include <cstdint>

#include "wire/fp8_convert.h"

namespace sf::cpu {

template <class T>
struct Fp8RowKernels {
  float (*pack)(const T* x, int64_t width, uint8_t* codes);  // the row's scale
  // streams: past the caches, where y allows it
  void (*unpack)(const uint8_t* codes, int64_t width, float scale, T* y, bool streams);
};

struct Fp8Kernels {
  Fp8RowKernels<float> f32;
  Fp8RowKernels<bf16> b16;
  Fp8RowKernels<fp8::f16> h16;
  void (*encode)(const float* x, int64_t n, uint8_t* codes);
};

extern const Fp8Kernels kFp8Plain, kFp8Avx2, kFp8Avx512;

}  // namespace sf::cpu
