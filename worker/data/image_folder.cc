// data_dir/<split>/<class>/<picture>: labels by alphabetical order of the class folders, as MindCV
// and torchvision have it.
#include <algorithm>
#include <array>
#include <system_error>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/base/file.h"
#include "proto/base/status.h"
#include "worker/data/dataset.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;

bool IsPicture(const fs::path& path) {
  static constexpr std::array<absl::string_view, 10> kEndings = {
      ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jpe", ".ppm", ".pgm"};
  const std::string ending = absl::AsciiStrToLower(path.extension().string());
  return std::find(kEndings.begin(), kEndings.end(), ending) != kEndings.end() &&
         path.filename().string().front() != '.';
}

// Names of what lies in a folder, in alphabetical (byte) order; hidden entries left out.
absl::StatusOr<std::vector<std::string>> Entries(const fs::path& folder, bool folders) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error); !error && entry != fs::directory_iterator();
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    std::error_code ignored;
    const bool wanted = folders ? entry->is_directory(ignored)
                                : entry->is_regular_file(ignored) && IsPicture(entry->path());
    if (wanted && name.front() != '.') names.push_back(name);
  }
  if (error) return ErrnoStatus(error.value(), "reading the folder", folder);
  std::sort(names.begin(), names.end());
  return names;
}

class ImageFolder final : public Dataset {
 public:
  ImageFolder(fs::path root, std::vector<std::string> classes)
      : root_(std::move(root)), classes_(std::move(classes)) {}

  void Add(int label, std::string name) { pictures_.push_back({label, std::move(name)}); }

  int64_t size() const override { return static_cast<int64_t>(pictures_.size()); }
  const std::vector<std::string>& classes() const override { return classes_; }
  int label(int64_t index) const override { return pictures_[index].label; }

  absl::StatusOr<RgbImage> Read(int64_t index, int channels, bool apply_exif) const override {
    ASSIGN_OR_RETURN(const std::string bytes, ReadEncoded(index));
    absl::StatusOr<RgbImage> image = DecodeImage(bytes, channels, apply_exif);
    if (!image.ok()) return Annotate(image.status(), NameOf(index));
    return image;
  }
  absl::StatusOr<std::string> ReadEncoded(int64_t index) const override {
    return ReadFile(Path(index));
  }
  std::string Extension(int64_t index) const override {
    return absl::AsciiStrToLower(Path(index).extension().string());
  }
  std::string NameOf(int64_t index) const override { return Path(index).string(); }

 private:
  struct Picture {
    int label;
    std::string name;
  };
  fs::path Path(int64_t index) const {
    return root_ / classes_[pictures_[index].label] / pictures_[index].name;
  }

  fs::path root_;
  std::vector<std::string> classes_;
  std::vector<Picture> pictures_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Dataset>> OpenImageFolder(const fs::path& data_dir,
                                                         absl::string_view split) {
  const fs::path root = data_dir / std::string(split);
  std::error_code ignored;
  if (split.empty() || !fs::is_directory(root, ignored)) {
    ASSIGN_OR_RETURN(const std::vector<std::string> splits, Entries(data_dir, /*folders=*/true));
    return absl::NotFoundError(
        absl::StrCat("no split \"", split, "\" in ", data_dir.string(),
                     "; splits there: ", splits.empty() ? "none" : absl::StrJoin(splits, ", ")));
  }
  ASSIGN_OR_RETURN(const std::vector<std::string> classes, Entries(root, /*folders=*/true));
  auto dataset = std::make_unique<ImageFolder>(root, classes);
  for (size_t label = 0; label < classes.size(); ++label) {
    ASSIGN_OR_RETURN(std::vector<std::string> names,
                     Entries(root / classes[label], /*folders=*/false));
    for (std::string& name : names) dataset->Add(static_cast<int>(label), std::move(name));
  }
  if (dataset->size() == 0) {
    return absl::InvalidArgumentError(absl::StrCat(root.string(), " holds no pictures; expected ",
                                                   root.string(), "/<class>/<picture>.jpg"));
  }
  return dataset;
}

}  // namespace pyramid
