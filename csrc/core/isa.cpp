#include "core/isa.h"

#include <atomic>

#include "core/error.h"

namespace sf {
namespace {

constexpr int kAuto = -1;
std::atomic<int> chosen{kAuto};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kPlain:
      break;
  }
  return "plain";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> out{Isa::kPlain};
  if (has_avx2()) out.push_back(Isa::kAvx2);
  if (has_avx512()) out.push_back(Isa::kAvx512);
  return out;
}

Isa isa() {
  static const Isa best = available_isas().back();
  const int choice = chosen.load(std::memory_order_relaxed);
  return choice == kAuto ? best : static_cast<Isa>(choice);
}

void set_isa(const std::string& name) {
  if (name == "auto") {
    chosen = kAuto;
    return;
  }
  std::string known = "auto";
  for (Isa candidate : available_isas()) {
    if (name == isa_name(candidate)) {
      chosen = static_cast<int>(candidate);
      return;
    }
    known += std::string(", ") + isa_name(candidate);
  }
  throw ArgumentError("set_isa: wanted one of " + known + " on this CPU, got " + name);
}

bool has_fast_bf16() {
#if defined(__x86_64__)
  return isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace sf
