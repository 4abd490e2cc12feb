// The device layer with a plug-in for NPUs: tests/testing/fake_npu_plugin.cc lies beside this
// program as libpyramid_npu.so.
#include <torch/torch.h>

#include "model/device.h"
#include "tests/testing/fake_npu.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::testing::EndsWith;

constexpr auto kUnavailable = absl::StatusCode::kUnavailable;

TEST(NpuDeviceTest, AskingForOneThatIsntThereListsWhatIs) {
  const testing::TempFolder folder;
  const Devices none({folder.path()});
  EXPECT_THAT(
      none.Open("npu:0"),
      StatusIs(kUnavailable, "npu:0 isn't there (libpyramid_npu.so isn't installed); usable: cpu"));
  EXPECT_THAT(
      OpenDevice("npu:2"),
      StatusIs(kUnavailable,
               "npu:2 isn't there (this machine has 2 of them); usable: cpu, npu:0, npu:1"));
  EXPECT_THAT(OpenDevice("cuda:0"),
              StatusIs(kUnavailable, EndsWith("isn't installed); usable: cpu, npu:0, npu:1")));
}

TEST(NpuDeviceTest, AnOpenOneIsLibTorchsAndCurrent) {
  for (const int index : {1, 0}) {
    ASSERT_OK_AND_ASSIGN(const DeviceName name, OpenDevice("npu:" + std::to_string(index)));
    EXPECT_EQ(name.kind, "npu");
    EXPECT_EQ(name.index, index);
    EXPECT_TRUE(torch::Device("npu:0").is_privateuseone());
    EXPECT_EQ(torch::zeros({3}, torch::Device("npu")).device().index(), index);
  }
}

TEST(NpuDeviceTest, TensorsGoThereAndBack) {
  ASSERT_OK(OpenDevice("npu:0"));
  const torch::Tensor x = torch::arange(24, torch::kFloat32).view({2, 3, 4});
  const torch::Tensor there = x.transpose(0, 2).to(torch::Device("npu:0"));
  EXPECT_TRUE(torch::equal(there.to(torch::Device("npu:1")).select(1, 1).to(torch::kHalf).cpu(),
                           x.transpose(0, 2).select(1, 1).to(torch::kHalf)));
  EXPECT_EQ(there.sum().item<float>(), 276);
}

// What makes the tests with this device worth something: host code can't use its pointers.
TEST(NpuDeviceDeathTest, ItsMemoryIsClosedToTheHost) {
  ASSERT_OK(OpenDevice("npu:0"));
  const torch::Tensor there = torch::ones({3}, torch::Device("npu:0"));
  EXPECT_DEATH(*static_cast<volatile float*>(there.mutable_data_ptr()) = 2, "");
}

}  // namespace
}  // namespace pyramid
