// Small pure helpers of the job manager: text of foreign origin made safe to keep, and which
// checkpoints of a job are still there.
#ifndef PYRAMID_SERVER_TRAINING_TEXT_H_
#define PYRAMID_SERVER_TRAINING_TEXT_H_

#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "proto/training.pb.h"

namespace pyramid {

// At most `longest` bytes of valid UTF-8 without control characters: proto3 texts must be UTF-8,
// and a worker prints what it likes.
std::string CleanLine(absl::string_view text, size_t longest = 2000);

// The last `count` lines of a file, cleaned; none if it can't be read. Reads the last 32 KiB only.
std::vector<std::string> LastLines(const std::filesystem::path& file, int count);

// Ids of the job's checkpoints whose folders are gone. Looks at the disk.
std::set<std::string> RemovedCheckpoints(const v1::Job& job);
void DropCheckpoints(v1::Job& job, const std::set<std::string>& ids);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_TEXT_H_
