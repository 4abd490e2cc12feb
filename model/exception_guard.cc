#include "model/exception_guard.h"

#include <cxxabi.h>

#include <cstdlib>
#include <exception>
#include <new>
#include <string>
#include <typeinfo>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "proto/base/log.h"

namespace pyramid {
namespace {

std::string Demangled(const std::type_info& type) {
  int status = 0;
  char* text = abi::__cxa_demangle(type.name(), nullptr, nullptr, &status);
  std::string name = status == 0 ? text : type.name();
  std::free(text);
  return name;
}

// By type or by words: the libraries' own exception types aren't visible from here, and LibTorch's
// CPU allocator throws a plain c10::Error.
bool IsOutOfMemory(absl::string_view type, absl::string_view message) {
  if (absl::EndsWith(type, "OutOfMemoryError")) return true;
  for (absl::string_view words : {"not enough memory", "can't allocate memory", "out of memory",
                                  "Insufficient memory", "Failed to allocate"}) {
    if (absl::StrContains(message, words)) return true;
  }
  return false;
}

}  // namespace

absl::Status StatusOfCurrentException(absl::string_view what, absl::StatusCode code) {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(absl::StrCat(what, ": out of memory"));
  } catch (const std::exception& e) {
    const absl::string_view text = e.what();
    // c10::Error: the message, then "Exception raised from <function> at <file>" and the backtrace.
    const size_t trace = text.find("Exception raised from");
    const absl::string_view message = absl::StripAsciiWhitespace(text.substr(0, trace));
    const std::string type = Demangled(typeid(e));
    if (IsOutOfMemory(type, message)) {
      return absl::ResourceExhaustedError(absl::StrCat(what, ": ", message));
    }
    if (code == absl::StatusCode::kInternal) {
      log::Error("exception", {{"in", what}, {"type", type}, {"text", text}});
    }
    return absl::Status(code, absl::StrCat(what, ": ", message.empty() ? type : message));
  } catch (...) {
    return absl::Status(code, absl::StrCat(what, ": an exception that isn't a std::exception"));
  }
}

}  // namespace pyramid
