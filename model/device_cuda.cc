// libpyramid_cuda.so: the CUDA plug-in. Linking libtorch_cuda registers LibTorch's CUDA operators
// when the plug-in is loaded.
#include <ATen/Context.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <exception>

#include "model/device_plugin.h"

namespace {

int Fail(const char* what, const char* why, char* error, int error_size) {
  if (error_size > 0) std::snprintf(error, static_cast<size_t>(error_size), "%s: %s", what, why);
  return 1;
}

}  // namespace

extern "C" {

int pyramid_device_abi_version(void) { return PYRAMID_DEVICE_ABI_VERSION; }

int pyramid_device_probe(int* count, char* error, int error_size) {
  *count = 0;
  const cudaError_t status = cudaGetDeviceCount(count);
  if (status == cudaSuccess) return 0;
  *count = 0;
  return Fail("cudaGetDeviceCount", cudaGetErrorString(status), error, error_size);
}

int pyramid_device_open(int index, char* error, int error_size) {
  try {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(index));
    return 0;
  } catch (const std::exception& e) {
    return Fail("opening the device", e.what(), error, error_size);
  }
}

}  // extern "C"
