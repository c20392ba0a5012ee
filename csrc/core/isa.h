// Which instruction set the CPU kernels use. The library holds every path; the CPU decides at run
// time.
#pragma once

#include <string>
#include <vector>

namespace sf {

enum class Isa { kPlain, kAvx2, kAvx512 };

const char* isa_name(Isa isa);      // "plain", "avx2", "avx512"
std::vector<Isa> available_isas();  // what this CPU can run, slowest first
Isa isa();                          // the fastest, unless set_isa chose another
void set_isa(
    const std::string& name);  // for tests; "auto" is the fastest. ArgumentError if unavailable

// True if the CPU multiplies bf16 itself (AVX512_BF16, AMX) rather than by way of f32, and isa() is
// what it does it with.
bool has_fast_bf16();

}  // namespace sf
