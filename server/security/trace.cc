#include "server/security/trace.h"

#include <algorithm>
#include <cstdint>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace pyramid {
namespace {

// Ids must be unique, not secret.
uint64_t RandomBits() {
  thread_local std::mt19937_64 generator = [] {
    std::random_device device;
    std::seed_seq seed{device(), device(), device(), device(), device(), device()};
    return std::mt19937_64(seed);
  }();
  uint64_t bits = 0;
  while (bits == 0) bits = generator();  // an id of zeros is none
  return bits;
}

std::string NewId64() { return absl::StrFormat("%016x", RandomBits()); }
std::string NewId128() { return absl::StrCat(NewId64(), NewId64()); }

// Lower-case only, as the specification has it.
bool IsHex(absl::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

bool IsZero(absl::string_view text) { return text.find_first_not_of('0') == text.npos; }

}  // namespace

std::string TraceContext::Header() const {
  return absl::StrCat("00-", trace_id, "-", parent_id, "-", flags);
}

TraceContext ContinueTrace(absl::string_view given) {
  TraceContext trace{.parent_id = NewId64(), .flags = "00"};
  // version-trace-parent-flags: 2, 32, 16 and 2 digits; later versions may add fields.
  constexpr size_t kLength = 55;
  const bool shaped = given.size() >= kLength && given[2] == '-' && given[35] == '-' &&
                      given[52] == '-' && (given.size() == kLength || given[kLength] == '-');
  if (shaped) {
    const absl::string_view version = given.substr(0, 2);
    const absl::string_view trace_id = given.substr(3, 32);
    const absl::string_view parent = given.substr(36, 16);
    const absl::string_view flags = given.substr(53, 2);
    const bool valid = IsHex(version) && version != "ff" &&
                       (version != "00" || given.size() == kLength) && IsHex(trace_id) &&
                       !IsZero(trace_id) && IsHex(parent) && !IsZero(parent) && IsHex(flags);
    if (valid) {
      trace.trace_id = std::string(trace_id);
      trace.flags = std::string(flags);
      return trace;
    }
  }
  trace.trace_id = NewId128();
  return trace;
}

std::string RequestIdFrom(absl::string_view given) {
  const bool usable =
      !given.empty() && given.size() <= 128 && std::all_of(given.begin(), given.end(), [](char c) {
        return c > ' ' && c < 0x7f && c != '"' && c != '\'' && c != '\\';
      });
  return usable ? std::string(given) : NewId128();
}

}  // namespace pyramid
