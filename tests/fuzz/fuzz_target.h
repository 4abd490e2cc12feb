// What a fuzz target is: a file <name>_fuzz.cc that defines LLVMFuzzerTestOneInput. It may refuse
// the bytes as it likes, but not crash, leak, hang, or hold more than 2x the input's size plus
// 64 MiB of heap (memory_bound.cc). tests/fuzz/run lets libFuzzer look for inputs that break this;
// replay_main.cc tries a fixed corpus in the ordinary build.
#ifndef PYRAMID_TESTS_FUZZ_FUZZ_TARGET_H_
#define PYRAMID_TESTS_FUZZ_FUZZ_TARGET_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace pyramid::fuzz {

// Ends the program, as a crash would, unless `holds`: for what must be true of accepted input.
inline void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz: not so: %s\n", what);
  std::abort();
}

}  // namespace pyramid::fuzz

#endif  // PYRAMID_TESTS_FUZZ_FUZZ_TARGET_H_
