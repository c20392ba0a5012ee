// max, sum of exponentials and argmax of a row, in one pass and mergeable.
// Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867,
// alg. 3.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <climits>
#include <cmath>

namespace sf {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^x for x <= 0. ftz: a probability below 2^-126 is 0.
__device__ __forceinline__ float exp2_nonpositive(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// exp(x) for x <= 0. The argument is a difference of logits, exact before this call; relative error
// about 2^-22 * (1 + |x|).
__device__ __forceinline__ float exp_nonpositive(float x) { return exp2_nonpositive(x * kLog2E); }

// log2(x), x > 0 and not subnormal; absolute error about 2^-22 around 1, else 2 ulp.
__device__ __forceinline__ float log2_positive(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return log2f(x);
#endif
}

// Of x, or of x / tau: `rate` is log2(e) / tau, the same in all calls.
struct OnlineSoftmax {
  float max;   // of x; finite even for an empty row, so that max - max is 0 and not NaN
  float sum;   // sum 2^((x - max) rate)
  int argmax;  // lowest index of max; INT_MAX while nothing above -FLT_MAX was seen

  static __device__ __forceinline__ OnlineSoftmax identity() { return {-FLT_MAX, 0.0f, INT_MAX}; }

  // x[0..kCount) are the row's elements first .. first + kCount; calls come in ascending order of
  // first, which makes > keep the lowest index. NaN ends in sum.
  template <int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount], int first, float rate = kLog2E) {
    float top = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) top = fmaxf(top, x[i]);
    if (top > max) {
      int place = 0;
#pragma unroll
      for (int i = kCount - 1; i > 0; --i) place = x[i] == top ? i : place;
      argmax = first + (x[0] == top ? 0 : place);
      sum *= exp2_nonpositive((max - top) * rate);
      max = top;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += exp2_nonpositive((x[i] - max) * rate);
  }

  __device__ __forceinline__ void merge(const OnlineSoftmax& other, float rate = kLog2E) {
    const float top = fmaxf(max, other.max);
    sum = sum * exp2_nonpositive((max - top) * rate) +
          other.sum * exp2_nonpositive((other.max - top) * rate);
    const bool take_other = other.max > max || (other.max == max && other.argmax < argmax);
    argmax = take_other ? other.argmax : argmax;
    max = top;
  }

  __device__ __forceinline__ float lse() const { return max + logf(sum); }  // tau = 1
  __device__ __forceinline__ int index() const { return argmax == INT_MAX ? 0 : argmax; }
};

}  // namespace sf
