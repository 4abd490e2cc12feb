#include "model/device.h"

#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TempFolder;
using ::testing::AllOf;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr auto kUnavailable = absl::StatusCode::kUnavailable;

// A folder with the fake plug-in `fake` (tests/model/CMakeLists.txt) in the place of `kind`'s.
std::filesystem::path Install(const TempFolder& folder, absl::string_view kind,
                              absl::string_view fake) {
  std::filesystem::copy_file(absl::StrCat(PYRAMID_FAKE_PLUGINS, "/lib", fake, ".so"),
                             folder / absl::StrCat("libpyramid_", kind, ".so"));
  return folder.path();
}

TEST(ParseDeviceTest, ReadsKindAndIndex) {
  for (const auto& [text, kind, index] : {std::tuple("cpu", "cpu", 0),
                                          {"cuda", "cuda", 0},
                                          {"cuda:3", "cuda", 3},
                                          {"npu:0", "npu", 0}}) {
    ASSERT_OK_AND_ASSIGN(const DeviceName name, ParseDevice(text));
    EXPECT_EQ(name.kind, kind);
    EXPECT_EQ(name.index, index);
  }
}

TEST(ParseDeviceTest, RefusesAnythingElse) {
  for (const char* text : {"", "gpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda: 1", "cuda:1x",
                           "cuda1", "cuda:99999999999", "npus"}) {
    EXPECT_THAT(ParseDevice(text),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr(absl::StrCat("\"", text, "\"")),
                               HasSubstr("use cpu, cuda, cuda:N, npu or npu:N"))));
    EXPECT_THAT(OpenDevice(text),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("device")));
  }
}

TEST(DevicesTest, TheCpuIsAlwaysThere) {
  ASSERT_OK_AND_ASSIGN(const DeviceName name, OpenDevice("cpu"));
  EXPECT_EQ(name.kind, "cpu");
  EXPECT_EQ(ProbeDevices().at(0).kind, "cpu");
  EXPECT_EQ(ProbeDevices().at(0).count, 1);
  EXPECT_THAT(DescribeDevices(), StartsWith("cpu ("));
}

TEST(DevicesTest, AMissingPluginIsSaidPlainly) {
  const TempFolder folder;
  const Devices devices({folder.path()});
  EXPECT_THAT(
      devices.Open("npu:1"),
      StatusIs(kUnavailable, "npu:1 isn't there (libpyramid_npu.so isn't installed); usable: cpu"));
  EXPECT_THAT(devices.Open("cuda"),
              StatusIs(kUnavailable,
                       "cuda:0 isn't there (libpyramid_cuda.so isn't installed); usable: cpu"));
  EXPECT_THAT(devices.Describe(), HasSubstr("cuda: none (libpyramid_cuda.so isn't installed)"));
}

TEST(DevicesTest, ThisBuildHasNoNpuPlugin) {
  EXPECT_THAT(OpenDevice("npu"),
              StatusIs(kUnavailable, HasSubstr("libpyramid_npu.so isn't installed")));
}

TEST(DevicesTest, OpensThePluginsDevices) {
  const TempFolder empty, folder;
  const Devices devices({empty.path(), Install(folder, "npu", "fake_two_devices")});
  ASSERT_OK_AND_ASSIGN(const DeviceName name, devices.Open("npu"));
  EXPECT_EQ(name.kind, "npu");
  EXPECT_EQ(name.index, 0);
  EXPECT_EQ(devices.kinds().at(2).count, 2);
  EXPECT_THAT(devices.Describe(), EndsWith("npu: 2"));
}

TEST(DevicesTest, SaysHowManyThereAreForAnIndexTooLarge) {
  const TempFolder folder;
  const Devices devices({Install(folder, "npu", "fake_two_devices")});
  EXPECT_THAT(
      devices.Open("npu:2"),
      StatusIs(kUnavailable,
               "npu:2 isn't there (this machine has 2 of them); usable: cpu, npu:0, npu:1"));
}

TEST(DevicesTest, ADeviceThatCantBeOpenedIsNotNamedAsUsable) {
  const TempFolder folder;
  const Devices devices({Install(folder, "npu", "fake_two_devices")});
  EXPECT_THAT(
      devices.Open("npu:1"),
      StatusIs(kUnavailable,
               "npu:1 isn't there (device 1 is held by another process); usable: cpu, npu:0"));
}

TEST(DevicesTest, PassesThePluginsReasonOn) {
  const TempFolder folder;
  const Devices devices({Install(folder, "cuda", "fake_no_driver")});
  EXPECT_EQ(devices.kinds().at(1).count, 0);
  EXPECT_THAT(
      devices.Open("cuda:0"),
      StatusIs(kUnavailable, "cuda:0 isn't there (libpyramid_cuda.so: no driver); usable: cpu"));
}

TEST(DevicesTest, RefusesAPluginOfAnotherInterface) {
  const TempFolder folder;
  const Devices devices({Install(folder, "cuda", "fake_other_abi")});
  EXPECT_THAT(devices.Open("cuda"),
              StatusIs(kUnavailable, HasSubstr("has plug-in interface 99, this program needs 1")));
}

TEST(DevicesTest, RefusesALibraryThatIsNoPlugin) {
  const TempFolder folder;
  const Devices devices({Install(folder, "cuda", "fake_no_symbols")});
  EXPECT_THAT(devices.Open("cuda"), StatusIs(kUnavailable, HasSubstr("isn't a device plug-in")));
}

TEST(DevicesTest, NamesAPluginThatCantBeLoaded) {
  const TempFolder folder;
  std::ofstream(folder / "libpyramid_cuda.so") << "not a library";
  const Devices devices({folder.path()});
  EXPECT_THAT(devices.Open("cuda"), StatusIs(kUnavailable, HasSubstr("(libpyramid_cuda.so: ")));
}

TEST(DevicesTest, RecordedWorkRunsAgainAtEachReplay) {
  const TempFolder folder;
  const Devices devices({Install(folder, "cuda", "fake_records")});
  int runs = 0;
  const std::function<void()> work = [&runs] { ++runs; };
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RecordedWork> recorded,
                       devices.Record({"cuda", 0}, work));
  const int recording = runs;
  EXPECT_OK(recorded->Replay());
  EXPECT_OK(recorded->Replay());
  EXPECT_EQ(runs, recording + 2);
}

TEST(DevicesTest, AReplayThatFailsSaysWhy) {
  const TempFolder folder;
  const Devices devices({Install(folder, "cuda", "fake_replay_fails")});
  const std::function<void()> work = [] {};
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RecordedWork> recorded,
                       devices.Record({"cuda", 0}, work));
  EXPECT_THAT(recorded->Replay(), StatusIs(absl::StatusCode::kInternal, "out of memory"));
}

TEST(DevicesTest, ADeviceThatRecordsNothingSaysSo) {
  const TempFolder folder;
  const Devices devices({Install(folder, "cuda", "fake_two_devices")});
  const auto unimplemented = absl::StatusCode::kUnimplemented;
  EXPECT_THAT(devices.Record({"cuda", 0}, [] {}), StatusIs(unimplemented, "cuda records no work"));
  EXPECT_THAT(RecordWork({"cpu", 0}, [] {}), StatusIs(unimplemented, "cpu records no work"));
}

}  // namespace
}  // namespace pyramid
