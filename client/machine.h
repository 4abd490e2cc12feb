// What this machine has, as far as training and serving care.
#ifndef PYRAMID_CLIENT_MACHINE_H_
#define PYRAMID_CLIENT_MACHINE_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace pyramid {

struct Machine {
  std::string processor;  // "Intel(R) Xeon(R) …"; empty: the system doesn't say
  int cores = 0;          // this process may run on
  std::vector<std::string>
      instruction_sets;      // those that kernels choose by, as /proc/cpuinfo names them
  int64_t memory_bytes = 0;  // 0: unknown
  int64_t memory_available_bytes = 0;
  std::string system;  // "Linux 6.1.0 x86_64"
};

// Reads `proc` (/proc) and asks the system.
Machine ReadMachine(const std::filesystem::path& proc = "/proc");

// The text after "key :" of the first such line in /proc/cpuinfo or /proc/meminfo; empty: none.
std::string ProcValue(absl::string_view text, absl::string_view key);

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_MACHINE_H_
