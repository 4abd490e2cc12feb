// Bytes in one place or in several, in order: a tensor as it came from the network, in the buffers
// that it was received in. Owns nothing.
#ifndef PYRAMID_SERVER_SERVING_PIECES_H_
#define PYRAMID_SERVER_SERVING_PIECES_H_

#include <algorithm>
#include <cstring>
#include <string>

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

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_PIECES_H_
