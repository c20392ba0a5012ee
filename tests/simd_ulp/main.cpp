// The worst errors of core/simd.h's exp and log against libm in double, in the instruction set that
// this file is compiled for. Prints three lines: exp at tau = 1, exp at other temperatures, log.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>

#include "core/simd.h"

namespace {

constexpr double kUlp = 1.0 / (1 << 23);
constexpr float kFarthest = -87.2f;  // beyond -87.3 the result is 0

// In units of 2^-23 of the result, less `slope` |d / tau|, which is the error of rounding the
// constants.
double exp_error(double tau, double slope) {
  const sf::Exp exp(tau);
  double worst = 0;
  for (float x = 0; x > kFarthest; x -= 1.37e-4f) {
    const float d = static_cast<float>(x * tau);
    float lanes[sf::Vec::kWidth];
    sf::store(lanes, exp(sf::set1(d)));
    const double truth = std::exp(d / tau);
    const double error = std::abs(lanes[0] - truth) / truth - slope * std::abs(d / tau);
    worst = std::max(worst, error / kUlp);
  }
  return worst;
}

double log_error() {
  double worst = 0;
  const uint32_t last = std::bit_cast<uint32_t>(1.0f);
  // All exponents, and every float from 0.99 to 1.
  const uint32_t near_one = std::bit_cast<uint32_t>(0.99f);
  for (uint32_t bits = std::bit_cast<uint32_t>(std::numeric_limits<float>::min()); bits < last;
       bits += bits < near_one ? 1009 : 1) {
    const float x = std::bit_cast<float>(bits);
    float lanes[sf::Vec::kWidth];
    sf::store(lanes, sf::log_positive(sf::set1(x)));
    const double truth = std::log(static_cast<double>(x));
    worst = std::max(worst, std::abs((lanes[0] - truth) / truth) / kUlp);
  }
  return worst;
}

bool zero_far_out() {
  for (float d : {-87.4f, -1e4f, -1e30f, -std::numeric_limits<float>::infinity()}) {
    float lanes[sf::Vec::kWidth];
    sf::store(lanes, sf::exp_nonpositive(sf::set1(d)));
    if (lanes[0] != 0) return false;
  }
  return true;
}

}  // namespace

int main() {
  std::printf("%.3f\n", exp_error(1, 2.7e-9));
  std::printf("%.3f\n", std::max(exp_error(0.3, 6e-8), exp_error(1.7, 6e-8)));
  std::printf("%.3f\n", log_error());
  return zero_far_out() ? 0 : 1;
}
