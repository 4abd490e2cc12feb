// libpyramid_cuda.so: the CUDA plug-in. Linking libtorch_cuda registers LibTorch's CUDA operators
// when the plug-in is loaded; the fused ones of kernels/cuda come along.
#include <ATen/Context.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <cstdio>
#include <exception>
#include <memory>

#include "model/device_plugin.h"
#include "model/kernels/cuda/torch_ops.h"

namespace pyramid::kernels::cuda {

void* CurrentStream(const at::Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
}

const char* ErrorText(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace pyramid::kernels::cuda

TORCH_LIBRARY(pyramid, m) { pyramid::kernels::cuda::DefineOps(m); }
TORCH_LIBRARY_IMPL(pyramid, CUDA, m) { pyramid::kernels::cuda::ImplementOps(m); }
TORCH_LIBRARY_IMPL(pyramid, AutogradCUDA, m) { pyramid::kernels::cuda::ImplementGradients(m); }

namespace {

int Fail(const char* what, const char* why, char* error, int error_size) {
  if (error_size > 0) std::snprintf(error, static_cast<size_t>(error_size), "%s: %s", what, why);
  return 1;
}

// Before a recording: libraries choose algorithms and take their workspaces.
constexpr int kWarmUps = 3;

std::unique_ptr<at::cuda::CUDAGraph> Record(void (*forward)(void*), void* context) {
  // The default stream can't be recorded.
  c10::cuda::device_synchronize();
  const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();
  const c10::cuda::CUDAStreamGuard guard(stream);
  for (int i = 0; i < kWarmUps; ++i) forward(context);
  stream.synchronize();
  auto graph = std::make_unique<at::cuda::CUDAGraph>();
  // Other threads go on using the device meanwhile.
  graph->capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
  try {
    forward(context);
  } catch (...) {
    try {
      graph->capture_end();
    } catch (const std::exception&) {
      // A broken recording says so again; the first reason counts.
    }
    throw;
  }
  graph->capture_end();
  return graph;
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

int pyramid_device_record(void (*forward)(void* context), void* context, void** recorded,
                          char* error, int error_size) {
  try {
    *recorded = Record(forward, context).release();
    return 0;
  } catch (const std::exception& e) {
    return Fail("recording", e.what(), error, error_size);
  }
}

int pyramid_device_replay(void* recorded, char* error, int error_size) {
  try {
    static_cast<at::cuda::CUDAGraph*>(recorded)->replay();
    return 0;
  } catch (const std::exception& e) {
    return Fail("replaying", e.what(), error, error_size);
  }
}

void pyramid_device_forget(void* recorded) { delete static_cast<at::cuda::CUDAGraph*>(recorded); }

}  // extern "C"
