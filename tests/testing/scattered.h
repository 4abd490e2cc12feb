// Floats as they come from a network: in pieces, anywhere.
#ifndef PYRAMID_TESTS_TESTING_SCATTERED_H_
#define PYRAMID_TESTS_TESTING_SCATTERED_H_

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "absl/strings/string_view.h"
#include "proto/base/pieces.h"

namespace pyramid::testing {

// Numbers in bytes that begin `shift` bytes into a buffer, cut at random places; at every one if
// `longest` is 1.
class Scattered {
 public:
  Scattered(std::span<const float> values, size_t shift, size_t longest, unsigned seed) {
    bytes_.resize(shift + values.size() * sizeof(float));
    std::memcpy(bytes_.data() + shift, values.data(), values.size() * sizeof(float));
    std::mt19937 random(seed);
    for (size_t at = shift; at < bytes_.size();) {
      const size_t length = std::min(bytes_.size() - at, 1 + random() % longest);
      pieces_.Add(absl::string_view(bytes_.data() + at, length));
      at += length;
    }
  }
  Scattered(Scattered&&) = default;  // what is moved stays where it is
  const Pieces& pieces() const { return pieces_; }

 private:
  std::vector<char> bytes_;
  Pieces pieces_;
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_SCATTERED_H_
