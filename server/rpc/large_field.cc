#include "server/rpc/large_field.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/strings/string_view.h"

namespace pyramid {
namespace {

constexpr size_t kLeast = 4096;
constexpr size_t kMost = 2 << 20;
constexpr size_t kMostRest = 64 << 10;
constexpr int kTagBytes = 5;  // of a tag or a length
constexpr int kVarintBytes = 10;

enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kDelimited = 2, kFixed32 = 5 };

// Reads the pieces of a message one after the other.
class Reader {
 public:
  explicit Reader(const Pieces& message) : message_(message), piece_(message.begin()) {}

  size_t position() const { return position_; }

  // Of at most `longest` bytes.
  bool Varint(int longest, uint64_t& value) {
    value = 0;
    for (int shift = 0; shift < 7 * longest; shift += 7) {
      if (!More()) return false;
      const auto byte = static_cast<uint8_t>((*piece_)[offset_]);
      Advance(1);
      value |= uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  // False: there aren't so many left.
  bool Take(size_t length, Pieces& taken) {
    while (length > 0) {
      if (!More()) return false;
      const size_t here = std::min(length, piece_->size() - offset_);
      taken.Add(piece_->substr(offset_, here));
      Advance(here);
      length -= here;
    }
    return true;
  }

 private:
  bool More() const { return piece_ != message_.end(); }
  void Advance(size_t length) {
    position_ += length;
    offset_ += length;
    if (offset_ == piece_->size()) {
      ++piece_;
      offset_ = 0;
    }
  }

  const Pieces& message_;
  decltype(message_.begin()) piece_;
  size_t offset_ = 0;    // in it
  size_t position_ = 0;  // in the message
};

void AppendVarint(uint64_t value, std::string& out) {
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>(value | 0x80));
  out.push_back(static_cast<char>(value));
}

class Finder {
 public:
  Finder(const Pieces& message, std::span<const int> path) : reader_(message), path_(path) {}

  // The message at `level` of the path, which ends at `end`. False: FindLargeFields finds nothing.
  bool Message(size_t level, size_t end, std::string& rest) {
    bool found = false;
    while (reader_.position() < end) {
      uint64_t tag = 0;
      if (!reader_.Varint(kTagBytes, tag) || tag >> 3 == 0 || tag > UINT32_MAX) return false;
      const auto type = static_cast<uint32_t>(tag & 7);
      const bool on_path = tag >> 3 == static_cast<uint64_t>(path_[level]);
      if (on_path && level > 0 && std::exchange(found, true)) return false;
      AppendVarint(tag, rest);
      if (on_path && type == kDelimited) {
        if (level == 0) ++index_;
        if (!OnPath(level, end, rest)) return false;
      } else if (!Copy(type, end, rest)) {
        return false;
      }
      if (rest.size() > kMostRest) return false;
    }
    return reader_.position() == end;
  }

  std::vector<LargeField> large() && { return std::move(large_); }

 private:
  bool OnPath(size_t level, size_t end, std::string& rest) {
    size_t length = 0;
    if (!Length(end, length)) return false;
    if (level + 1 < path_.size()) {
      std::string inner;
      if (!Message(level + 1, reader_.position() + length, inner)) return false;
      AppendVarint(inner.size(), rest);
      rest += inner;
      return true;
    }
    if (length < kLeast) return CopyBytes(length, rest);
    if (length > kMost || length % sizeof(float) != 0) return false;
    AppendVarint(0, rest);
    LargeField& field = large_.emplace_back();
    field.index = index_;
    return reader_.Take(length, field.bytes);
  }

  bool Copy(uint32_t type, size_t end, std::string& rest) {
    uint64_t value = 0;
    size_t length = 0;
    Pieces fixed;
    switch (type) {
      case kVarint:
        if (!reader_.Varint(kVarintBytes, value)) return false;
        AppendVarint(value, rest);
        return true;
      case kDelimited:
        return Length(end, length) && CopyBytes(length, rest);
      case kFixed64:
      case kFixed32:
        if (!reader_.Take(type == kFixed64 ? 8 : 4, fixed)) return false;
        fixed.AppendTo(rest);
        return true;
      default:
        return false;
    }
  }

  bool Length(size_t end, size_t& length) {
    uint64_t value = 0;
    if (!reader_.Varint(kTagBytes, value) || reader_.position() > end ||
        value > end - reader_.position()) {
      return false;
    }
    length = static_cast<size_t>(value);
    return true;
  }

  bool CopyBytes(size_t length, std::string& rest) {
    Pieces bytes;
    if (length > kMostRest || !reader_.Take(length, bytes)) return false;
    AppendVarint(length, rest);
    bytes.AppendTo(rest);
    return true;
  }

  Reader reader_;
  const std::span<const int> path_;
  int index_ = -1;
  std::vector<LargeField> large_;
};

}  // namespace

std::optional<MessageAround> FindLargeFields(const Pieces& message, std::span<const int> path) {
  MessageAround around;
  Finder finder(message, path);
  if (!finder.Message(0, message.size(), around.rest)) return std::nullopt;
  around.large = std::move(finder).large();
  if (around.large.empty()) return std::nullopt;
  return around;
}

}  // namespace pyramid
