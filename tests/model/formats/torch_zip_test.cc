#include "absl/strings/str_cat.h"
#include "model/formats/weight_file.h"
#include "tests/model/formats/torch_files.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::PickledDict;
using ::pyramid::testing::PickledStorageId;
using ::pyramid::testing::PickledTensor;
using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TorchZip;
using ::pyramid::testing::WholePickle;
using ::pyramid::testing::ZipEntry;
using ::pyramid::testing::ZipFile;
using ::testing::_;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

absl::StatusOr<WeightFile> Open(std::string bytes) {
  return OpenWeightBytes(MakeMemorySource(std::move(bytes)));
}

// {"w": a tensor of 3 floats}.
std::string Body(int64_t elements = 3) {
  return PickledDict(
      {{"w", PickledTensor(PickledStorageId("FloatStorage", "0", elements), 0, {3}, {1})}});
}

ZipEntry Data() { return {"data/0", testing::BytesOf<float>({1, 2, 3})}; }

absl::StatusOr<std::vector<float>> ReadFirst(const std::string& bytes) {
  ASSIGN_OR_RETURN(const WeightFile file, Open(bytes));
  std::vector<float> values(static_cast<size_t>(file.tensors.at(0).elements()));
  RETURN_IF_ERROR(ReadTensorAsFloat(file, file.tensors[0], values));
  return values;
}

TEST(TorchZipTest, ReadsZip64) {
  for (const bool zip64 : {false, true}) {
    ASSERT_OK_AND_ASSIGN(
        const std::vector<float> values,
        ReadFirst(TorchZip(Body(), {Data(), {"byteorder", "little"}, {"version", "3\n"}}, zip64)));
    EXPECT_THAT(values, ElementsAre(1, 2, 3));
  }
}

TEST(TorchZipTest, TakesAnyPrefix) {
  for (const std::string prefix : {"", "archive/", "some/folder/"}) {
    ASSERT_OK_AND_ASSIGN(const std::vector<float> values,
                         ReadFirst(ZipFile({{prefix + "data.pkl", WholePickle(Body())},
                                            {prefix + "data/0", Data().contents}})));
    EXPECT_THAT(values, ElementsAre(1, 2, 3));
  }
}

TEST(TorchZipTest, SmallRecordsUnderExtraAreNotes) {
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       Open(TorchZip(Body(), {Data(),
                                              {"extra/pyramid.origin", "mindcv"},
                                              {"extra/pyramid.gelu", "tanh"},
                                              {"other", "x"}})));
  EXPECT_THAT(file.notes,
              ElementsAre(Pair("pyramid.gelu", "tanh"), Pair("pyramid.origin", "mindcv")));
  EXPECT_THAT(Open(TorchZip(Body(), {Data(), {"extra/large", std::string(70'000, 'x')}})),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("70000 bytes")));
  EXPECT_THAT(Open(TorchZip(
                  Body(), {Data(), {.name = "extra/damaged", .contents = "x", .wrong_crc = true}})),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("CRC-32")));
}

TEST(TorchZipTest, AChecksumOfZeroMeansNone) {
  ZipEntry data = Data();
  data.no_crc = true;
  ASSERT_OK_AND_ASSIGN(const std::vector<float> values, ReadFirst(TorchZip(Body(), {data})));
  EXPECT_THAT(values, ElementsAre(1, 2, 3));
  ASSERT_OK_AND_ASSIGN(
      const WeightFile file,
      Open(ZipFile({{.name = "a/data.pkl", .contents = WholePickle(Body()), .no_crc = true},
                    {"a/data/0", Data().contents}})));
  EXPECT_FALSE(file.has_checksum);
}

TEST(TorchZipTest, ADamagedPickleIsDataLoss) {
  EXPECT_THAT(
      Open(ZipFile({{.name = "a/data.pkl", .contents = WholePickle(Body()), .wrong_crc = true},
                    {"a/data/0", Data().contents}})),
      StatusIs(absl::StatusCode::kDataLoss, HasSubstr("data.pkl\": its CRC-32")));
}

TEST(TorchZipTest, RefusesWhatItCannotRead) {
  struct Case {
    const char* what;
    std::string file;
    absl::StatusCode code;
    const char* message;
  };
  ZipEntry deflated = Data();
  deflated.method = 8;
  ZipEntry encrypted = Data();
  encrypted.flags = 1;
  ZipEntry pickle = {"a/data.pkl", WholePickle(Body())};
  pickle.method = 8;
  const auto invalid = absl::StatusCode::kInvalidArgument;
  const auto loss = absl::StatusCode::kDataLoss;
  const std::vector<Case> cases = {
      {"deflated storage", TorchZip(Body(), {deflated}), invalid, "compressed (method 8)"},
      {"deflated pickle", ZipFile({pickle}), invalid, "compressed (method 8)"},
      {"encrypted", TorchZip(Body(), {encrypted}), invalid, "encrypted"},
      {"big-endian", TorchZip(Body(), {Data(), {"byteorder", "big"}}), invalid,
       "byteorder is \"big\""},
      {"no pickle", ZipFile({{"readme.txt", "hello"}}), invalid, "it has no data.pkl"},
      {"two pickles", TorchZip(Body(), {Data(), {"b/data.pkl", "x"}}), loss, "more than one"},
      {"an entry twice", TorchZip(Body(), {Data(), Data()}), loss, "is there twice"},
      {"no storage", TorchZip(Body(), {}), loss, "no entry \"a/data/0\""},
      {"short storage", TorchZip(Body(), {{"data/0", "1234"}}), loss, "has only 4 bytes"},
      {"larger count", TorchZip(Body(4), {Data()}), loss, "has only 12 bytes"},
  };
  for (const Case& c : cases) {
    EXPECT_THAT(Open(c.file), StatusIs(c.code, HasSubstr(c.message))) << c.what;
  }
}

TEST(TorchZipTest, HeadersThatLieAreDataLoss) {
  const std::string good = TorchZip(Body(), {Data()});
  const size_t end = good.size() - 22;
  const auto with = [&](size_t at, const std::string& bytes) {
    std::string file = good;
    file.replace(at, bytes.size(), bytes);
    return file;
  };
  const size_t directory = good.find("PK\x01\x02");
  ASSERT_NE(directory, std::string::npos);
  struct Case {
    const char* what;
    std::string file;
    const char* message;
  };
  for (const Case& c :
       {Case{"directory behind", with(end + 16, "\xff\xff\xff\x7f"), "isn't within"},
        Case{"directory of 2 GB", with(end + 12, "\xff\xff\xff\x7f"), "isn't within"},
        Case{"more entries than fit", with(end + 10, "\xff\xff"), "claims 65535 entries"},
        Case{"one entry more", with(end + 10, std::string("\3\0", 2)), ""},
        Case{"no directory", with(directory, "XX"), "isn't one"},
        Case{"local header beyond", with(directory + 42, "\xff\xff\xff\x7f"), "begins at byte"},
        Case{"local header elsewhere", with(directory + 42, "\1"), "no such entry"},
        Case{"sizes contradict", with(directory + 20, "\xff"), "two different sizes"},
        Case{"no end", good.substr(0, good.size() - 1), "truncated"}}) {
    EXPECT_THAT(Open(c.file), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(c.message)))
        << c.what;
  }
  const std::string good64 = TorchZip(Body(), {Data()}, true);
  const size_t locator = good64.size() - 42;
  ASSERT_EQ(good64.compare(locator, 4, "PK\x06\x07"), 0);
  std::string lying = good64;
  lying.replace(locator + 8, 8, std::string(8, '\xff'));
  EXPECT_THAT(Open(lying), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("zip64")));
  lying = good64;
  lying.replace(locator + 8, 1, "\1");
  EXPECT_THAT(Open(lying), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("zip64")));
}

TEST(TorchZipTest, TensorsOfOneStorageShareItsChecksum) {
  const std::string id = PickledStorageId("FloatStorage", "0", 3);
  const std::string file_bytes = TorchZip(
      PickledDict({{"a", PickledTensor(id, 0, {1}, {1})}, {"b", PickledTensor(id, 1, {2}, {1})}}),
      {Data()});
  ASSERT_OK_AND_ASSIGN(const WeightFile file, Open(file_bytes));
  ASSERT_EQ(file.tensors.size(), 2u);
  EXPECT_EQ(file.tensors[0].checksum, file.tensors[1].checksum);
  EXPECT_FALSE(file.tensors[1].checksum->verified);
  std::vector<float> value(1);
  ASSERT_OK(ReadTensorAsFloat(file, file.tensors[0], value));
  EXPECT_TRUE(file.tensors[1].checksum->verified);
  std::vector<float> values(2);
  ASSERT_OK(ReadTensorAsFloat(file, file.tensors[1], values));
  EXPECT_THAT(values, ElementsAre(2, 3));
}

}  // namespace
}  // namespace pyramid
