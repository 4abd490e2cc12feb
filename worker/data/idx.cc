// IDX files as Yann LeCun's MNIST page defines them: big-endian magic 0x0000TTDD (type,
// dimensions), one u32 per dimension, data. Read whole into memory (Fashion-MNIST: 47 MB), gzipped
// or plain.
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "proto/base/file.h"
#include "proto/base/status.h"
#include "worker/data/dataset.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;

constexpr uint32_t kImageMagic = 0x00000803;  // unsigned bytes, three dimensions
constexpr uint32_t kLabelMagic = 0x00000801;  // unsigned bytes, one dimension
constexpr int64_t kMaxBytes = int64_t{1} << 34;

// Reads on until `bytes` has `until` bytes or the file ends. zlib reads plain files as they are.
absl::Status ReadUntil(gzFile file, const fs::path& path, int64_t until, std::string& bytes) {
  while (static_cast<int64_t>(bytes.size()) < until) {
    const size_t before = bytes.size();
    constexpr int64_t kPiece = 1 << 18;
    const int64_t wanted = std::min(kPiece, until - static_cast<int64_t>(before));
    bytes.resize(before + static_cast<size_t>(wanted));
    const int got = gzread(file, bytes.data() + before, static_cast<unsigned>(wanted));
    bytes.resize(before + static_cast<size_t>(std::max(got, 0)));
    int error = Z_OK;
    const char* reason = gzerror(file, &error);
    if (got < 0 || (error != Z_OK && error != Z_STREAM_END)) {
      return absl::DataLossError(absl::StrCat(path.string(),
                                              ": gzip data damaged or cut off after ", bytes.size(),
                                              " unpacked bytes: ", reason));
    }
    if (got == 0) break;
  }
  return absl::OkStatus();
}

uint32_t BigEndian(const std::string& bytes, size_t offset) {
  uint32_t value = 0;
  for (size_t i = 0; i < 4; ++i) value = value << 8 | static_cast<uint8_t>(bytes[offset + i]);
  return value;
}

int64_t HeaderBytes(uint32_t magic) { return 4 + 4 * int64_t{magic & 0xff}; }

// The dimensions that a file's first bytes promise.
absl::StatusOr<std::vector<int64_t>> CheckHeader(const fs::path& path, const std::string& bytes,
                                                 uint32_t magic) {
  const int dimensions = static_cast<int>(magic & 0xff);
  const int64_t header = HeaderBytes(magic);
  const int64_t size = static_cast<int64_t>(bytes.size());
  if (size >= 4 && BigEndian(bytes, 0) != magic) {
    return absl::DataLossError(absl::StrFormat(
        "%s: magic number 0x%08x at offset 0, expected 0x%08x: not an IDX file of %s",
        path.string(), BigEndian(bytes, 0), magic, magic == kImageMagic ? "pictures" : "labels"));
  }
  if (size < header) {
    return absl::DataLossError(absl::StrCat(path.string(), ": ends at offset ", size,
                                            ", expected a header of ", header, " bytes"));
  }
  std::vector<int64_t> shape;
  int64_t elements = 1;
  for (int d = 0; d < dimensions; ++d) {
    shape.push_back(BigEndian(bytes, 4 + 4 * d));
    if (d > 0 && (shape[d] < 1 || shape[d] > 32768)) {
      return absl::DataLossError(absl::StrCat(path.string(), ": a side of ", shape[d],
                                              " pixels at offset ", 4 + 4 * d,
                                              ", expected 1..32768"));
    }
    if (elements > kMaxBytes / std::max<int64_t>(shape[d], 1)) {
      return absl::DataLossError(
          absl::StrCat(path.string(), ": its header promises over ", kMaxBytes, " bytes"));
    }
    elements *= shape[d];
  }
  return shape;
}

struct IdxFile {
  std::string bytes;  // with the header
  std::vector<int64_t> shape;
};

// No more is unpacked than the header promises, and a byte to see whether there is more: a small
// gzip file can hold gigabytes.
absl::StatusOr<IdxFile> ReadIdx(const fs::path& path, uint32_t magic) {
  gzFile file = gzopen(path.c_str(), "rb");
  if (file == nullptr) return ErrnoStatus(errno, "opening", path);
  const absl::Cleanup close = [file] { gzclose(file); };
  gzbuffer(file, 1 << 18);
  IdxFile idx;
  RETURN_IF_ERROR(ReadUntil(file, path, HeaderBytes(magic), idx.bytes));
  ASSIGN_OR_RETURN(idx.shape, CheckHeader(path, idx.bytes, magic));
  int64_t expected = 1;
  for (const int64_t side : idx.shape) expected *= side;
  expected += HeaderBytes(magic);
  std::error_code unknown;
  const auto on_disk = static_cast<int64_t>(fs::file_size(path, unknown));
  // A plain file's size is known: without doubling on the way there.
  if (!unknown) idx.bytes.reserve(static_cast<size_t>(std::min(expected, on_disk) + 1));
  RETURN_IF_ERROR(ReadUntil(file, path, expected + 1, idx.bytes));
  const auto size = static_cast<int64_t>(idx.bytes.size());
  if (size != expected) {
    const std::string end = size > expected ? absl::StrCat("goes on beyond offset ", expected)
                                            : absl::StrCat("ends at offset ", size);
    return absl::DataLossError(absl::StrCat(path.string(), ": ", end, ", expected ", expected, " (",
                                            idx.shape[0], " entries)"));
  }
  return idx;
}

// "<dir>/<name>", or with ".gz".
absl::StatusOr<fs::path> FindFile(const fs::path& dir, const std::string& name) {
  std::error_code ignored;
  for (const char* ending : {"", ".gz"}) {
    const fs::path path = dir / (name + ending);
    if (fs::is_regular_file(path, ignored)) return path;
  }
  std::string splits;
  for (const auto& [prefix, split] : {std::pair{"train", "train"}, std::pair{"t10k", "val"}}) {
    for (const char* ending : {"", ".gz"}) {
      if (!fs::is_regular_file(dir / absl::StrCat(prefix, "-images-idx3-ubyte", ending), ignored))
        continue;
      absl::StrAppend(&splits, splits.empty() ? "" : ", ", split);
      break;
    }
  }
  return absl::NotFoundError(absl::StrCat("no ", (dir / name).string(), " or ", name,
                                          ".gz; splits there: ", splits.empty() ? "none" : splits));
}

class IdxDataset final : public Dataset {
 public:
  IdxDataset(fs::path path, std::string pixels, std::string labels, std::vector<int64_t> shape,
             std::vector<std::string> classes)
      : path_(std::move(path)),
        pixels_(std::move(pixels)),
        labels_(std::move(labels)),
        count_(shape[0]),
        height_(static_cast<int>(shape[1])),
        width_(static_cast<int>(shape[2])),
        classes_(std::move(classes)) {}

  int64_t size() const override { return count_; }
  const std::vector<std::string>& classes() const override { return classes_; }
  int label(int64_t index) const override { return static_cast<uint8_t>(labels_[8 + index]); }

  absl::StatusOr<RgbImage> Read(int64_t index, int channels, bool /*apply_exif*/) const override {
    const int64_t area = int64_t{height_} * width_;
    const auto* grey = reinterpret_cast<const uint8_t*>(pixels_.data()) + 16 + index * area;
    RgbImage image{.width = width_, .height = height_, .channels = channels};
    if (channels == 1) {
      image.pixels.assign(grey, grey + area);
      return image;
    }
    image.pixels.resize(area * channels);
    for (int64_t i = 0; i < area * channels; ++i) image.pixels[i] = grey[i / channels];
    return image;
  }

  absl::StatusOr<std::string> ReadEncoded(int64_t index) const override {
    ASSIGN_OR_RETURN(const RgbImage image, Read(index, 1, false));
    return EncodePng(image);
  }
  std::string Extension(int64_t) const override { return ".png"; }
  std::string NameOf(int64_t index) const override {
    return absl::StrCat("picture ", index, " of ", path_.string());
  }

 private:
  fs::path path_;
  std::string pixels_;  // with the file's header, 16 bytes
  std::string labels_;  // with the file's header, 8 bytes
  int64_t count_;
  int height_;
  int width_;
  std::vector<std::string> classes_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Dataset>> OpenIdx(const fs::path& data_dir, absl::string_view split,
                                                 std::vector<std::string> classes) {
  std::string prefix;
  if (split == "train") prefix = "train";
  if (split == "val" || split == "test" || split == "t10k") prefix = "t10k";
  if (prefix.empty()) {
    return absl::NotFoundError(absl::StrCat("no split \"", split, "\" in ", data_dir.string(),
                                            "; splits there: train, val"));
  }
  ASSIGN_OR_RETURN(const fs::path image_path, FindFile(data_dir, prefix + "-images-idx3-ubyte"));
  ASSIGN_OR_RETURN(const fs::path label_path, FindFile(data_dir, prefix + "-labels-idx1-ubyte"));
  ASSIGN_OR_RETURN(IdxFile pictures, ReadIdx(image_path, kImageMagic));
  ASSIGN_OR_RETURN(IdxFile labels, ReadIdx(label_path, kLabelMagic));
  const int64_t count = pictures.shape[0];
  if (count != labels.shape[0]) {
    return absl::DataLossError(absl::StrCat(image_path.string(), " has ", count, " pictures but ",
                                            label_path.string(), " has ", labels.shape[0],
                                            " labels"));
  }
  if (count == 0)
    return absl::InvalidArgumentError(absl::StrCat(image_path.string(), " holds no pictures"));
  const int class_count = static_cast<int>(classes.size());
  auto dataset =
      std::make_unique<IdxDataset>(image_path, std::move(pictures.bytes), std::move(labels.bytes),
                                   pictures.shape, std::move(classes));
  RETURN_IF_ERROR(CheckLabels(*dataset, class_count));
  return dataset;
}

}  // namespace pyramid
