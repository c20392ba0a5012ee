#include "transport/memory.h"

#include <algorithm>
#include <fstream>
#include <optional>
#include <string>

#include "core/error.h"

namespace sf {
namespace {

// The number a file starts with; nothing if there is no such file, or it says "max".
std::optional<uint64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  uint64_t value = 0;
  if (!(file >> value)) return std::nullopt;
  return value;
}

uint64_t left_in_machine() {
  std::ifstream file("/proc/meminfo");
  std::string key;
  while (file >> key) {
    uint64_t kib = 0;
    if (key == "MemAvailable:" && file >> kib) return kib << 10;
    file.ignore(256, '\n');
  }
  throw MachineError("read /proc/meminfo", "no MemAvailable", __FILE__, __LINE__);
}

// Of a cgroup and all that enclose it. In a container the path may be seen from outside; then the
// root, which is reached in any case, is the container's own.
uint64_t left_in_cgroups(const std::string& root, std::string path, const char* limit_file,
                         const char* usage_file) {
  uint64_t left = UINT64_MAX;
  for (;;) {
    const auto limit = read_number(root + path + "/" + limit_file);
    const auto usage = read_number(root + path + "/" + usage_file);
    if (limit && usage) left = std::min(left, *limit - std::min(*limit, *usage));
    if (path.empty()) return left;
    path.erase(path.rfind('/'));
  }
}

// ":cpu,memory,": every name ends with a comma here.
bool is_memory(const std::string& controllers) {
  return controllers.find(":memory,") != std::string::npos ||
         controllers.find(",memory,") != std::string::npos;
}

}  // namespace

uint64_t available_memory() {
  uint64_t left = left_in_machine();
  // Lines are ID:CONTROLLERS:PATH, cgroups(7).
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first, second - first) + ',';
    std::string path = line.substr(second + 1);
    if (path.empty() || path[0] != '/') continue;
    if (path == "/") path.clear();
    if (controllers == ":,") {
      left =
          std::min(left, left_in_cgroups("/sys/fs/cgroup", path, "memory.max", "memory.current"));
    } else if (is_memory(controllers)) {
      left = std::min(left, left_in_cgroups("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes",
                                            "memory.usage_in_bytes"));
    }
  }
  return left;
}

}  // namespace sf
