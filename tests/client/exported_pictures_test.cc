#include "client/exported_pictures.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::StatusIs;

constexpr auto kDataLoss = absl::StatusCode::kDataLoss;

std::string Number(uint32_t value) {
  std::string bytes;
  for (int i = 0; i < 4; ++i) bytes += static_cast<char>(value >> (8 * i) & 0xff);
  return bytes;
}

std::string Record(uint32_t label, const std::string& bytes) {
  return Number(label) + Number(static_cast<uint32_t>(bytes.size())) + bytes;
}

// Hands out `text` in pieces of at most `piece` bytes.
ExportedPictures::Source Pieces(std::string text, size_t piece) {
  return [text = std::move(text), piece, at = size_t{0}](
             char* to, size_t size) mutable -> absl::StatusOr<size_t> {
    const size_t count = std::min({size, piece, text.size() - at});
    std::memcpy(to, text.data() + at, count);
    at += count;
    return count;
  };
}

const char kHead[] = "{\"count\":2,\"classes\":[\"cat\",\"dog\"]}\n";

// The error of reading it to its end.
absl::Status ReadAll(const std::string& text) {
  absl::StatusOr<ExportedPictures> pictures = ExportedPictures::Open(Pieces(text, 1000));
  if (!pictures.ok()) return pictures.status();
  while (true) {
    const absl::StatusOr<std::optional<LabelledPicture>> picture = pictures->Next();
    if (!picture.ok()) return picture.status();
    if (!picture->has_value()) return absl::OkStatus();
  }
}

TEST(ExportedPicturesTest, ReadsThemWhateverThePieces) {
  const std::string large(200'000, 'x');
  const std::string text = kHead + Record(1, "PNG!") + Record(0, large);
  for (const size_t piece : {size_t{1}, size_t{7}, size_t{65536}, size_t{1} << 20}) {
    absl::StatusOr<ExportedPictures> pictures = ExportedPictures::Open(Pieces(text, piece));
    ASSERT_OK(pictures);
    EXPECT_EQ(pictures->count(), 2);
    EXPECT_THAT(pictures->classes(), ElementsAre("cat", "dog"));
    ASSERT_OK_AND_ASSIGN(const std::optional<LabelledPicture> first, pictures->Next());
    ASSERT_TRUE(first.has_value());
    EXPECT_EQ(first->label, 1);
    EXPECT_EQ(first->bytes, "PNG!");
    ASSERT_OK_AND_ASSIGN(const std::optional<LabelledPicture> second, pictures->Next());
    ASSERT_TRUE(second.has_value());
    EXPECT_EQ(second->bytes, large);
    ASSERT_OK_AND_ASSIGN(const std::optional<LabelledPicture> end, pictures->Next());
    EXPECT_FALSE(end.has_value());
  }
}

TEST(ExportedPicturesTest, RefusesABadFirstLine) {
  for (const std::string line :
       {"", "no line end", "not json\n", "[]\n", "{\"count\":1}\n",
        "{\"count\":-1,\"classes\":[]}\n", "{\"count\":\"1\",\"classes\":[]}\n"}) {
    EXPECT_THAT(ReadAll(line), StatusIs(kDataLoss, HasSubstr("first line"))) << line;
  }
}

TEST(ExportedPicturesTest, EveryTruncationIsAnError) {
  const std::string text = kHead + Record(1, "PNG!") + Record(0, "more");
  for (size_t size = 0; size < text.size(); ++size) {
    EXPECT_THAT(ReadAll(text.substr(0, size)), StatusIs(kDataLoss, HasSubstr("exported pictures")))
        << size;
  }
  EXPECT_OK(ReadAll(text));
}

TEST(ExportedPicturesTest, RefusesMoreThanItsCount) {
  EXPECT_THAT(ReadAll(kHead + Record(1, "a") + Record(0, "b") + Record(0, "c")),
              StatusIs(kDataLoss, HasSubstr("goes on after all 2")));
}

TEST(ExportedPicturesTest, DoesNotTrustLabelsAndLengths) {
  EXPECT_THAT(ReadAll(kHead + Record(2, "a")), StatusIs(kDataLoss, HasSubstr("label 2")));
  EXPECT_THAT(ReadAll(kHead + Record(0, "")), StatusIs(kDataLoss, HasSubstr("has 0 bytes")));
  EXPECT_THAT(ReadAll(kHead + Number(0) + Number(0xffffffff)),
              StatusIs(kDataLoss, HasSubstr("4294967295 bytes")));
}

TEST(ExportedPicturesTest, PassesAReadErrorOn) {
  const absl::StatusOr<ExportedPictures> pictures = ExportedPictures::Open(
      [](char*, size_t) -> absl::StatusOr<size_t> { return absl::InternalError("broken pipe"); });
  EXPECT_THAT(pictures, StatusIs(absl::StatusCode::kInternal, HasSubstr("broken pipe")));
}

}  // namespace
}  // namespace pyramid
