#pragma once

#include <string>

namespace sf::emu {

// Runs one kernel of planted_bugs.cu on out [64] f32. Throws what the launch throws.
void run_planted(const std::string& name, float* out);

}  // namespace sf::emu
