#include "server/serving/route.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace pyramid {
namespace {

constexpr size_t kPictureBytes = 1024;  // of a picture that stand for all of it
constexpr uint64_t kBuckets = 10'000;   // a hundredth of a percent

// FNV-1a, 64 bits.
uint64_t Fnv(absl::string_view bytes, uint64_t hash) {
  for (const char c : bytes) {
    hash ^= static_cast<uint8_t>(c);
    hash *= 0x100000001b3;
  }
  return hash;
}

constexpr uint64_t kFnvStart = 0xcbf29ce484222325;

// Lets every bit of the input reach every bit of the output: the last step of MurmurHash3.
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccd;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53;
  return x ^ (x >> 33);
}

// The size and the bytes in the middle: a file's head is alike in many pictures.
uint64_t KeyOfBytes(const Pieces& bytes) {
  const size_t length = std::min(bytes.size(), kPictureBytes);
  uint64_t key = Fnv(absl::StrCat(bytes.size()), kFnvStart);
  for (const absl::string_view piece : bytes.Sub((bytes.size() - length) / 2, length)) {
    key = Fnv(piece, key);
  }
  return key;
}

absl::Status BadReference(absl::string_view text, absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("model is \"",
                                                 absl::CHexEscape(text.substr(0, 128)), "\": ", why,
                                                 "; use NAME, NAME:VERSION or NAME@ALIAS"));
}

}  // namespace

absl::string_view ModelNameOf(absl::string_view text) {
  return text.substr(0, text.find_first_of(":@"));
}

absl::StatusOr<ModelReference> ParseModelReference(absl::string_view text, int64_t version) {
  ModelReference reference;
  reference.name = ModelNameOf(text);
  reference.version = version;
  if (reference.name.size() == text.size()) return reference;
  if (reference.name.empty()) return BadReference(text, "it has no name");
  const absl::string_view rest = text.substr(reference.name.size() + 1);
  if (text[reference.name.size()] == '@') {
    if (rest.empty()) return BadReference(text, "the alias is empty");
    if (version != 0) {
      return BadReference(text, absl::StrCat("it names an alias, and version is ", version));
    }
    reference.alias = rest;
    return reference;
  }
  if (!absl::SimpleAtoi(rest, &reference.version) || reference.version < 1) {
    return BadReference(text, "the version is no number from 1");
  }
  if (version != 0 && version != reference.version) {
    return BadReference(text, absl::StrCat("version is ", version, " beside it"));
  }
  return reference;
}

uint64_t RouteKeyOf(absl::string_view text) { return Fnv(text, kFnvStart); }

uint64_t RouteKeyOf(const v1::ClassifyRequest& request, const Pieces& first_picture) {
  if (!request.sticky_key().empty()) return RouteKeyOf(request.sticky_key());
  if (!request.request_id().empty()) return RouteKeyOf(request.request_id());
  return KeyOfBytes(first_picture);
}

bool GoesToTrafficAlias(const v1::ModelState& state, uint64_t key) {
  if (state.traffic_alias().empty() || state.traffic_percent() <= 0) return false;
  const uint64_t bucket = Mix(Fnv(state.name(), kFnvStart) ^ key) % kBuckets;
  return static_cast<double>(bucket) < state.traffic_percent() * (kBuckets / 100);
}

}  // namespace pyramid
