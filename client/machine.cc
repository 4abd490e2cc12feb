#include "client/machine.h"

#include <sched.h>
#include <sys/utsname.h>

#include <algorithm>
#include <thread>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "proto/base/file.h"

namespace pyramid {
namespace {

constexpr absl::string_view kInstructionSets[] = {
    "sse4_2",   "avx",         "f16c",        "fma",         "avx2",     "avx512f",  "avx512bw",
    "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd",    "asimdhp",     "asimddp",     "sve",         "sve2",     "bf16",     "i8mm"};

int Cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

int64_t Kilobytes(absl::string_view text) {
  int64_t kilobytes = 0;
  const std::vector<absl::string_view> words = absl::StrSplit(text, ' ', absl::SkipEmpty());
  if (words.empty() || !absl::SimpleAtoi(words[0], &kilobytes)) return 0;
  return kilobytes * 1024;
}

}  // namespace

std::string ProcValue(absl::string_view text, absl::string_view key) {
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    const size_t colon = line.find(':');
    if (colon == absl::string_view::npos) continue;
    if (absl::StripAsciiWhitespace(line.substr(0, colon)) != key) continue;
    return std::string(absl::StripAsciiWhitespace(line.substr(colon + 1)));
  }
  return "";
}

Machine ReadMachine(const std::filesystem::path& proc) {
  Machine machine;
  machine.cores = Cores();
  const std::string cpus = ReadFile(proc / "cpuinfo").value_or("");
  machine.processor = ProcValue(cpus, "model name");
  std::string flags = ProcValue(cpus, "flags");
  if (flags.empty()) flags = ProcValue(cpus, "Features");  // Arm
  const std::vector<absl::string_view> words = absl::StrSplit(flags, ' ', absl::SkipEmpty());
  for (const absl::string_view name : kInstructionSets) {
    if (std::find(words.begin(), words.end(), name) != words.end()) {
      machine.instruction_sets.emplace_back(name);
    }
  }
  const std::string memory = ReadFile(proc / "meminfo").value_or("");
  machine.memory_bytes = Kilobytes(ProcValue(memory, "MemTotal"));
  machine.memory_available_bytes = Kilobytes(ProcValue(memory, "MemAvailable"));
  utsname name{};
  if (uname(&name) == 0) {
    machine.system = absl::StrCat(name.sysname, " ", name.release, " ", name.machine);
  }
  return machine;
}

}  // namespace pyramid
