// Labelled pictures by index. Two kinds: IDX files (Fashion-MNIST, MNIST) and a folder of class
// folders.
#ifndef PYRAMID_WORKER_DATA_DATASET_H_
#define PYRAMID_WORKER_DATA_DATASET_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/preprocess.h"

namespace pyramid {

// Immutable once open, so thread-safe.
class Dataset {
 public:
  virtual ~Dataset() = default;

  virtual int64_t size() const = 0;
  virtual const std::vector<std::string>& classes() const = 0;  // names by label
  virtual int label(int64_t index) const = 0;                   // 0..classes-1

  // `apply_exif`: turned as its file says. InvalidArgument: undecodable; the message names the
  // picture. NotFound, Internal: the file can't be read.
  virtual absl::StatusOr<RgbImage> Read(int64_t index, int channels, bool apply_exif) const = 0;

  // The file as it lies on disk, or PNG bytes for pictures that aren't files of their own.
  virtual absl::StatusOr<std::string> ReadEncoded(int64_t index) const = 0;
  virtual std::string Extension(int64_t index) const = 0;  // ".png"

  virtual std::string NameOf(int64_t index) const = 0;  // for messages
};

// `kind`: "imagenet" (data_dir/<split>/<class>/<picture>, classes in alphabetical order) |
// "fashion_mnist" | "mnist" (IDX; split "train", or "val" and "test" for the other files).
//   NotFound         no such folder, split or file; names what was looked for and which splits
//                    there are
//   DataLoss         a wrong magic number, a truncated or overlong IDX file; with offset and
//                    expectation
//   InvalidArgument  a label outside the classes (index, label, classes); no pictures; an unknown
//                    kind
absl::StatusOr<std::unique_ptr<Dataset>> OpenDataset(absl::string_view kind,
                                                     const std::filesystem::path& data_dir,
                                                     absl::string_view split);

// The two kinds by themselves.
absl::StatusOr<std::unique_ptr<Dataset>> OpenImageFolder(const std::filesystem::path& data_dir,
                                                         absl::string_view split);
absl::StatusOr<std::unique_ptr<Dataset>> OpenIdx(const std::filesystem::path& data_dir,
                                                 absl::string_view split,
                                                 std::vector<std::string> classes);

// Every label is below `num_classes`. InvalidArgument names the first that isn't.
absl::Status CheckLabels(const Dataset& dataset, int num_classes);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_DATA_DATASET_H_
