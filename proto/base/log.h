// Events with fields, one line each on standard error: log::Info("checkpoint_saved", {{"job", id},
// {"step", step}}).
//
// Info: a state change worth knowing at night. Warning: degraded, still working. Error: someone
// must act. Thread-safe. Libraries return errors; processes log them.
#ifndef PYRAMID_PROTO_BASE_LOG_H_
#define PYRAMID_PROTO_BASE_LOG_H_

#include <initializer_list>
#include <string>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pyramid::log {

struct Field {
  enum class Kind { kText, kNumber, kBool };
  template <typename T>
  Field(absl::string_view field_name, const T& field_value)  // NOLINT(google-explicit-constructor)
      : name(field_name), value(absl::StrCat(field_value)) {
    if (std::is_same_v<T, bool>) {
      kind = Kind::kBool;
    } else if (std::is_arithmetic_v<T>) {
      kind = Kind::kNumber;
    }
  }
  absl::string_view name;
  std::string value;
  Kind kind = Kind::kText;
};

enum class Level { kDebug, kInfo, kWarning, kError, kOff };

// Lines below `level` are dropped. Default kInfo. `json`: one JSON object a line instead of text:
// {"time": …, "level": …, "event": …, and the fields}; numbers are numbers there.
void Configure(Level level, bool json = false);

void Debug(absl::string_view event, std::initializer_list<Field> fields = {});
void Info(absl::string_view event, std::initializer_list<Field> fields = {});
void Warning(absl::string_view event, std::initializer_list<Field> fields = {});
void Error(absl::string_view event, std::initializer_list<Field> fields = {});

}  // namespace pyramid::log

#endif  // PYRAMID_PROTO_BASE_LOG_H_
