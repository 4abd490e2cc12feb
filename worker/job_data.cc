#include "worker/job_data.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/status.h"
#include "worker/data/order.h"

namespace pyramid {

bool JobData::ValidatesAfter(const Recipe& recipe, int64_t epoch) const {
  return val != nullptr && ((epoch - 1) % recipe.val_interval == 0 || epoch == recipe.epoch_size);
}

absl::StatusOr<JobData> OpenJobData(const Recipe& recipe) {
  JobData data;
  ASSIGN_OR_RETURN(data.train, OpenDataset(recipe.dataset, recipe.data_dir, recipe.train_split));
  if (recipe.val_while_train) {
    absl::StatusOr<std::unique_ptr<Dataset>> val =
        OpenDataset(recipe.dataset, recipe.data_dir, recipe.val_split);
    if (!val.ok())
      return Annotate(val.status(),
                      "opening recipe.val_split (set val_while_train: False to train without)");
    data.val = *std::move(val);
  }
  data.labels = data.train->classes();
  data.classes = recipe.num_classes > 0 ? recipe.num_classes : static_cast<int>(data.labels.size());
  RETURN_IF_ERROR(CheckLabels(*data.train, data.classes));
  if (data.val != nullptr) RETURN_IF_ERROR(CheckLabels(*data.val, data.classes));
  data.labels.resize(data.classes);
  for (int c = 0; c < data.classes; ++c) {
    if (data.labels[c].empty()) data.labels[c] = absl::StrCat(c);
  }
  const int64_t pictures = data.train->size();
  data.used = recipe.num_samples > 0 ? std::min(recipe.num_samples, pictures) : pictures;
  data.global_batch = recipe.global_batch();
  data.steps_per_epoch = StepsPerEpoch(data.used, data.global_batch, recipe.drop_remainder);
  if (data.steps_per_epoch == 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "recipe.batch_size: a step takes ", data.global_batch, " pictures (", recipe.batch_size,
        " x ", recipe.workers, " workers x ", recipe.gradient_accumulation_steps,
        " accumulation) but there are ", data.used, "; lower it or set drop_remainder: False"));
  }
  data.total_steps = data.steps_per_epoch * recipe.epoch_size;
  for (int epoch = 1; epoch <= recipe.epoch_size; ++epoch)
    data.evaluations += data.ValidatesAfter(recipe, epoch);
  data.bad_train = std::make_unique<BadPictures>(pictures);
  if (data.val != nullptr) data.bad_val = std::make_unique<BadPictures>(data.val->size());
  return data;
}

absl::StatusOr<PreparedPictures> PrepareFirst(const Dataset& dataset,
                                              const v1::Preprocessing& preprocessing, int count) {
  PreparedPictures prepared;
  for (int64_t i = 0; i < dataset.size() && prepared.count < count; ++i) {
    const absl::StatusOr<RgbImage> image =
        dataset.Read(i, preprocessing.channels(), preprocessing.exif() == "apply");
    if (!image.ok()) continue;
    const absl::StatusOr<std::vector<float>> pixels = Preprocess(*image, preprocessing);
    if (!pixels.ok()) return Annotate(pixels.status(), dataset.NameOf(i));
    prepared.pixels.insert(prepared.pixels.end(), pixels->begin(), pixels->end());
    ++prepared.count;
  }
  return prepared;
}

}  // namespace pyramid
