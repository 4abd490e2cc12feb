#include "server/training/job_spec.h"

#include <algorithm>
#include <filesystem>
#include <system_error>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/base/hash.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr size_t kLongestName = 64;
constexpr size_t kLongestRequestId = 128;

absl::Status CheckName(const std::string& name) {
  const bool plain = std::all_of(name.begin(), name.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  });
  if (plain && !name.empty() && name.size() <= kLongestName && name[0] != '.') {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("name is \"", name.substr(0, 80),
                   "\"; use 1..64 letters, digits, '.', '_' and '-', not beginning with '.'"));
}

std::string Absolute(const std::string& path) {
  std::error_code error;
  const std::filesystem::path absolute = std::filesystem::absolute(path, error);
  return error ? path : absolute.lexically_normal().string();
}

absl::Status CheckFolder(absl::string_view key, const std::string& path, bool file_will_do) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (std::filesystem::is_directory(status)) return absl::OkStatus();
  if (file_will_do && std::filesystem::exists(status)) return absl::OkStatus();
  if (std::filesystem::exists(status)) {
    return absl::InvalidArgumentError(
        absl::StrCat("recipe.", key, " is ", path, ", which isn't a folder on the server"));
  }
  return absl::InvalidArgumentError(absl::StrCat("recipe.", key, " is ", path,
                                                 "; the server has no such ",
                                                 file_will_do ? "file or folder" : "folder"));
}

}  // namespace

absl::StatusOr<JobSpec> ResolveJob(const v1::SubmitJobRequest& request) {
  if (request.request_id().size() > kLongestRequestId) {
    return absl::InvalidArgumentError(absl::StrCat("request_id has ", request.request_id().size(),
                                                   " characters; use at most 128"));
  }
  const std::vector<std::string> overrides(request.overrides().begin(), request.overrides().end());
  ASSIGN_OR_RETURN(ParsedRecipe parsed, ParseRecipe(request.recipe(), overrides));
  JobSpec spec;
  spec.recipe = std::move(parsed.recipe);
  spec.warnings = std::move(parsed.warnings);
  spec.recipe.data_dir = Absolute(spec.recipe.data_dir);
  if (!spec.recipe.ckpt_path.empty()) spec.recipe.ckpt_path = Absolute(spec.recipe.ckpt_path);
  spec.name = request.name().empty() ? absl::StrCat(spec.recipe.model, "-", spec.recipe.dataset)
                                     : request.name();
  RETURN_IF_ERROR(CheckName(spec.name));
  spec.yaml = RecipeToYaml(spec.recipe);
  spec.hash = Sha256Hex(absl::StrCat(spec.name, "\n", spec.yaml));
  return spec;
}

absl::Status CheckOnServer(const JobSpec& spec, const DeviceCounts& devices) {
  const Recipe& recipe = spec.recipe;
  RETURN_IF_ERROR(CheckFolder("data_dir", recipe.data_dir, /*file_will_do=*/false));
  if (!recipe.ckpt_path.empty()) {
    RETURN_IF_ERROR(CheckFolder("ckpt_path", recipe.ckpt_path, /*file_will_do=*/true));
  }
  const auto found = devices.find(recipe.device);
  const int slots = found == devices.end() ? 0 : found->second;
  if (slots == 0) {
    std::vector<std::string> there;
    for (const auto& [kind, count] : devices) {
      if (count > 0) there.push_back(absl::StrCat(kind, " (", count, ")"));
    }
    return absl::InvalidArgumentError(
        absl::StrCat("recipe.device is ", recipe.device, "; this server has ",
                     there.empty() ? "no devices" : absl::StrJoin(there, ", ")));
  }
  if (recipe.workers > slots) {
    return absl::InvalidArgumentError(absl::StrCat(
        "recipe.workers is ", recipe.workers, "; this server runs at most ", slots, " ",
        recipe.device, slots == 1 ? " worker" : " workers", " at once; use 1..", slots));
  }
  return absl::OkStatus();
}

v1::Job MakeJob(const JobSpec& spec, const v1::SubmitJobRequest& request) {
  v1::Job job;
  job.set_name(spec.name);
  job.set_owner(spec.recipe.owner);
  job.set_priority(spec.recipe.priority);
  job.set_state(v1::QUEUED);
  job.set_recipe(spec.yaml);
  job.set_workers(spec.recipe.workers);
  job.set_device(spec.recipe.device);
  job.set_max_restarts(spec.recipe.max_restarts);
  job.set_request_id(request.request_id());
  return job;
}

}  // namespace pyramid
