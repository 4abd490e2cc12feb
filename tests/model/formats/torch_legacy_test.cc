#include "absl/strings/str_cat.h"
#include "model/formats/weight_file.h"
#include "tests/model/formats/torch_files.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::BytesOf;
using ::pyramid::testing::PickledDict;
using ::pyramid::testing::PickledStorageId;
using ::pyramid::testing::PickledTensor;
using ::pyramid::testing::PickledText;
using ::pyramid::testing::PickledTuple;
using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TorchLegacy;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<WeightFile> Open(std::string bytes) {
  return OpenWeightBytes(MakeMemorySource(std::move(bytes)));
}

std::string Object(const std::string& view = "N") {
  return PickledDict(
      {{"w", PickledTensor(PickledStorageId("FloatStorage", "7", 6, view), 0, {2}, {1})},
       {"h", PickledTensor(PickledStorageId("ShortStorage", "9", 2, "N"), 1, {1}, {1})}});
}

const std::string kFloats = BytesOf<float>({1, 2, 3, 4, 5, 6});
const std::string kShorts = BytesOf<int16_t>({10, 11});

std::vector<float> Floats(const WeightFile& file, size_t tensor) {
  std::vector<float> values(static_cast<size_t>(file.tensors.at(tensor).elements()));
  EXPECT_OK(ReadTensorAsFloat(file, file.tensors[tensor], values));
  return values;
}

TEST(TorchLegacyTest, FindsStoragesInTheKeysOrder) {
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       Open(TorchLegacy(Object(), {{"9", 2, kShorts}, {"7", 6, kFloats}})));
  EXPECT_EQ(file.format, WeightFormat::kTorchLegacy);
  EXPECT_FALSE(file.has_checksum);
  EXPECT_THAT(Floats(file, 0), ElementsAre(1, 2));
  EXPECT_THAT(Floats(file, 1), ElementsAre(11));
}

TEST(TorchLegacyTest, ReadsViewsOfOldVersions) {
  const std::string view = absl::StrCat("(", PickledText("v"), "K\2K\3t");  // elements 2..4
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       Open(TorchLegacy(Object(view), {{"7", 6, kFloats}, {"9", 2, kShorts}})));
  EXPECT_THAT(Floats(file, 0), ElementsAre(3, 4));
  const std::string narrow = absl::StrCat("(", PickledText("v"), "K\2K\1t");
  EXPECT_THAT(Open(TorchLegacy(Object(narrow), {{"7", 6, kFloats}, {"9", 2, kShorts}})),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("don't lie in its 4 bytes")));
}

TEST(TorchLegacyTest, RefusesWhatContradictsItself) {
  struct Case {
    const char* what;
    std::string file;
    absl::StatusCode code;
    const char* message;
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  const auto loss = absl::StatusCode::kDataLoss;
  const std::string two_types =
      PickledDict({{"a", PickledTensor(PickledStorageId("FloatStorage", "7", 6), 0, {2}, {1})},
                   {"b", PickledTensor(PickledStorageId("IntStorage", "7", 6), 0, {2}, {1})}});
  const std::vector<Case> cases = {
      {"big-endian", TorchLegacy(Object(), {}, false), invalid, "big-endian"},
      {"protocol", TorchLegacy(Object(), {}, true, 1002), invalid, "protocol 1002"},
      {"no storage", TorchLegacy(Object(), {{"7", 6, kFloats}}), loss, "\"9\" isn't there"},
      {"unknown storage", TorchLegacy(Object(), {{"8", 6, kFloats}}), loss, "belongs to no tensor"},
      {"a storage twice", TorchLegacy(Object(), {{"9", 2, kShorts}, {"9", 2, kShorts}}), loss,
       "is there twice"},
      {"another count", TorchLegacy(Object(), {{"7", 5, kFloats}}), loss, "its count is 5"},
      {"truncated", TorchLegacy(Object(), {{"7", 6, "1234"}}), loss, "4 bytes are left"},
      {"no count", TorchLegacy(Object(), {{"9", 2, ""}, {"7", 6, ""}}), loss,
       "truncated: 8 bytes expected"},
      {"two types", TorchLegacy(two_types, {{"7", 6, kFloats}}), loss, "two types"},
  };
  for (const Case& c : cases) {
    EXPECT_THAT(Open(c.file), StatusIs(c.code, HasSubstr(c.message))) << c.what;
  }
}

}  // namespace
}  // namespace pyramid
