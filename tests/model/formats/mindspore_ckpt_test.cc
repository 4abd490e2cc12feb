#include <zlib.h>

#include "absl/strings/str_cat.h"
#include "model/formats/weight_file.h"
#include "tests/model/formats/torch_files.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::BytesOf;
using ::pyramid::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pair;

absl::StatusOr<WeightFile> Open(std::string bytes) {
  return OpenWeightBytes(MakeMemorySource(std::move(bytes)));
}

std::string Varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>((value & 0x7f) | 0x80);
  return bytes + static_cast<char>(value);
}

std::string Field(int number, absl::string_view bytes) {
  return absl::StrCat(Varint(static_cast<uint64_t>(number) << 3 | 2), Varint(bytes.size()), bytes);
}

std::string Dims(const std::vector<int64_t>& dims, bool packed = false) {
  std::string bytes;
  for (const int64_t dim : dims) {
    if (!packed) bytes += Varint(1 << 3);
    bytes += Varint(static_cast<uint64_t>(dim));
  }
  return packed ? Field(1, bytes) : bytes;
}

std::string Value(absl::string_view tag, absl::string_view type, absl::string_view content,
                  const std::string& dims) {
  return Field(1, absl::StrCat(Field(1, tag),
                               Field(2, absl::StrCat(dims, Field(2, type), Field(3, content)))));
}

std::vector<float> Floats(const WeightFile& file, size_t tensor) {
  std::vector<float> values(static_cast<size_t>(file.tensors.at(tensor).elements()));
  EXPECT_OK(ReadTensorAsFloat(file, file.tensors[tensor], values));
  return values;
}

const std::string kFour = BytesOf<float>({1, 2, 3, 4});

TEST(MindSporeCkptTest, ReadsPackedAndUnpackedDims) {
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       Open(Value("a", "Float32", kFour, Dims({2, 2})) +
                            Value("b", "Float32", kFour, Dims({1, 4}, true))));
  EXPECT_THAT(file.tensors[0].shape, ElementsAre(2, 2));
  EXPECT_THAT(file.tensors[1].shape, ElementsAre(1, 4));
  EXPECT_THAT(Floats(file, 1), ElementsAre(1, 2, 3, 4));
}

TEST(MindSporeCkptTest, DimsOfZeroAreAScalarIfThereIsAValue) {
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       Open(Value("old", "Float32", BytesOf<float>({5}), Dims({0})) +
                            Value("new", "Float32", BytesOf<float>({6}), "") +
                            Value("empty", "Float32", "", Dims({0}))));
  EXPECT_THAT(file.tensors[0].shape, IsEmpty());
  EXPECT_THAT(Floats(file, 0), ElementsAre(5));
  EXPECT_THAT(Floats(file, 1), ElementsAre(6));
  EXPECT_THAT(file.tensors[2].shape, ElementsAre(0));
}

TEST(MindSporeCkptTest, JoinsPiecesOfOneTag) {
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       Open(Value("a", "Float32", kFour.substr(0, 6), Dims({4})) +
                            Value("a", "Float32", kFour.substr(6), Dims({4})) +
                            Value("b", "Float32", kFour, Dims({4}))));
  ASSERT_EQ(file.tensors.size(), 2u);
  EXPECT_EQ(file.tensors[0].storage.size(), 2u);
  EXPECT_THAT(Floats(file, 0), ElementsAre(1, 2, 3, 4));
}

TEST(MindSporeCkptTest, ReadsEveryType) {
  const std::vector<std::pair<std::string, std::string>> types = {
      {"Float32", "F32"}, {"Float16", "F16"}, {"BFloat16", "BF16"}, {"Float64", "F64"},
      {"Int8", "I8"},     {"Int16", "I16"},   {"Int32", "I32"},     {"Int64", "I64"},
      {"UInt8", "U8"},    {"UInt16", "U16"},  {"UInt32", "U32"},    {"UInt64", "U64"},
      {"Bool", "BOOL"}};
  for (const auto& [type, dtype] : types) {
    const size_t bytes = dtype == "BOOL" || dtype.ends_with("8") ? 1
                         : dtype.ends_with("16")                 ? 2
                         : dtype.ends_with("32")                 ? 4
                                                                 : 8;
    ASSERT_OK_AND_ASSIGN(const WeightFile file,
                         Open(Value("a", type, std::string(3 * bytes, '\0'), Dims({3}))));
    EXPECT_EQ(file.tensors[0].dtype, dtype);
  }
  EXPECT_THAT(
      Open(Value("a", "Complex64", std::string(8, '\0'), Dims({1}))),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"a\" has the type Complex64")));
}

TEST(MindSporeCkptTest, SetsApartWhatIsNoTensor) {
  const std::string text = BytesOf<uint32_t>({'g', 0xfc, 0x4e2d, 0x1f642, 0x110000});
  ASSERT_OK_AND_ASSIGN(
      const WeightFile file,
      Open(Value("note", "str", text, Dims({0})) + Value("random_op", "random_op", "xyz", "") +
           Field(1, Field(1, "table") + Field(3, "whatever")) +
           Value("w.__param_key__12", "Float32", kFour, Dims({4})) +
           Value("v.__param_key__x", "Float32", kFour, Dims({4}))));
  ASSERT_EQ(file.tensors.size(), 2u);
  EXPECT_EQ(file.tensors[0].name, "w");
  EXPECT_EQ(file.tensors[1].name, "v.__param_key__x");
  EXPECT_THAT(file.notes, ElementsAre(Pair("note", "gü中🙂\xef\xbf\xbd"),
                                      Pair("table", HasSubstr("MapTensor"))));
}

TEST(MindSporeCkptTest, SkipsFieldsItDoesNotKnow) {
  const std::string unknown = Varint(9 << 3) + Varint(300) + Varint(10 << 3 | 1) + "12345678" +
                              Field(11, "abc") + Varint(12 << 3 | 5) + "1234";
  const std::string tensor =
      Field(2, Dims({4}) + unknown + Field(2, "Float32") + unknown + Field(3, kFour));
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       Open(Field(1, tensor + unknown + Field(1, "a")) + unknown));
  ASSERT_EQ(file.tensors.size(), 1u);
  EXPECT_EQ(file.tensors[0].name, "a");
}

TEST(MindSporeCkptTest, WhatContradictsItselfIsDataLoss) {
  struct Case {
    const char* what;
    std::string file;
    const char* message;
  };
  const std::string good = Value("a", "Float32", kFour, Dims({4}));
  const std::vector<Case> cases = {
      {"too few bytes", Value("a", "Float32", kFour.substr(1), Dims({4})), "don't fit its 15"},
      {"too many bytes", Value("a", "Float32", kFour, Dims({3})), "don't fit its 16"},
      {"dims overflow", Value("a", "Float32", "", Dims({int64_t{1} << 40, int64_t{1} << 40})),
       "don't fit"},
      {"negative dim", Value("a", "Float32", kFour, Dims({-4})), "-4, is negative"},
      {"17 dims", Value("a", "Float32", kFour, Dims(std::vector<int64_t>(17, 1))), "one too many"},
      {"twice", good + Value("b", "Float32", kFour, Dims({4})) + good, "\"a\" is there twice"},
      {"a whole one again", good + good, "don't fit its 32"},
      {"pieces of two types", good + Value("a", "Int32", kFour, Dims({4})), "differ in type"},
      {"pieces of two dims", good + Value("a", "Float32", kFour, Dims({2, 2})), "differ in type"},
      {"no content", Field(1, Field(1, "a") + Field(2, Field(2, "Float32"))), "no content"},
      {"no type", Field(1, Field(1, "a") + Field(2, Field(3, kFour))), "no type"},
      {"no tensor", Field(1, Field(1, "a")), "no type or no content"},
      {"length beyond", std::string("\x0a\xff\xff\xff\xff\x7f\x0a", 7), "are left: truncated"},
      {"endless number", absl::StrCat("\x0a", std::string(11, '\xff')), "more than 10 bytes"},
      {"a group", Field(1, Field(1, "a") + "\x0b"), "wire type 3"},
      {"a long name", Field(1, Field(1, std::string(1025, 'x'))), "a name has 1025 bytes"},
      {"beyond its value", Field(1, std::string("\x19\1\1", 3)) + std::string(20, '\0'),
       "reaches beyond"},
      {"no values", "\x0a", "truncated"},
  };
  for (const Case& c : cases) {
    EXPECT_THAT(Open(c.file), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(c.message)))
        << c.what;
  }
}

std::string Trailer(uint64_t crc) {
  std::string bytes = std::string("crc_num") + std::string(2, '\0');
  for (int i = 7; i >= 0; --i) bytes += static_cast<char>((crc >> (8 * i)) & 0xff);
  return bytes;
}

TEST(MindSporeCkptTest, VerifiesTheTrailersChecksum) {
  const std::string good = Value("a", "Float32", kFour, Dims({4}));
  const uint64_t crc =
      crc32(0, reinterpret_cast<const Bytef*>(good.data()), static_cast<uInt>(good.size()));
  ASSERT_OK_AND_ASSIGN(const WeightFile file, Open(good + Trailer(crc)));
  EXPECT_TRUE(file.has_checksum);
  EXPECT_EQ(file.tensors.size(), 1u);
  EXPECT_THAT(Open(good + Trailer(crc ^ 1)),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("CRC-32")));
  EXPECT_THAT(Open(good + Trailer(crc | uint64_t{1} << 40)),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("CRC-32")));
  EXPECT_THAT(Open(Trailer(0)), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("no values")));
}

}  // namespace
}  // namespace pyramid
