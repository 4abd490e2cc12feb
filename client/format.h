// Numbers, times and tables for people; messages as JSON for programs.
#ifndef PYRAMID_CLIENT_FORMAT_H_
#define PYRAMID_CLIENT_FORMAT_H_

#include <google/protobuf/message.h>
#include <google/protobuf/timestamp.pb.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace pyramid {

std::string FormatCount(int64_t value);     // "12,345"
std::string FormatRate(double per_second);  // "1,234", "98.7", "0.53"
std::string FormatBytes(int64_t bytes);     // "14.3 MB", powers of 1000
std::string FormatSeconds(
    double seconds);  // "12 ms", "8.4 s", "2m03s", "1h05m", "3d04h"; "?" if negative or not finite
std::string FormatFraction(double fraction);  // "0.9123"
std::string FormatTime(
    const google::protobuf::Timestamp& time);  // local, "2026-01-31 14:05:09"; "" if unset

// Columns padded to their widest cell (in code points), two spaces apart; no blanks at a line's
// end.
class Table {
 public:
  explicit Table(std::vector<std::string> head) { rows_.push_back(std::move(head)); }
  Table() = default;
  // Right-aligns column `index`.
  Table& Right(size_t index);
  void Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  std::string Text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
  std::vector<bool> right_;
};

// One line, the proto's field names, every field present.
std::string ToJson(const google::protobuf::Message& message);

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_FORMAT_H_
