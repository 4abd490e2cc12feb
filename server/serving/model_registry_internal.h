// What model_registry.cc and model_changes.cc share.
#ifndef PYRAMID_SERVER_SERVING_MODEL_REGISTRY_INTERNAL_H_
#define PYRAMID_SERVER_SERVING_MODEL_REGISTRY_INTERNAL_H_

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#include "server/serving/model_registry.h"

namespace pyramid {

// The number of a version's folder; 0: another name.
int64_t VersionOfFolder(const std::string& folder_name);

// Sorted by name.
std::vector<std::filesystem::path> EntriesOf(const std::filesystem::path& folder,
                                             std::error_code& error);

// The versions that aliases name.
std::set<int64_t> NamedVersions(const v1::ModelState& state);

// Waits until nobody else changes or loads the model; nobody does while it lives.
class ModelRegistry::Work {
 public:
  Work(ModelRegistry& registry, std::string name) : registry_(registry), name_(std::move(name)) {
    absl::MutexLock lock(&registry_.mutex_);
    const auto idle = [&]() ABSL_SHARED_LOCKS_REQUIRED(registry_.mutex_) {
      return registry_.busy_.count(name_) == 0;
    };
    registry_.mutex_.Await(absl::Condition(&idle));
    registry_.busy_.insert(name_);
  }
  ~Work() {
    absl::MutexLock lock(&registry_.mutex_);
    registry_.busy_.erase(name_);
  }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

 private:
  ModelRegistry& registry_;
  const std::string name_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_MODEL_REGISTRY_INTERNAL_H_
