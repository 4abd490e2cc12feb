#include "server/training/checkpoints_on_disk.h"

#include <algorithm>
#include <filesystem>
#include <system_error>

namespace pyramid {

std::set<std::string> RemovedCheckpoints(const v1::Job& job) {
  std::set<std::string> removed;
  for (const v1::Checkpoint& checkpoint : job.checkpoints()) {
    std::error_code error;
    const bool there = std::filesystem::exists(checkpoint.path(), error);
    if (!there && !error) removed.insert(checkpoint.id());
  }
  return removed;
}

void DropCheckpoints(v1::Job& job, const std::set<std::string>& ids) {
  auto& all = *job.mutable_checkpoints();
  all.erase(std::remove_if(
                all.begin(), all.end(),
                [&](const v1::Checkpoint& checkpoint) { return ids.count(checkpoint.id()) > 0; }),
            all.end());
}

}  // namespace pyramid
