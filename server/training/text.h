// Text of foreign origin, made safe to keep.
#ifndef PYRAMID_SERVER_TRAINING_TEXT_H_
#define PYRAMID_SERVER_TRAINING_TEXT_H_

#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace pyramid {

// At most `longest` bytes of valid UTF-8 without control characters: proto3 texts must be UTF-8,
// and a worker prints what it likes.
std::string CleanLine(absl::string_view text, size_t longest = 2000);

// The last `count` lines of a file, cleaned; none if it can't be read. Reads the last 32 KiB only.
std::vector<std::string> LastLines(const std::filesystem::path& file, int count);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_TEXT_H_
