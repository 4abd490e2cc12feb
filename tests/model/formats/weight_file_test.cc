#include "model/formats/weight_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "proto/base/file.h"
#include "tests/model/formats/torch_files.h"
#include "tests/testing/formula.h"
#include "tests/testing/sanitized.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::testing::_;
using ::testing::AnyOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pair;

const std::filesystem::path kFiles = PYRAMID_SOURCE_DIR "/tests/golden/files";

std::string Bytes(absl::string_view name) {
  auto bytes = ReadFile(kFiles / std::string(name));
  EXPECT_OK(bytes);
  return bytes.ok() ? *bytes : "";
}

absl::StatusOr<WeightFile> Open(std::string bytes) {
  return OpenWeightBytes(MakeMemorySource(std::move(bytes)));
}

const StoredTensor* Find(const WeightFile& file, absl::string_view name) {
  for (const StoredTensor& tensor : file.tensors) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

std::vector<float> Floats(const WeightFile& file, const StoredTensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.elements()));
  EXPECT_OK(ReadTensorAsFloat(file, tensor, values));
  return values;
}

// Every tensor's values, however damaged the file is: no crash; an error is of a kind promised.
void ReadEverything(const absl::StatusOr<WeightFile>& file) {
  const auto promised =
      AnyOf(absl::StatusCode::kOk, absl::StatusCode::kDataLoss, absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(file.status().code(), promised) << file.status();
  if (!file.ok()) return;
  for (const StoredTensor& tensor : file->tensors) {
    ASSERT_LE(tensor.elements(), 5'000'000);
    std::vector<char> bytes(static_cast<size_t>(tensor.elements()) * 8);
    const size_t size = tensor.dtype == "BOOL" || tensor.dtype == "I8" || tensor.dtype == "U8" ? 1
                        : tensor.dtype.ends_with("16")                                         ? 2
                        : tensor.dtype.ends_with("32")                                         ? 4
                                                                                               : 8;
    bytes.resize(static_cast<size_t>(tensor.elements()) * size);
    EXPECT_THAT(ReadTensor(*file, tensor, bytes).code(), promised);
    std::vector<float> floats(static_cast<size_t>(tensor.elements()));
    EXPECT_THAT(ReadTensorAsFloat(*file, tensor, floats).code(), promised);
  }
}

// The nearest bfloat16, ties to even, as float.
float AsBrainFloat(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  std::memcpy(&value, &bits, 4);
  return value;
}

// What a golden tensor holds: 8 * levels(name, count) in its type.
float Expected(double level, absl::string_view dtype) {
  const double value = 8 * level;
  if (dtype == "I64") return static_cast<float>(std::trunc(value));
  if (dtype == "BF16") return AsBrainFloat(static_cast<float>(value));
  return static_cast<float>(value);
}

void ExpectGolden(const WeightFile& file, absl::string_view group) {
  const std::vector<std::pair<std::string, std::vector<int64_t>>> shapes = {
      {"head.weight", {10, 8}}, {"head.bias", {10}}, {"half", {3, 5}}, {"bf", {3, 5}},
      {"double", {2, 2}},       {"i64", {2, 3}},     {"scalar", {}}};
  EXPECT_EQ(file.tensors.size(), shapes.size());
  for (const StoredTensor& tensor : file.tensors) {
    const std::string name(absl::StripPrefix(tensor.name, "module."));
    SCOPED_TRACE(name);
    EXPECT_EQ(tensor.group, group);
    const auto shape =
        std::find_if(shapes.begin(), shapes.end(), [&](const auto& s) { return s.first == name; });
    ASSERT_NE(shape, shapes.end());
    EXPECT_EQ(tensor.shape, shape->second);
    EXPECT_EQ(tensor.dtype, name == "half"     ? "F16"
                            : name == "bf"     ? "BF16"
                            : name == "double" ? "F64"
                            : name == "i64"    ? "I64"
                                               : "F32");
    EXPECT_THAT(tensor.strides, IsEmpty());
    const std::vector<double> levels = testing::FormulaLevels(name, tensor.elements());
    const std::vector<float> values = Floats(file, tensor);
    for (size_t i = 0; i < values.size(); ++i) {
      const float expected = Expected(levels[i], tensor.dtype);
      if (name == "half") {
        EXPECT_NEAR(values[i], expected, std::abs(expected) * 0x1p-11) << i;
      } else {
        EXPECT_EQ(values[i], expected) << i;
      }
    }
  }
}

TEST(WeightFileTest, ReadsGoldenTorchFilesOfEveryForm) {
  struct Case {
    const char* file;
    WeightFormat format;
    const char* group;
    bool has_checksum;
  };
  for (const Case& c :
       {Case{"torch_small.pth", WeightFormat::kTorchZip, "", true},
        Case{"torch_small_legacy.pth", WeightFormat::kTorchLegacy, "", false},
        Case{"torch_small_official_train.pth", WeightFormat::kTorchZip, "model", true},
        Case{"torch_small_timm_train.pth.tar", WeightFormat::kTorchZip, "state_dict", true},
        Case{"small.safetensors", WeightFormat::kSafetensors, "", false}}) {
    SCOPED_TRACE(c.file);
    ASSERT_OK_AND_ASSIGN(const WeightFile file, OpenWeightFile(kFiles / c.file));
    EXPECT_EQ(file.format, c.format);
    EXPECT_EQ(file.has_checksum, c.has_checksum);
    ExpectGolden(file, c.group);
  }
}

TEST(WeightFileTest, ReadsTheSameHalvesFromEveryForm) {
  const std::vector<std::string> files = {"torch_small.pth", "torch_small_legacy.pth",
                                          "small.safetensors"};
  std::vector<std::vector<float>> halves;
  for (const std::string& name : files) {
    ASSERT_OK_AND_ASSIGN(const WeightFile file, OpenWeightFile(kFiles / name));
    halves.push_back(Floats(file, *Find(file, "half")));
  }
  EXPECT_EQ(halves[0], halves[1]);
  EXPECT_EQ(halves[0], halves[2]);
}

TEST(WeightFileTest, KeepsTrainingFactsAsNotes) {
  ASSERT_OK_AND_ASSIGN(const WeightFile official,
                       OpenWeightFile(kFiles / "torch_small_official_train.pth"));
  EXPECT_THAT(official.notes, ElementsAre(Pair("epoch", "7"), Pair("args.lr", "0.1"),
                                          Pair("args.model", "pvt_v2_b0")));
  ASSERT_OK_AND_ASSIGN(const WeightFile timm,
                       OpenWeightFile(kFiles / "torch_small_timm_train.pth.tar"));
  EXPECT_THAT(timm.notes, ElementsAre(Pair("epoch", "3"), Pair("arch", "pvt_v2_b0")));
  EXPECT_EQ(timm.tensors[0].name, "module.head.weight");
  ASSERT_OK_AND_ASSIGN(const WeightFile safetensors, OpenWeightFile(kFiles / "small.safetensors"));
  EXPECT_THAT(safetensors.notes, Contains(Pair("format", "pt")));
}

TEST(WeightFileTest, ReadsStridedAndSharedStorage) {
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       OpenWeightFile(kFiles / "torch_small_strided_shared.pth"));
  ASSERT_EQ(file.tensors.size(), 2u);
  const StoredTensor& view = *Find(file, "view");
  const StoredTensor& base = *Find(file, "base");
  EXPECT_THAT(view.shape, ElementsAre(2, 4));
  EXPECT_THAT(view.strides, ElementsAre(1, 6));
  EXPECT_EQ(view.first, 1);
  EXPECT_THAT(base.strides, IsEmpty());
  EXPECT_EQ(view.checksum, base.checksum);
  const std::vector<float> all = Floats(file, base);
  const std::vector<float> part = Floats(file, view);
  ASSERT_EQ(part.size(), 8u);
  for (size_t row = 0; row < 2; ++row) {
    for (size_t column = 0; column < 4; ++column) {
      EXPECT_EQ(part[row * 4 + column], all[1 + row + 6 * column]);
    }
  }
}

TEST(WeightFileTest, ReadsGoldenMindSporeFiles) {
  const nlohmann::json expected = nlohmann::json::parse(Bytes("mindspore_expected.json"));
  const std::map<std::string, std::string> types = {
      {"Float32", "F32"}, {"Float16", "F16"}, {"BFloat16", "BF16"}, {"Float64", "F64"},
      {"Int32", "I32"},   {"Int64", "I64"},   {"UInt8", "U8"},      {"Bool", "BOOL"}};
  for (const auto& [name, tensors] : expected.items()) {
    SCOPED_TRACE(name);
    ASSERT_OK_AND_ASSIGN(const WeightFile file, OpenWeightFile(kFiles / (name + ".ckpt")));
    EXPECT_EQ(file.format, WeightFormat::kMindSpore);
    EXPECT_EQ(file.has_checksum, name == "mindspore_small_crc");
    size_t found = 0;
    for (const auto& [tag, facts] : tensors.items()) {
      SCOPED_TRACE(tag);
      if (facts.contains("text")) {
        EXPECT_THAT(file.notes, Contains(Pair(tag, facts["text"].get<std::string>())));
        continue;
      }
      const StoredTensor* tensor = Find(file, tag);
      ASSERT_NE(tensor, nullptr);
      ++found;
      EXPECT_EQ(tensor->shape, facts["shape"].get<std::vector<int64_t>>());
      EXPECT_EQ(tensor->dtype, types.at(facts["dtype"]));
      double sum = 0;
      if (tensor->dtype == "BOOL") {
        std::vector<char> flags(static_cast<size_t>(tensor->elements()));
        ASSERT_OK(ReadTensor(file, *tensor, flags));
        for (const char flag : flags) sum += flag;
      } else {
        for (const float value : Floats(file, *tensor)) sum += value;
      }
      const double exact = facts["sum"];  // of the values as float32
      EXPECT_NEAR(sum, exact, 1e-12 * std::max(1.0, std::abs(exact)));
    }
    EXPECT_EQ(found, file.tensors.size());
  }
}

TEST(WeightFileTest, ReadsDoublesOfMindSporeInTheirOwnType) {
  ASSERT_OK_AND_ASSIGN(const WeightFile file, OpenWeightFile(kFiles / "mindspore_small.ckpt"));
  std::vector<double> values(4);
  ASSERT_OK(ReadTensor(file, *Find(file, "double"), {reinterpret_cast<char*>(values.data()), 32}));
  const std::vector<double> levels = testing::FormulaLevels("double", 4);
  for (size_t i = 0; i < 4; ++i) EXPECT_DOUBLE_EQ(values[i], 8 * levels[i]);
}

TEST(WeightFileTest, ReadsSafetensorsOfMindSpore) {
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       OpenWeightFile(kFiles / "mindspore_small.safetensors"));
  EXPECT_EQ(file.format, WeightFormat::kSafetensors);
  EXPECT_THAT(file.notes, Contains(Pair("format", "ms")));
  ASSERT_OK_AND_ASSIGN(const WeightFile ckpt, OpenWeightFile(kFiles / "mindspore_small.ckpt"));
  for (const char* name : {"head.weight", "half", "i32", "u8"}) {
    ASSERT_NE(Find(file, name), nullptr) << name;
    EXPECT_EQ(Floats(file, *Find(file, name)), Floats(ckpt, *Find(ckpt, name))) << name;
  }
}

TEST(WeightFileTest, RefusesAMaliciousPickleByNameAndRunsNothing) {
  const std::filesystem::path made = "/tmp/pyramid_pwned";
  ASSERT_FALSE(std::filesystem::exists(made));
  EXPECT_THAT(OpenWeightFile(kFiles / "torch_malicious.pth"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("the pickle wants to call posix.system; refused")));
  EXPECT_FALSE(std::filesystem::exists(made));
}

TEST(WeightFileTest, RefusesAnEncryptedFileWithTheReason) {
  EXPECT_THAT(OpenWeightFile(kFiles / "mindspore_small_aes.ckpt"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("encrypted")));
}

TEST(WeightFileTest, RefusesWhatIsNoWeightFile) {
  const testing::TempFolder folder;
  EXPECT_THAT(OpenWeightFile(folder / "none"), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(OpenWeightFile(folder.path()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is a folder")));
  EXPECT_THAT(Open(""), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("empty")));
  struct Case {
    std::string bytes;
    const char* message;
  };
  for (const Case& c :
       {Case{"hello", "none of the formats"},
        Case{"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"},
        Case{"<!DOCTYPE html>", "web page"},
        Case{"\x80\x04N.", "pickle, but not one of torch.save"}, Case{"\x1f\x8b\x08", "gzip"}}) {
    EXPECT_THAT(Open(c.bytes), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(c.message)));
  }
}

TEST(WeightFileTest, ErrorsNameTheFile) {
  const testing::TempFolder folder;
  ASSERT_OK(WriteFileSynced(folder / "w.pth", "hello"));
  EXPECT_THAT(OpenWeightFile(folder / "w.pth"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("w.pth: none of")));
}

class SmallFiles : public ::testing::TestWithParam<const char*> {};

TEST_P(SmallFiles, EveryTruncationIsAnErrorOrReadable) {
  const std::string good = Bytes(GetParam());
  for (size_t size = 0; size < good.size(); ++size) {
    ReadEverything(Open(good.substr(0, size)));
  }
}

TEST_P(SmallFiles, EveryFlippedBitIsAnErrorOrReadable) {
  const std::string good = Bytes(GetParam());
  std::string damaged = good;
  for (size_t at = 0; at < good.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      damaged[at] = static_cast<char>(good[at] ^ (1 << bit));
      ReadEverything(Open(damaged));
    }
    damaged[at] = good[at];
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, SmallFiles,
                         ::testing::Values("torch_small.pth", "torch_small_legacy.pth",
                                           "torch_small_official_train.pth",
                                           "torch_small_strided_shared.pth", "torch_malicious.pth",
                                           "mindspore_small.ckpt", "mindspore_small_crc.ckpt",
                                           "mindspore_bf16.ckpt", "mindspore_small_aes.ckpt",
                                           "mindspore_small.safetensors", "small.safetensors"),
                         [](const auto& instance) {
                           std::string name = instance.param;
                           for (char& c : name) c = std::isalnum(c) ? c : '_';
                           return name;
                         });

TEST(WeightFileTest, AnyFlippedByteUnderMindSporesChecksumIsDataLoss) {
  const std::string good = Bytes("mindspore_small_crc.ckpt");
  for (size_t at = 0; at < good.size(); ++at) {
    std::string damaged = good;
    damaged[at] = static_cast<char>(good[at] ^ 0x20);
    EXPECT_THAT(Open(damaged), StatusIs(absl::StatusCode::kDataLoss, _)) << at;
  }
}

TEST(WeightFileTest, AFlippedByteInAZipsStorageIsDataLoss) {
  const std::string good = Bytes("torch_small.pth");
  ASSERT_OK_AND_ASSIGN(const WeightFile whole, Open(good));
  for (const StoredTensor& tensor : whole.tensors) {
    std::string damaged = good;
    const auto at = static_cast<size_t>(tensor.storage[0].offset);
    damaged[at] = static_cast<char>(damaged[at] ^ 1);
    ASSERT_OK_AND_ASSIGN(const WeightFile file, Open(damaged));
    std::vector<float> values(static_cast<size_t>(tensor.elements()));
    EXPECT_THAT(ReadTensorAsFloat(file, *Find(file, tensor.name), values),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr("CRC-32")));
  }
}

TEST(WeightFileTest, AViewIsCheckedAgainstItsWholeStoragesChecksum) {
  std::string bytes = Bytes("torch_small_strided_shared.pth");
  ASSERT_OK_AND_ASSIGN(const WeightFile good, Open(bytes));
  // The storage's first element isn't in the view.
  bytes[static_cast<size_t>(good.tensors[0].storage[0].offset)] ^= 1;
  ASSERT_OK_AND_ASSIGN(const WeightFile file, Open(bytes));
  std::vector<float> values(8);
  EXPECT_THAT(ReadTensorAsFloat(file, *Find(file, "view"), values),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("CRC-32")));
}

// One tensor of these bytes, as a file in memory.
WeightFile FileOf(std::string bytes, absl::string_view dtype, std::vector<int64_t> shape,
                  std::vector<int64_t> strides = {}, int64_t first = 0) {
  WeightFile file;
  StoredTensor tensor;
  tensor.name = "t";
  tensor.dtype = std::string(dtype);
  tensor.shape = std::move(shape);
  tensor.strides = std::move(strides);
  tensor.first = first;
  tensor.storage = {{0, static_cast<int64_t>(bytes.size())}};
  file.tensors.push_back(std::move(tensor));
  file.source = MakeMemorySource(std::move(bytes));
  return file;
}

template <typename T>
std::vector<float> AsFloats(absl::string_view dtype, const std::vector<T>& values) {
  const WeightFile file =
      FileOf(testing::BytesOf(values), dtype, {static_cast<int64_t>(values.size())});
  return Floats(file, file.tensors[0]);
}

TEST(WeightFileTest, ConvertsHalvesExactly) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_THAT(AsFloats<uint16_t>("F16", {0x0000, 0x8000, 0x3c00, 0xc000, 0x7bff, 0x0001, 0x83ff,
                                         0x0400, 0x7c00, 0xfc00}),
              ElementsAre(0.0f, -0.0f, 1.0f, -2.0f, 65504.0f, 0x1p-24f, -1023 * 0x1p-24f, 0x1p-14f,
                          infinity, -infinity));
  EXPECT_TRUE(std::signbit(AsFloats<uint16_t>("F16", {0x8000})[0]));
  EXPECT_TRUE(std::isnan(AsFloats<uint16_t>("F16", {0x7e00})[0]));
  EXPECT_TRUE(std::isnan(AsFloats<uint16_t>("F16", {0xfc01})[0]));
}

TEST(WeightFileTest, ConvertsBrainFloatsExactly) {
  EXPECT_THAT(AsFloats<uint16_t>("BF16", {0x0000, 0x3f80, 0xc000, 0x0001, 0x7f80}),
              ElementsAre(0.0f, 1.0f, -2.0f, 0x1p-133f, std::numeric_limits<float>::infinity()));
  EXPECT_TRUE(std::isnan(AsFloats<uint16_t>("BF16", {0x7fc0})[0]));
}

TEST(WeightFileTest, RoundsDoublesAndIntegersToTheNearestFloat) {
  EXPECT_THAT(
      AsFloats<double>("F64", {0.1, -1e300, 1e-320, 16777217.0, 16777219.0}),
      ElementsAre(0.1f, -std::numeric_limits<float>::infinity(), 0.0f, 16777216.0f, 16777220.0f));
  EXPECT_TRUE(std::isnan(AsFloats<double>("F64", {std::nan("")})[0]));
  EXPECT_THAT(AsFloats<int64_t>("I64", {-1, int64_t{1} << 40, 16777217}),
              ElementsAre(-1.0f, 0x1p40f, 16777216.0f));
  EXPECT_THAT(AsFloats<uint64_t>("U64", {~uint64_t{0}}), ElementsAre(0x1p64f));
  EXPECT_THAT(AsFloats<int32_t>("I32", {-7}), ElementsAre(-7.0f));
  EXPECT_THAT(AsFloats<uint32_t>("U32", {4294967295u}), ElementsAre(0x1p32f));
  EXPECT_THAT(AsFloats<int16_t>("I16", {-7}), ElementsAre(-7.0f));
  EXPECT_THAT(AsFloats<uint16_t>("U16", {65535}), ElementsAre(65535.0f));
  EXPECT_THAT(AsFloats<int8_t>("I8", {-7}), ElementsAre(-7.0f));
  EXPECT_THAT(AsFloats<uint8_t>("U8", {200}), ElementsAre(200.0f));
  EXPECT_THAT(AsFloats<float>("F32", {0x1p-149f}), ElementsAre(0x1p-149f));
}

TEST(WeightFileTest, RefusesToReadWhatDoesNotFit) {
  const WeightFile file = FileOf("abcd", "BOOL", {4});
  std::vector<float> floats(4);
  EXPECT_THAT(ReadTensorAsFloat(file, file.tensors[0], floats),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("BOOL isn't a number's")));
  std::vector<char> bytes(3);
  EXPECT_THAT(ReadTensor(file, file.tensors[0], bytes),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("4 elements")));
  const WeightFile wide = FileOf(std::string(8, 'x'), "F32", {2});
  EXPECT_THAT(ReadTensor(wide, wide.tensors[0], bytes),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("isn't whole elements")));
  std::vector<char> same(8);
  EXPECT_OK(ReadTensor(wide, wide.tensors[0], same));
  EXPECT_EQ(std::string(same.begin(), same.end()), std::string(8, 'x'));
}

TEST(WeightFileTest, ChecksShapesStridesAndStorage) {
  struct Case {
    const char* what;
    std::vector<int64_t> shape;
    std::vector<int64_t> strides;
    int64_t first;
    bool fits;
  };
  const int64_t large = int64_t{1} << 62;
  const std::vector<Case> cases = {
      {"whole", {2, 3}, {}, 0, true},
      {"scalar at the end", {}, {}, 5, true},
      {"scalar behind", {}, {}, 6, false},
      {"negative first", {}, {}, -1, false},
      {"too many", {7}, {}, 0, false},
      {"transposed", {3, 2}, {1, 3}, 0, true},
      {"stride beyond", {3, 2}, {2, 3}, 0, false},
      {"negative stride", {2}, {-1}, 1, false},
      {"expanded", {4, 6}, {0, 1}, 0, true},
      {"expanded beyond reason", {int64_t{1} << 40, 6}, {0, 1}, 0, false},
      {"product overflows", {large, large}, {0, 0}, 0, false},
      {"reach overflows", {3}, {large}, 0, false},
      {"negative side", {-1}, {}, 0, false},
      {"empty of large sides", {0, large, large}, {1, 1, 1}, 0, true},
      {"empty anywhere", {0}, {5}, 100, true},
      {"strides of another rank", {2, 3}, {1}, 0, false},
      {"17 dimensions", std::vector<int64_t>(17, 1), {}, 0, false}};
  for (const Case& c : cases) {
    SCOPED_TRACE(c.what);
    const WeightFile file = FileOf(std::string(24, '\0'), "F32", c.shape, c.strides, c.first);
    const absl::Status checked = CheckStoredTensor(file.tensors[0], 24);
    EXPECT_EQ(checked.code(), c.fits ? absl::StatusCode::kOk : absl::StatusCode::kDataLoss)
        << checked;
    const int64_t elements = file.tensors[0].elements();
    if (elements > 1000) continue;
    std::vector<float> values(static_cast<size_t>(elements));
    EXPECT_EQ(ReadTensorAsFloat(file, file.tensors[0], values).code(), checked.code());
  }
  WeightFile outside = FileOf(std::string(24, '\0'), "F32", {2});
  outside.tensors[0].storage = {{20, 8}};
  EXPECT_THAT(CheckStoredTensor(outside.tensors[0], 24),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("isn't within the file")));
  const WeightFile odd = FileOf("abcd", "F7", {4});
  EXPECT_THAT(CheckStoredTensor(odd.tensors[0], 4),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"F7\" isn't supported")));
}

TEST(WeightFileTest, ReadsAnyStridesAsWrittenOut) {
  std::vector<float> storage(5000);
  for (size_t i = 0; i < storage.size(); ++i) storage[i] = static_cast<float>(i);
  struct Case {
    std::vector<int64_t> shape;
    std::vector<int64_t> strides;
    int64_t first;
  };
  for (const Case& c : {Case{{3, 4, 5}, {1, 15, 3}, 7}, Case{{10, 2}, {0, 3}, 1},
                        Case{{4, 6}, {1, 1}, 0},  // windows that overlap
                        Case{{2, 1, 3}, {2000, 999, 1000}, 5}, Case{{1}, {77}, 4999},
                        Case{{50, 100}, {1, 50}, 0}, Case{{3, 3, 3}, {2, 3, 2}, 1}}) {
    const WeightFile file = FileOf(testing::BytesOf(storage), "F32", c.shape, c.strides, c.first);
    const std::vector<float> values = Floats(file, file.tensors[0]);
    std::vector<int64_t> index(c.shape.size(), 0);
    for (const float value : values) {
      int64_t at = c.first;
      for (size_t axis = 0; axis < index.size(); ++axis) at += index[axis] * c.strides[axis];
      EXPECT_EQ(value, static_cast<float>(at));
      for (size_t axis = index.size(); axis-- > 0;) {
        if (++index[axis] < c.shape[axis]) break;
        index[axis] = 0;
      }
    }
  }
}

TEST(WeightFileTest, ReadsATransposedTensorLargerThanItsWindow) {
  constexpr int64_t kRows = 1200;
  constexpr int64_t kColumns = 1100;  // 5.3 MB
  std::vector<float> storage(kRows * kColumns);
  for (size_t i = 0; i < storage.size(); ++i) storage[i] = static_cast<float>(i);
  const WeightFile file =
      FileOf(testing::BytesOf(storage), "F32", {kColumns, kRows}, {1, kColumns});
  const std::vector<float> values = Floats(file, file.tensors[0]);
  for (int64_t column = 0; column < kColumns; ++column) {
    for (int64_t row = 0; row < kRows; ++row) {
      ASSERT_EQ(values[static_cast<size_t>(column * kRows + row)],
                static_cast<float>(row * kColumns + column));
    }
  }
}

TEST(WeightFileTest, JoinsAStorageOfSeveralPieces) {
  WeightFile file = FileOf("..ab....cdef..", "U8", {6});
  file.tensors[0].storage = {{2, 2}, {5, 0}, {8, 4}};
  std::vector<char> bytes(6);
  ASSERT_OK(ReadTensor(file, file.tensors[0], bytes));
  EXPECT_EQ(std::string(bytes.begin(), bytes.end()), "abcdef");
}

TEST(WeightFileTest, NotesAreFewShortAndText) {
  WeightFile file;
  AddNote(file, "n", std::string(1023, 'x') + "ü");
  EXPECT_EQ(file.notes[0].second, std::string(1023, 'x'));  // not half a character
  AddNote(file, "raw", "\xff");
  EXPECT_EQ(file.notes[1].second, "\\xff");
  for (int i = 0; i < 2000; ++i) AddNote(file, "n", "x");
  EXPECT_EQ(file.notes.size(), 1000u);
  EXPECT_EQ(PrintableText("grün 🙂"), "grün 🙂");
  EXPECT_EQ(PrintableText("\xed\xa0\x80"), "\\xed\\xa0\\x80");  // a surrogate
  EXPECT_EQ(PrintableText("\xc0\x80"), "\\xc0\\x80");           // longer than needed
}

TEST(WeightFileTest, NamesItsFormats) {
  EXPECT_STREQ(WeightFormatName(WeightFormat::kSafetensors), "safetensors");
  EXPECT_STREQ(WeightFormatName(WeightFormat::kTorchZip), "PyTorch zip");
  EXPECT_STREQ(WeightFormatName(WeightFormat::kTorchLegacy), "PyTorch legacy pickle");
  EXPECT_STREQ(WeightFormatName(WeightFormat::kMindSpore), "MindSpore ckpt");
}

// A field of /proc/self/status, in bytes.
int64_t ProcessBytes(absl::string_view field) {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line)) {
    if (line.rfind(std::string(field), 0) == 0) {
      return 1024 * std::stoll(line.substr(field.size() + 1));
    }
  }
  return 0;
}

// Forgets the highest memory so far.
void ResetPeakMemory() { std::ofstream("/proc/self/clear_refs") << "5"; }

constexpr int64_t kMiB = int64_t{1} << 20;

// A file with `head`, then zeros to `size` that take no disk, then `tail`.
void WriteSparse(const std::filesystem::path& path, const std::string& head, int64_t size,
                 const std::string& tail) {
  ASSERT_OK(WriteFileSynced(path, head));
  const int descriptor = open(path.c_str(), O_WRONLY);
  ASSERT_GE(descriptor, 0);
  ASSERT_EQ(ftruncate(descriptor, size), 0);
  ASSERT_EQ(pwrite(descriptor, tail.data(), tail.size(), size), static_cast<ssize_t>(tail.size()));
  close(descriptor);
}

// Opens the file and reads "b": that takes the tensor's memory and a little beside.
void ExpectBoundedMemory(const std::filesystem::path& path, int64_t elements) {
  ResetPeakMemory();
  const int64_t before = ProcessBytes("VmRSS:");
  ASSERT_OK_AND_ASSIGN(const WeightFile file, OpenWeightFile(path));
  const StoredTensor* tensor = Find(file, "b");
  ASSERT_NE(tensor, nullptr);
  ASSERT_EQ(tensor->elements(), elements);
  std::vector<float> values(static_cast<size_t>(elements), 1.0f);
  ASSERT_OK(ReadTensorAsFloat(file, *tensor, values));
  EXPECT_EQ(values.front(), 0);
  EXPECT_EQ(values.back(), 0);
  const int64_t peak = ProcessBytes("VmHWM:");
  if (!testing::kSanitized) {
    EXPECT_LE(peak - before, 4 * elements + 16 * kMiB);
  }
}

TEST(WeightFileTest, TakesTheMemoryOfTheTensorsReadFromALargeSafetensors) {
  const testing::TempFolder folder;
  const std::string header =
      absl::StrCat(R"({"a":{"dtype":"F32","shape":[)", 65 * kMiB, R"(],"data_offsets":[0,)",
                   260 * kMiB, R"(]},"b":{"dtype":"F16","shape":[)", 20 * kMiB,
                   R"(],"data_offsets":[)", 260 * kMiB, ",", 300 * kMiB, "]}}");
  WriteSparse(folder / "w.safetensors", testing::LittleEndian(header.size(), 8) + header,
              static_cast<int64_t>(8 + header.size()) + 300 * kMiB, "");
  ExpectBoundedMemory(folder / "w.safetensors", 20 * kMiB);
}

TEST(WeightFileTest, TakesTheMemoryOfTheTensorsReadFromALargeLegacyFile) {
  const testing::TempFolder folder;
  const std::string object = testing::PickledDict(
      {{"a", testing::PickledTensor(testing::PickledStorageId("FloatStorage", "0", 75 * kMiB), 0,
                                    {75 * kMiB}, {1})},
       // Two rows of the first, turned: strides.
       {"b", testing::PickledTensor(testing::PickledStorageId("FloatStorage", "0", 75 * kMiB),
                                    10 * kMiB, {10, kMiB}, {1, 10})}});
  const std::string head = testing::TorchLegacy(object, {{"0", 75 * kMiB, ""}});
  WriteSparse(folder / "w.pth", head, static_cast<int64_t>(head.size()) + 300 * kMiB, "");
  ExpectBoundedMemory(folder / "w.pth", 10 * kMiB);
}

TEST(WeightFileTest, AFileThatShrinksMeanwhileIsDataLoss) {
  const testing::TempFolder folder;
  const std::filesystem::path path = folder / "w.safetensors";
  ASSERT_OK(WriteFileSynced(path, Bytes("small.safetensors")));
  ASSERT_OK_AND_ASSIGN(const WeightFile file, OpenWeightFile(path));
  std::filesystem::resize_file(path, 600);
  std::vector<float> values(80);
  EXPECT_THAT(ReadTensorAsFloat(file, *Find(file, "head.weight"), values),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("when it was opened")));
}

}  // namespace
}  // namespace pyramid
