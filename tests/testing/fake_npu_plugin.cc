// libpyramid_npu.so for tests: a device plug-in (model/device_plugin.h) whose devices are the fake
// ones.
#include <cstdio>

#include "model/device_plugin.h"
#include "tests/testing/fake_npu.h"

using pyramid::testing::kFakeNpus;

namespace {
[[maybe_unused]] const bool registered = (pyramid::testing::RegisterFakeNpu(), true);
}  // namespace

extern "C" {

int pyramid_device_abi_version(void) { return PYRAMID_DEVICE_ABI_VERSION; }

int pyramid_device_probe(int* count, char* /*error*/, int /*error_size*/) {
  *count = kFakeNpus;
  return 0;
}

int pyramid_device_open(int index, char* error, int error_size) {
  if (index >= 0 && index < kFakeNpus) {
    pyramid::testing::SetCurrentFakeNpu(index);
    return 0;
  }
  std::snprintf(error, static_cast<size_t>(error_size), "there is no device %d", index);
  return 1;
}

}  // extern "C"
