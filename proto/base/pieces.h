// Bytes in one place or in several, in order: a tensor as it came from the network, in the buffers
// that it was received in. Owns nothing. And the reading of floats that lie so.
#ifndef PYRAMID_PROTO_BASE_PIECES_H_
#define PYRAMID_PROTO_BASE_PIECES_H_

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/strings/string_view.h"

namespace pyramid {

class Pieces {
 public:
  Pieces() = default;
  Pieces(absl::string_view whole) { Add(whole); }

  void Add(absl::string_view piece) {
    if (piece.empty()) return;
    pieces_.push_back(piece);
    size_ += piece.size();
  }

  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }

  // `length` bytes from `first` on, as far as there are so many.
  Pieces Sub(size_t first, size_t length) const {
    Pieces sub;
    for (const absl::string_view piece : pieces_) {
      if (first < piece.size()) {
        sub.Add(piece.substr(first, length - sub.size()));
        first = 0;
      } else {
        first -= piece.size();
      }
      if (sub.size() == length) break;
    }
    return sub;
  }

  void CopyTo(void* out) const {
    char* to = static_cast<char*>(out);
    for (const absl::string_view piece : pieces_) {
      std::memcpy(to, piece.data(), piece.size());
      to += piece.size();
    }
  }

  // Whether they can be read as an array of floats where they are.
  bool LieAsFloats() const {
    return whole() && reinterpret_cast<uintptr_t>(Whole().data()) % alignof(float) == 0;
  }

  void AppendTo(std::string& out) const {
    for (const absl::string_view piece : pieces_) out.append(piece.data(), piece.size());
  }

  // Whether Whole() can be had.
  bool whole() const { return pieces_.size() <= 1; }
  absl::string_view Whole() const { return pieces_.empty() ? absl::string_view() : pieces_[0]; }

  auto begin() const { return pieces_.begin(); }
  auto end() const { return pieces_.end(); }

 private:
  absl::InlinedVector<absl::string_view, 1> pieces_;  // none is empty
  size_t size_ = 0;
};

// `pictures` of as many floats each, one after the other.
inline std::vector<Pieces> PiecesOf(std::span<const float> pixels, int pictures) {
  std::vector<Pieces> all;
  const size_t each = pixels.size() / static_cast<size_t>(std::max(1, pictures));
  for (int i = 0; i < pictures; ++i) {
    const std::span<const float> picture = pixels.subspan(static_cast<size_t>(i) * each, each);
    all.emplace_back(absl::string_view(reinterpret_cast<const char*>(picture.data()),
                                       picture.size() * sizeof(float)));
  }
  return all;
}

// Reads floats in order, wherever they lie.
class FloatReader {
 public:
  static constexpr size_t kMost = 512;  // at a time

  // From number `first` on. `floats` must outlive the reader.
  FloatReader(const Pieces& floats, size_t first) : piece_(floats.begin()), end_(floats.end()) {
    at_ = first * sizeof(float);
    while (piece_ != end_ && at_ >= piece_->size()) at_ -= (piece_++)->size();
  }

  // The next `count` <= kMost, of which there must be as many: where they are, or copied. Valid
  // until the next call.
  const float* Next(size_t count) {
    const size_t bytes = count * sizeof(float);
    if (piece_ != end_ && piece_->size() - at_ >= bytes) {
      const char* here = piece_->data() + at_;
      Skip(bytes);
      if (reinterpret_cast<uintptr_t>(here) % alignof(float) == 0) {
        return reinterpret_cast<const float*>(here);
      }
      std::memcpy(copy_, here, bytes);
      return copy_;
    }
    for (size_t copied = 0; copied < bytes && piece_ != end_;) {
      const size_t some = std::min(bytes - copied, piece_->size() - at_);
      std::memcpy(reinterpret_cast<char*>(copy_) + copied, piece_->data() + at_, some);
      copied += some;
      Skip(some);
    }
    return copy_;
  }

 private:
  using Piece = decltype(std::declval<const Pieces&>().begin());

  void Skip(size_t bytes) {
    at_ += bytes;
    if (at_ != piece_->size()) return;
    ++piece_;
    at_ = 0;
  }

  Piece piece_;
  Piece end_;
  size_t at_ = 0;  // within the piece
  alignas(64) float copy_[kMost];
};

// Infinities and NaNs have all bits of the exponent. Without an exit from the loop it takes 15 µs
// for 150,528 floats instead of 56.
inline bool AllFinite(const float* values, size_t count) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t any = 0;
  for (size_t i = 0; i < count; ++i) {
    any |= (std::bit_cast<uint32_t>(values[i]) & kExponent) == kExponent ? 1 : 0;
  }
  return any == 0;
}

// The place of the first float that isn't finite; how many there are if all are.
inline size_t FirstNotFinite(const Pieces& floats) {
  const size_t all = floats.size() / sizeof(float);
  FloatReader reader(floats, 0);
  for (size_t first = 0; first < all;) {
    const size_t count = std::min(FloatReader::kMost, all - first);
    const float* values = reader.Next(count);
    for (size_t i = 0; i < count; ++i) {
      if (!AllFinite(values + i, 1)) return first + i;
    }
    first += count;
  }
  return all;
}

}  // namespace pyramid

#endif  // PYRAMID_PROTO_BASE_PIECES_H_
