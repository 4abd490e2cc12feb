#include "client/npy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::StatusIs;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kDataLoss = absl::StatusCode::kDataLoss;

std::string Bytes(const std::vector<float>& values) {
  std::string bytes(values.size() * sizeof(float), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

// A file as numpy.save writes it: the header padded with spaces to a multiple of 64, then a line
// feed.
std::string Npy(std::string header, absl::string_view data, int version = 1) {
  const size_t before = version == 1 ? 10 : 12;
  while ((before + header.size() + 1) % 64 != 0) header += ' ';
  header += '\n';
  std::string file = "\x93NUMPY";
  file += static_cast<char>(version);
  file += '\0';
  for (int i = 0; i < (version == 1 ? 2 : 4); ++i) {
    file += static_cast<char>(header.size() >> (8 * i) & 0xff);
  }
  return absl::StrCat(file, header, data);
}

std::string Header(const std::string& shape, const std::string& descr = "'<f4'",
                   const std::string& order = "False") {
  return absl::StrCat("{'descr': ", descr, ", 'fortran_order': ", order, ", 'shape': ", shape,
                      ", }");
}

const std::vector<float> kTwelve = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};

TEST(NpyTest, ReadsVersions1And2) {
  for (const int version : {1, 2}) {
    const absl::StatusOr<NpyTensor> tensor =
        ParseNpy(Npy(Header("(2, 1, 2, 3)"), Bytes(kTwelve), version));
    ASSERT_OK(tensor);
    EXPECT_EQ(tensor->batch, 2);
    EXPECT_EQ(tensor->channels, 1);
    EXPECT_EQ(tensor->height, 2);
    EXPECT_EQ(tensor->width, 3);
    EXPECT_EQ(tensor->values, kTwelve);
    const std::span<const float> second = tensor->picture(1);
    EXPECT_THAT(std::vector<float>(second.begin(), second.end()), ElementsAre(6, 7, 8, 9, 10, 11));
  }
}

TEST(NpyTest, RefusesOtherFiles) {
  EXPECT_THAT(ParseNpy(""), StatusIs(kInvalid, HasSubstr("not a NumPy array file")));
  EXPECT_THAT(ParseNpy("\x89PNG\r\n"), StatusIs(kInvalid, HasSubstr("not a NumPy array file")));
}

TEST(NpyTest, RefusesVersion3) {
  EXPECT_THAT(ParseNpy(Npy(Header("(1, 1, 2, 6)"), Bytes(kTwelve), 3)),
              StatusIs(kInvalid, HasSubstr("header version 3")));
}

TEST(NpyTest, RefusesOtherDtypesAndNamesThem) {
  for (const std::string dtype : {"'<f8'", "'>f4'", "'|u1'", "[('a', '<f4')]"}) {
    EXPECT_THAT(ParseNpy(Npy(Header("(1, 1, 2, 6)", dtype), Bytes(kTwelve))),
                StatusIs(kInvalid, HasSubstr("the dtype is")))
        << dtype;
  }
  EXPECT_THAT(ParseNpy(Npy(Header("(1, 1, 2, 6)", "'<f8'"), Bytes(kTwelve))),
              StatusIs(kInvalid, HasSubstr("'<f8'")));
}

TEST(NpyTest, RefusesFortranOrder) {
  EXPECT_THAT(ParseNpy(Npy(Header("(1, 1, 2, 6)", "'<f4'", "True"), Bytes(kTwelve))),
              StatusIs(kInvalid, HasSubstr("Fortran order")));
  EXPECT_THAT(ParseNpy(Npy(Header("(1, 1, 2, 6)", "'<f4'", "Maybe"), Bytes(kTwelve))),
              StatusIs(kInvalid, HasSubstr("neither True nor False")));
}

TEST(NpyTest, RefusesOtherShapes) {
  EXPECT_THAT(ParseNpy(Npy(Header("(12,)"), Bytes(kTwelve))),
              StatusIs(kInvalid, HasSubstr("four dimensions")));
  EXPECT_THAT(ParseNpy(Npy(Header("()"), Bytes(kTwelve))),
              StatusIs(kInvalid, HasSubstr("four dimensions")));
  EXPECT_THAT(ParseNpy(Npy(Header("(0, 1, 2, 6)"), "")),
              StatusIs(kInvalid, HasSubstr("at least 1")));
  EXPECT_THAT(ParseNpy(Npy(Header("(1, -1, 2, 6)"), Bytes(kTwelve))),
              StatusIs(kInvalid, HasSubstr("\"-1\"")));
  EXPECT_THAT(ParseNpy(Npy(Header("12"), Bytes(kTwelve))),
              StatusIs(kInvalid, HasSubstr("isn't a tuple")));
}

TEST(NpyTest, RefusesHeadersWithoutAKey) {
  EXPECT_THAT(ParseNpy(Npy("{'descr': '<f4', 'fortran_order': False, }", "")),
              StatusIs(kInvalid, HasSubstr("no shape")));
  EXPECT_THAT(ParseNpy(Npy("{}", "")), StatusIs(kInvalid, HasSubstr("no descr")));
}

TEST(NpyTest, EveryTruncationIsAnError) {
  const std::string whole = Npy(Header("(1, 1, 2, 6)"), Bytes(kTwelve));
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_FALSE(ParseNpy(whole.substr(0, size)).ok()) << size;
  }
  EXPECT_THAT(ParseNpy(whole.substr(0, whole.size() - 1)),
              StatusIs(kDataLoss, HasSubstr("47 bytes of data")));
  EXPECT_THAT(ParseNpy(whole.substr(0, 9)), StatusIs(kDataLoss, HasSubstr("first bytes")));
}

TEST(NpyTest, RefusesMoreDataThanTheShapeTakes) {
  EXPECT_THAT(ParseNpy(Npy(Header("(1, 1, 2, 5)"), Bytes(kTwelve))),
              StatusIs(kDataLoss, HasSubstr("takes 40")));
}

TEST(NpyTest, DoesNotTrustLengths) {
  // A header longer than the file.
  std::string file = Npy(Header("(1, 1, 2, 6)"), Bytes(kTwelve), 2);
  file[11] = '\x7f';
  EXPECT_THAT(ParseNpy(file), StatusIs(kDataLoss, HasSubstr("the header should have")));
  // Products that overflow 64 bits, and sides that overflow int.
  EXPECT_THAT(
      ParseNpy(Npy(Header("(2147483647, 2147483647, 2147483647, 2147483647)"), Bytes(kTwelve))),
      StatusIs(kDataLoss, HasSubstr("too few")));
  EXPECT_THAT(ParseNpy(Npy(Header("(4294967296, 4294967296, 1, 1)"), Bytes(kTwelve))),
              StatusIs(kInvalid, HasSubstr("at least 1")));
}

}  // namespace
}  // namespace pyramid
