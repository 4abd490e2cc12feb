#include "client/exported_pictures.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr size_t kPiece = 1 << 16;
constexpr size_t kLongestLine = 16 << 20;  // class names
constexpr uint32_t kLargestPicture = 64 << 20;

uint32_t LittleEndian32(const char* bytes) {
  uint32_t value = 0;
  for (int i = 3; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(bytes[i]);
  return value;
}

}  // namespace

absl::StatusOr<ExportedPictures> ExportedPictures::Open(Source source) {
  ExportedPictures pictures(std::move(source));
  size_t end;
  while ((end = pictures.buffer_.find('\n')) == std::string::npos) {
    if (pictures.buffer_.size() > kLongestLine) {
      return absl::DataLossError("exported pictures: the first line doesn't end");
    }
    const size_t had = pictures.buffer_.size();
    pictures.buffer_.resize(had + kPiece);
    ASSIGN_OR_RETURN(const size_t got, pictures.source_(pictures.buffer_.data() + had, kPiece));
    pictures.buffer_.resize(had + got);
    if (got == 0) return absl::DataLossError("exported pictures: no first line");
  }
  const nlohmann::json head = nlohmann::json::parse(
      pictures.buffer_.begin(), pictures.buffer_.begin() + static_cast<std::ptrdiff_t>(end),
      nullptr, /*allow_exceptions=*/false);
  if (!head.is_object() || !head.contains("count") || !head["count"].is_number_integer() ||
      head["count"] < 0 || !head.contains("classes") || !head["classes"].is_array()) {
    return absl::DataLossError(
        "exported pictures: the first line isn't {\"count\": N, \"classes\": [...]}");
  }
  pictures.count_ = head["count"].get<int64_t>();
  for (const nlohmann::json& name : head["classes"]) {
    pictures.classes_.push_back(name.is_string() ? name.get<std::string>() : name.dump());
  }
  pictures.consumed_ = end + 1;
  return pictures;
}

absl::StatusOr<bool> ExportedPictures::ReadExactly(char* to, size_t size) {
  size_t done = std::min(size, buffer_.size() - consumed_);
  std::memcpy(to, buffer_.data() + consumed_, done);
  consumed_ += done;
  while (done < size) {
    if (size - done >= kPiece) {  // large pictures go straight to where they belong
      ASSIGN_OR_RETURN(const size_t got, source_(to + done, size - done));
      if (got == 0) break;
      done += got;
      continue;
    }
    buffer_.resize(kPiece);
    consumed_ = 0;
    ASSIGN_OR_RETURN(const size_t got, source_(buffer_.data(), kPiece));
    buffer_.resize(got);
    if (got == 0) break;
    const size_t taken = std::min(size - done, got);
    std::memcpy(to + done, buffer_.data(), taken);
    consumed_ = taken;
    done += taken;
  }
  if (done == size) return true;
  if (done == 0) return false;
  return absl::DataLossError(
      absl::StrCat("exported pictures: the stream ends in picture ", read_ + 1, " of ", count_));
}

absl::StatusOr<std::optional<LabelledPicture>> ExportedPictures::Next() {
  char head[8];
  ASSIGN_OR_RETURN(const bool more, ReadExactly(head, sizeof(head)));
  if (!more) {
    if (read_ == count_) return std::nullopt;
    return absl::DataLossError(absl::StrCat("exported pictures: the stream ends after ", read_,
                                            " of ", count_, " pictures"));
  }
  if (read_ == count_) {
    return absl::DataLossError(
        absl::StrCat("exported pictures: the stream goes on after all ", count_, " pictures"));
  }
  const uint32_t label = LittleEndian32(head);
  const uint32_t size = LittleEndian32(head + 4);
  if (label >= classes_.size()) {
    return absl::DataLossError(absl::StrCat("exported pictures: picture ", read_ + 1, " has label ",
                                            label, "; there are ", classes_.size(), " classes"));
  }
  if (size == 0 || size > kLargestPicture) {
    return absl::DataLossError(absl::StrCat("exported pictures: picture ", read_ + 1, " has ", size,
                                            " bytes; 1..", kLargestPicture, " are possible"));
  }
  LabelledPicture picture{.label = static_cast<int>(label), .bytes = std::string(size, '\0')};
  ASSIGN_OR_RETURN(const bool whole, ReadExactly(picture.bytes.data(), size));
  if (!whole) {
    return absl::DataLossError(
        absl::StrCat("exported pictures: the stream ends in picture ", read_ + 1, " of ", count_));
  }
  ++read_;
  return picture;
}

}  // namespace pyramid
