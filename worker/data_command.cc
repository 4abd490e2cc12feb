// pyramid-worker data: writes a data set's pictures out, or reads all of them to find bad ones.
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "model/preprocess.h"
#include "proto/base/file.h"
#include "proto/base/status.h"
#include "worker/commands.h"
#include "worker/data/dataset.h"
#include "worker/failure.h"
#include "worker/recipe_flags.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;

struct DataFlags {
  std::string source;  // a recipe file or a data folder
  std::string split = "val";
  std::string out;
  int64_t count = 0;  // 0: all
  int64_t first = 0;
  bool json = false;
};

// A recipe names its data; a folder is taken for IDX files if there are some, else for a folder of
// class folders.
absl::StatusOr<std::unique_ptr<Dataset>> Open(const DataFlags& flags) {
  std::error_code ignored;
  if (fs::is_directory(flags.source, ignored)) {
    for (const char* name : {"train", "t10k"}) {
      for (const char* ending : {"", ".gz"}) {
        if (fs::exists(fs::path(flags.source) / absl::StrCat(name, "-images-idx3-ubyte", ending),
                       ignored)) {
          // Ten classes either way; the names are Fashion-MNIST's where the folder says so.
          const bool fashion =
              absl::AsciiStrToLower(fs::absolute(flags.source).string()).find("fashion") !=
              std::string::npos;
          return OpenDataset(fashion ? "fashion_mnist" : "mnist", flags.source, flags.split);
        }
      }
    }
    return OpenDataset("imagenet", flags.source, flags.split);
  }
  ASSIGN_OR_RETURN(const std::string yaml, ReadFile(flags.source, 1 << 20));
  ASSIGN_OR_RETURN(const ParsedRecipe parsed, ParseRecipe(yaml));
  const Recipe& recipe = parsed.recipe;
  const std::string split = flags.split == "val"     ? recipe.val_split
                            : flags.split == "train" ? recipe.train_split
                                                     : flags.split;
  return OpenDataset(recipe.dataset, recipe.data_dir, split);
}

// "ankle_boot" of "Ankle boot".
std::string FileWord(absl::string_view name) {
  std::string word;
  for (const char c : name) {
    const bool plain = absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '.';
    if (plain)
      word.push_back(absl::ascii_tolower(static_cast<unsigned char>(c)));
    else if (!word.empty() && word.back() != '_')
      word.push_back('_');
  }
  return word.empty() || word.front() == '.' ? "class" + word : word;
}

void PutU32(std::string& out, uint32_t value) {
  for (int shift = 0; shift < 32; shift += 8)
    out.push_back(static_cast<char>(value >> shift & 0xff));
}

absl::Status WriteOut(absl::string_view bytes) {
  if (std::fwrite(bytes.data(), 1, bytes.size(), stdout) == bytes.size()) return absl::OkStatus();
  return absl::UnavailableError("standard output was closed");
}

absl::Status Export(const DataFlags& flags) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Dataset> data, Open(flags));
  const int64_t left = std::max<int64_t>(0, data->size() - flags.first);
  const int64_t count = flags.count > 0 ? std::min(flags.count, left) : left;
  const bool stream = flags.out == "-";
  if (stream) {
    const nlohmann::json head = {{"count", count}, {"classes", data->classes()}};
    RETURN_IF_ERROR(WriteOut(head.dump() + "\n"));
  } else {
    RETURN_IF_ERROR(MakeFolders(flags.out));
  }
  for (int64_t i = flags.first; i < flags.first + count; ++i) {
    ASSIGN_OR_RETURN(const std::string bytes, data->ReadEncoded(i));
    const int label = data->label(i);
    if (stream) {
      std::string record;
      PutU32(record, static_cast<uint32_t>(label));
      PutU32(record, static_cast<uint32_t>(bytes.size()));
      record += bytes;
      RETURN_IF_ERROR(WriteOut(record));
    } else {
      const fs::path path =
          fs::path(flags.out) / absl::StrCat(absl::StrFormat("%05d-", i),
                                             FileWord(data->classes()[label]), data->Extension(i));
      RETURN_IF_ERROR(WriteFileSynced(path, bytes));
    }
  }
  if (stream && std::fflush(stdout) != 0)
    return absl::UnavailableError("standard output was closed");
  if (!stream)
    std::fprintf(stderr, "%ld pictures in %s\n", static_cast<long>(count), flags.out.c_str());
  return absl::OkStatus();
}

// DataLoss if a picture is bad.
absl::Status Verify(const DataFlags& flags) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Dataset> data, Open(flags));
  const int64_t left = std::max<int64_t>(0, data->size() - flags.first);
  const int64_t count = flags.count > 0 ? std::min(flags.count, left) : left;
  int64_t bad = 0;
  std::vector<int64_t> per_class(data->classes().size());
  for (int64_t i = flags.first; i < flags.first + count; ++i) {
    ++per_class[data->label(i)];
    const absl::StatusOr<RgbImage> image = data->Read(i, 3, /*apply_exif=*/true);
    if (image.ok()) continue;
    ++bad;
    std::fprintf(stderr, "bad: %s\n", std::string(image.status().message()).c_str());
  }
  if (flags.json) {
    const nlohmann::json json = {
        {"images", count}, {"bad", bad}, {"classes", data->classes()}, {"per_class", per_class}};
    std::printf("%s\n", json.dump().c_str());
  } else {
    std::printf("%ld pictures, %zu classes, %ld bad\n", static_cast<long>(count), per_class.size(),
                static_cast<long>(bad));
  }
  if (bad == 0) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(bad, " of ", count, " pictures can't be decoded"));
}

}  // namespace

int DataCommand(const Arguments& arguments) {
  CLI::App app("Reads data sets.", "pyramid-worker data");
  app.require_subcommand(1);
  DataFlags flags;
  const auto add_common = [&](CLI::App* command) {
    command
        ->add_option("data", flags.source,
                     "A recipe, or a folder: IDX files, or <split>/<class>/<picture>")
        ->required();
    command->add_option("--split", flags.split, "train or val, or a folder's name");
    command->add_option("--count", flags.count, "At most so many pictures; default all")
        ->check(CLI::NonNegativeNumber);
    command->add_option("--first", flags.first, "Index of the first")
        ->check(CLI::NonNegativeNumber);
  };
  CLI::App* export_command = app.add_subcommand(
      "export",
      "Writes pictures as files named by index and class, 00042-ankle_boot.png. To - : a JSON line "
      "with count and classes, then for each\n"
      "picture label (u32), length (u32), both little-endian, and the file's bytes.");
  add_common(export_command);
  export_command->add_option("--out,-o", flags.out, "Folder, or - for a stream on standard output")
      ->required();
  CLI::App* verify_command = app.add_subcommand(
      "verify", "Decodes every picture and counts the bad ones; exit code 1 if there are any.");
  add_common(verify_command);
  verify_command->add_flag("--json", flags.json, "One JSON object on standard output");
  int code = 0;
  if (!ParseOrExplain(app, arguments, code)) return code;
  const absl::Status status = export_command->parsed() ? Export(flags) : Verify(flags);
  return status.ok() ? kExitDone : Fail(status);
}

}  // namespace pyramid
