#include "model/formats/safetensors.h"

#include <cstring>

#include "proto/base/file.h"
#include "tests/testing/formula.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A file with this header and so many bytes of data.
std::string FileWith(absl::string_view header, size_t data_bytes) {
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>((header.size() >> (8 * i)) & 0xff);
  file.append(header.data(), header.size());
  file.append(data_bytes, 'x');
  return file;
}

std::string Golden() {
  auto bytes = ReadFile(PYRAMID_SOURCE_DIR "/tests/golden/files/small.safetensors");
  EXPECT_OK(bytes);
  return bytes.ok() ? *bytes : "";
}

TEST(SafetensorsTest, ReadsAFileOfTheSafetensorsLibrary) {
  const std::string file = Golden();
  ASSERT_OK_AND_ASSIGN(const SafetensorsView view, ParseSafetensors(file));
  EXPECT_EQ(view.metadata.at("format"), "pt");
  ASSERT_EQ(view.tensors.size(), 7u);
  EXPECT_EQ(view.tensors[0].name, "i64");  // by offset

  const TensorBytes* weight = view.Find("head.weight");
  ASSERT_NE(weight, nullptr);
  EXPECT_EQ(weight->dtype, "F32");
  EXPECT_THAT(weight->shape, ElementsAre(10, 8));
  ASSERT_EQ(weight->data.size(), 320u);
  const std::vector<double> levels = testing::FormulaLevels("head.weight", 80);
  for (size_t i = 0; i < 80; ++i) {
    float value = 0;
    std::memcpy(&value, weight->data.data() + 4 * i, 4);
    EXPECT_EQ(value, static_cast<float>(8 * levels[i])) << i;
  }
  const TensorBytes* scalar = view.Find("scalar");
  ASSERT_NE(scalar, nullptr);
  EXPECT_TRUE(scalar->shape.empty());
  EXPECT_EQ(scalar->data.size(), 4u);
  EXPECT_EQ(view.Find("bf")->dtype, "BF16");
  EXPECT_EQ(view.Find("half")->dtype, "F16");
  EXPECT_EQ(view.Find("double")->dtype, "F64");
  EXPECT_EQ(view.Find("nobody"), nullptr);
}

TEST(SafetensorsTest, WritesWhatItReads) {
  const std::string file = Golden();
  ASSERT_OK_AND_ASSIGN(const SafetensorsView view, ParseSafetensors(file));
  ASSERT_OK_AND_ASSIGN(const std::string written,
                       SerializeSafetensors(view.tensors, view.metadata));
  EXPECT_EQ(written, file);  // the library aligns to 8 and orders the same way
}

TEST(SafetensorsTest, KeepsOrderEmptyTensorsAndNames) {
  const std::vector<TensorBytes> tensors = {{"z", "F32", {2}, "12345678"},
                                            {"empty", "F64", {0, 3}, ""},
                                            {"größe \"x\"\n", "U8", {}, "a"},
                                            {"a", "BOOL", {1, 3}, "bcd"}};
  ASSERT_OK_AND_ASSIGN(const std::string file, SerializeSafetensors(tensors, {{"k", "v"}}));
  ASSERT_OK_AND_ASSIGN(const SafetensorsView view, ParseSafetensors(file));
  ASSERT_EQ(view.tensors.size(), 4u);
  EXPECT_EQ(view.tensors[0].name, "z");
  for (const TensorBytes& tensor : tensors) {
    const TensorBytes* found = view.Find(tensor.name);
    ASSERT_NE(found, nullptr) << tensor.name;
    EXPECT_EQ(found->dtype, tensor.dtype);
    EXPECT_EQ(found->shape, tensor.shape);
    EXPECT_EQ(found->data, tensor.data);
  }
  EXPECT_EQ(view.metadata.at("k"), "v");
  EXPECT_EQ((view.tensors[0].data.data() - file.data()) % 8, 0);
}

TEST(SafetensorsTest, RefusesToWriteWhatDoesNotFit) {
  EXPECT_THAT(SerializeSafetensors({{"a", "F7", {1}, "x"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("dtype \"F7\"")));
  EXPECT_THAT(SerializeSafetensors({{"a", "F32", {2, 3}, "x"}}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("[2, 3] of F32 doesn't fit its 1 bytes")));
  EXPECT_THAT(SerializeSafetensors({{"a", "U8", {-1}, "x"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("doesn't fit")));
  EXPECT_THAT(SerializeSafetensors({{"a", "U8", {1}, "x"}, {"a", "U8", {1}, "y"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"a\" is taken")));
  EXPECT_THAT(SerializeSafetensors({{"\xff", "U8", {1}, "x"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("UTF-8")));
}

struct Malformed {
  const char* what;
  std::string file;
  const char* message;
};

TEST(SafetensorsTest, NamesWhatIsMalformed) {
  const std::vector<Malformed> cases = {
      {"empty", "", "0 bytes, too few"},
      {"short", "1234567", "7 bytes, too few"},
      {"length beyond the file", std::string("\x10\0\0\0\0\0\0\0{}", 10), "header's length, 16"},
      {"length near 2^64", std::string(8, '\xff') + "{}", "header's length"},
      {"not JSON", FileWith("{]", 0), "isn't a JSON object"},
      {"an array", FileWith("[]", 0), "isn't a JSON object"},
      {"metadata not texts", FileWith(R"({"__metadata__":{"a":1}})", 0),
       "__metadata__.a isn't a text"},
      {"metadata no object", FileWith(R"({"__metadata__":1})", 0), "__metadata__ isn't an object"},
      {"entry no object", FileWith(R"({"a":1})", 0), "\"a\": its entry isn't an object"},
      {"no dtype", FileWith(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1), "no dtype"},
      {"no shape", FileWith(R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1), "no shape"},
      {"no offsets", FileWith(R"({"a":{"dtype":"U8","shape":[1]}})", 1), "no data_offsets"},
      {"one offset", FileWith(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1),
       "no data_offsets"},
      {"unknown dtype", FileWith(R"({"a":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}})", 1),
       "dtype \"F4\""},
      {"negative side", FileWith(R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1),
       "a dimension"},
      {"broken side", FileWith(R"({"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}})", 1),
       "a dimension"},
      {"offset behind", FileWith(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 1),
       "don't lie in the 1 bytes"},
      {"offsets turned", FileWith(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", 1),
       "don't lie"},
      {"negative offset", FileWith(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}})", 1),
       "don't lie"},
      {"wrong shape", FileWith(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4),
       "doesn't fit its 4 bytes"},
      {"product over 2^64",
       FileWith(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0),
       "doesn't fit its 0 bytes"},
      {"overlap",
       FileWith(
           R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
           3),
       "begins at byte 1 of the data where the one before ends at 2"},
      {"gap", FileWith(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", 2),
       "begins at byte 1"},
      {"rest", FileWith(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 2),
       "end at byte 1 of 2"},
  };
  for (const Malformed& c : cases) {
    EXPECT_THAT(ParseSafetensors(c.file),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr(c.message)))
        << c.what;
  }
}

TEST(SafetensorsTest, EveryTruncationIsDataLoss) {
  const std::string file = Golden();
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_THAT(ParseSafetensors(absl::string_view(file).substr(0, size)),
                StatusIs(absl::StatusCode::kDataLoss, ::testing::_))
        << size;
  }
}

TEST(SafetensorsTest, DamagedHeadersNeverReachOutsideTheFile) {
  const std::string good = Golden();
  for (size_t at = 0; at < 480; ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string file = good;
      file[at] = static_cast<char>(file[at] ^ (1 << bit));
      const auto view = ParseSafetensors(file);
      if (!view.ok()) {
        EXPECT_EQ(view.status().code(), absl::StatusCode::kDataLoss);
        continue;
      }
      for (const TensorBytes& tensor : view->tensors) {
        EXPECT_GE(tensor.data.data(), file.data());
        EXPECT_LE(tensor.data.data() + tensor.data.size(), file.data() + file.size());
      }
    }
  }
}

TEST(SafetensorsTest, KnowsTheSizesOfItsElements) {
  EXPECT_EQ(SafetensorsElementSize("F32"), 4);
  EXPECT_EQ(SafetensorsElementSize("F64"), 8);
  EXPECT_EQ(SafetensorsElementSize("F16"), 2);
  EXPECT_EQ(SafetensorsElementSize("BF16"), 2);
  EXPECT_EQ(SafetensorsElementSize("I64"), 8);
  EXPECT_EQ(SafetensorsElementSize("I32"), 4);
  EXPECT_EQ(SafetensorsElementSize("I16"), 2);
  EXPECT_EQ(SafetensorsElementSize("I8"), 1);
  EXPECT_EQ(SafetensorsElementSize("U8"), 1);
  EXPECT_EQ(SafetensorsElementSize("BOOL"), 1);
  EXPECT_EQ(SafetensorsElementSize("f32"), 0);
}

}  // namespace
}  // namespace pyramid
