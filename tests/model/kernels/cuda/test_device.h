// Where ops_test.cc runs: emulated_ops.cc answers for the CPU, card_test.cc for a card.
#ifndef PYRAMID_TESTS_MODEL_KERNELS_CUDA_TEST_DEVICE_H_
#define PYRAMID_TESTS_MODEL_KERNELS_CUDA_TEST_DEVICE_H_

#include <torch/torch.h>

namespace pyramid {

// Opened; its operators are registered.
torch::Device TestDevice();

}  // namespace pyramid

#endif  // PYRAMID_TESTS_MODEL_KERNELS_CUDA_TEST_DEVICE_H_
