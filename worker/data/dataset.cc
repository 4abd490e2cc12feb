#include "worker/data/dataset.h"

#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pyramid {
namespace {

std::vector<std::string> FashionMnistClasses() {
  return {"T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
          "Sandal",      "Shirt",   "Sneaker",  "Bag",   "Ankle boot"};
}

std::vector<std::string> Digits() { return {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"}; }

}  // namespace

absl::StatusOr<std::unique_ptr<Dataset>> OpenDataset(absl::string_view kind,
                                                     const std::filesystem::path& data_dir,
                                                     absl::string_view split) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(data_dir, ignored)) {
    return absl::NotFoundError(absl::StrCat("recipe.data_dir: no folder ", data_dir.string()));
  }
  if (kind == "imagenet") return OpenImageFolder(data_dir, split);
  if (kind == "fashion_mnist") return OpenIdx(data_dir, split, FashionMnistClasses());
  if (kind == "mnist") return OpenIdx(data_dir, split, Digits());
  return absl::InvalidArgumentError(
      absl::StrCat("recipe.dataset is \"", kind, "\"; use imagenet, fashion_mnist or mnist"));
}

absl::Status CheckLabels(const Dataset& dataset, int num_classes) {
  for (int64_t i = 0; i < dataset.size(); ++i) {
    if (dataset.label(i) < num_classes) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        dataset.NameOf(i), " has label ", dataset.label(i), " but there are ", num_classes,
        " classes (0..", num_classes - 1, "); raise recipe.num_classes or leave it out"));
  }
  return absl::OkStatus();
}

}  // namespace pyramid
