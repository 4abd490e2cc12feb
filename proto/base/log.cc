#include "proto/base/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "proto/base/utf8.h"

namespace pyramid::log {
namespace {

std::atomic<bool> use_json{false};

spdlog::logger& Logger() {
  static const std::shared_ptr<spdlog::logger> logger = [] {
    auto made = spdlog::stderr_logger_mt("pyramid");
    made->set_pattern("%Y-%m-%dT%H:%M:%S.%e %L %v");
    made->flush_on(spdlog::level::debug);
    return made;
  }();
  return *logger;
}

void AppendEscape(std::string& out, unsigned char code) {
  absl::StrAppend(&out, "\\u00", absl::Hex(code, absl::kZeroPad2));
}

// As a JSON string. Control characters and what isn't UTF-8 never reach the log as they are: text
// of a caller's can't end a line, move a cursor, or break a reader of JSON.
void AppendQuoted(std::string& out, absl::string_view value) {
  out += '"';
  for (size_t at = 0; at < value.size();) {
    const size_t length = Utf8Length(value.substr(at));
    const auto first = static_cast<unsigned char>(value[at]);
    if (length == 0) {
      out += "\\ufffd";
    } else if (length == 1 && (first == '"' || first == '\\')) {
      out += '\\';
      out += value[at];
    } else if (first == '\n') {
      out += "\\n";
    } else if (first < 0x20 || first == 0x7f) {
      AppendEscape(out, first);
    } else if (first == 0xc2 && static_cast<unsigned char>(value[at + 1]) < 0xa0) {
      AppendEscape(out, static_cast<unsigned char>(value[at + 1]));  // U+0080 … U+009F
    } else {
      absl::StrAppend(&out, value.substr(at, length));
    }
    at += std::max<size_t>(length, 1);
  }
  out += '"';
}

bool IsPlain(absl::string_view value) {
  if (value.empty()) return false;
  for (const char c : value) {
    if (c <= ' ' || c == '"' || c == '\\' || c == '=' || c >= 0x7f) return false;
  }
  return true;
}

void AppendJson(std::string& out, const Field& field) {
  // "inf" and "nan" are no numbers to JSON.
  const bool number = field.kind == Field::Kind::kNumber &&
                      field.value.find_first_not_of("0123456789+-.e") == std::string::npos;
  if (number) {
    out += field.value;
  } else if (field.kind == Field::Kind::kBool) {
    out += field.value == "1" ? "true" : "false";
  } else {
    AppendQuoted(out, field.value);
  }
}

void Write(spdlog::level::level_enum level, absl::string_view event,
           std::initializer_list<Field> fields) {
  spdlog::logger& logger = Logger();
  if (!logger.should_log(level)) return;
  std::string line;
  if (use_json.load(std::memory_order_relaxed)) {
    line = "\"event\":";
    AppendQuoted(line, event);
    for (const Field& field : fields) {
      line += ',';
      AppendQuoted(line, field.name);
      line += ':';
      AppendJson(line, field);
    }
  } else {
    line = std::string(event);
    for (const Field& field : fields) {
      absl::StrAppend(&line, " ", field.name, "=");
      if (IsPlain(field.value)) {
        line += field.value;
      } else {
        AppendQuoted(line, field.value);
      }
    }
  }
  logger.log(level, "{}", line);
}

}  // namespace

void Configure(Level level, bool json) {
  static constexpr spdlog::level::level_enum kLevels[] = {spdlog::level::debug, spdlog::level::info,
                                                          spdlog::level::warn, spdlog::level::err,
                                                          spdlog::level::off};
  Logger().set_level(kLevels[static_cast<int>(level)]);
  use_json = json;
  Logger().set_pattern(json ? "{\"time\":\"%Y-%m-%dT%H:%M:%S.%e%z\",\"level\":\"%l\",%v}"
                            : "%Y-%m-%dT%H:%M:%S.%e %L %v");
}

void Debug(absl::string_view event, std::initializer_list<Field> fields) {
  Write(spdlog::level::debug, event, fields);
}
void Info(absl::string_view event, std::initializer_list<Field> fields) {
  Write(spdlog::level::info, event, fields);
}
void Warning(absl::string_view event, std::initializer_list<Field> fields) {
  Write(spdlog::level::warn, event, fields);
}
void Error(absl::string_view event, std::initializer_list<Field> fields) {
  Write(spdlog::level::err, event, fields);
}

}  // namespace pyramid::log
