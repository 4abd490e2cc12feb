#include "worker/data/dataset.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "tests/testing/idx_data.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

class IdxTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::WriteIdxFolder(folder_.path(), 20, 10);
    images_ = folder_ / "train-images-idx3-ubyte";
    labels_ = folder_ / "train-labels-idx1-ubyte";
  }
  void Cut(const fs::path& file, int64_t bytes) {
    fs::resize_file(file, fs::file_size(file) - bytes);
  }
  void Overwrite(const fs::path& file, int64_t offset, char byte) {
    std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekp(offset);
    stream.put(byte);
  }
  auto Open(const char* split = "train") {
    return OpenDataset("fashion_mnist", folder_.path(), split);
  }

  testing::TempFolder folder_;
  fs::path images_, labels_;
};

TEST_F(IdxTest, ReadsPicturesAndLabels) {
  const testing::IdxSplit split = testing::MakeIdxSplit(20, 10, 99);
  testing::WriteIdxImages(images_, split);
  testing::WriteIdxLabels(labels_, split);
  ASSERT_OK_AND_ASSIGN(auto data, Open());
  ASSERT_EQ(data->size(), 20);
  EXPECT_EQ(data->classes()[9], "Ankle boot");
  for (const int i : {0, 19}) {
    EXPECT_EQ(data->label(i), split.labels[i]);
    ASSERT_OK_AND_ASSIGN(const RgbImage grey, data->Read(i, 1, true));
    const std::vector<uint8_t> expected(split.pixels.begin() + i * 784,
                                        split.pixels.begin() + (i + 1) * 784);
    EXPECT_EQ(grey.pixels, expected);
    ASSERT_OK_AND_ASSIGN(const RgbImage rgb, data->Read(i, 3, true));
    for (int k = 0; k < 784 * 3; ++k) ASSERT_EQ(rgb.pixels[k], expected[k / 3]);
    ASSERT_OK_AND_ASSIGN(const std::string png, data->ReadEncoded(i));
    ASSERT_OK_AND_ASSIGN(const RgbImage back, DecodeImage(png, 1, true));
    EXPECT_EQ(back.pixels, expected);
  }
}

TEST_F(IdxTest, ReadsGzippedFiles) {
  ASSERT_OK_AND_ASSIGN(auto plain, Open());
  for (const fs::path& path : {images_, labels_}) {
    ASSERT_OK_AND_ASSIGN(const std::string bytes, ReadFile(path));
    gzFile out = gzopen((path.string() + ".gz").c_str(), "wb");
    gzwrite(out, bytes.data(), static_cast<unsigned>(bytes.size()));
    gzclose(out);
    fs::remove(path);
  }
  ASSERT_OK_AND_ASSIGN(auto zipped, Open());
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(zipped->Read(i, 1, true)->pixels, plain->Read(i, 1, true)->pixels);
    EXPECT_EQ(zipped->label(i), plain->label(i));
  }
  // Cut off in the middle of the compressed data.
  const fs::path gz = images_.string() + ".gz";
  fs::resize_file(gz, fs::file_size(gz) / 2);
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("gzip")));
}

TEST_F(IdxTest, AnUnknownFolderIsNotFound) {
  EXPECT_THAT(OpenDataset("mnist", folder_ / "nowhere", "train"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nowhere")));
}

TEST_F(IdxTest, AMissingFileIsNamedWithTheSplitsThatAreThere) {
  fs::remove(folder_ / "t10k-images-idx3-ubyte");
  EXPECT_THAT(Open("val"),
              StatusIs(absl::StatusCode::kNotFound, AllOf(HasSubstr("t10k-images-idx3-ubyte"),
                                                          HasSubstr("splits there: train"))));
  EXPECT_THAT(Open("dev"), StatusIs(absl::StatusCode::kNotFound,
                                    AllOf(HasSubstr("\"dev\""), HasSubstr("train, val"))));
}

TEST_F(IdxTest, AWrongMagicNumberIsDataLoss) {
  Overwrite(images_, 3, 1);
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kDataLoss,
                               AllOf(HasSubstr("0x00000801"), HasSubstr("expected 0x00000803"))));
}

TEST_F(IdxTest, ATruncatedFileIsDataLossWithOffsetAndExpectation) {
  Cut(images_, 100);
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kDataLoss, AllOf(HasSubstr("ends at offset 15596"),
                                                                  HasSubstr("expected 15696"))));
  fs::resize_file(images_, 9);
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("ends at offset 9")));
}

TEST_F(IdxTest, AnOverlongFileIsDataLoss) {
  std::ofstream(labels_, std::ios::app) << "x";
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("expected 28")));
}

TEST_F(IdxTest, AGzipFileIsUnpackedNoFurtherThanItsHeaderPromises) {
  ASSERT_OK_AND_ASSIGN(std::string bytes, ReadFile(images_));
  const std::string promised = absl::StrCat("goes on beyond offset ", bytes.size());
  bytes.append(1 << 20, '\0');
  gzFile out = gzopen(images_.c_str(), "wb");
  gzwrite(out, bytes.data(), static_cast<unsigned>(bytes.size()));
  gzclose(out);
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(promised)));
}

TEST_F(IdxTest, AHeaderThatPromisesTooMuchIsDataLoss) {
  for (const int offset : {4, 8, 12}) Overwrite(images_, offset, '\x7f');
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("expected 1..32768")));
}

TEST_F(IdxTest, DifferentCountsAreDataLoss) {
  testing::WriteIdxLabels(labels_, testing::MakeIdxSplit(19, 10, 1));
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kDataLoss,
                               AllOf(HasSubstr("20 pictures"), HasSubstr("19 labels"))));
}

TEST_F(IdxTest, ALabelOutOfRangeIsNamed) {
  Overwrite(labels_, 8 + 5, 10);
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kInvalidArgument,
                               AllOf(HasSubstr("picture 5"), HasSubstr("label 10"),
                                     HasSubstr("10 classes (0..9)"))));
}

TEST_F(IdxTest, LabelsAreCheckedAgainstTheRecipesClasses) {
  ASSERT_OK_AND_ASSIGN(auto data, Open());
  EXPECT_THAT(CheckLabels(*data, 10), IsOk());
  EXPECT_THAT(CheckLabels(*data, 2),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("2 classes")));
}

TEST_F(IdxTest, AnUnknownKindIsInvalid) {
  EXPECT_THAT(OpenDataset("cifar", folder_.path(), "train"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("cifar")));
}

TEST(DebianFashionMnistTest, IsReadIfInstalled) {
  const fs::path folder = "/usr/share/datasets/fashion-mnist";
  if (!fs::exists(folder)) GTEST_SKIP() << "dataset-fashion-mnist isn't installed";
  ASSERT_OK_AND_ASSIGN(auto data, OpenDataset("fashion_mnist", folder, "val"));
  EXPECT_EQ(data->size(), 10000);
  EXPECT_EQ(data->label(0), 9);  // an ankle boot, as everybody's first plot shows
}

class ImageFolderTest : public ::testing::Test {
 protected:
  void Put(const std::string& name, uint8_t value) {
    RgbImage image{.width = 4, .height = 3, .channels = 3};
    image.pixels.assign(36, value);
    fs::create_directories((folder_ / name).parent_path());
    ASSERT_OK(WriteFileSynced(folder_ / name, *EncodePng(image)));
  }
  testing::TempFolder folder_;
};

TEST_F(ImageFolderTest, LabelsFollowTheAlphabet) {
  Put("train/zebra/1.png", 10);
  Put("train/ant/b.PNG", 20);
  Put("train/ant/a.png", 30);
  Put("train/ant/.hidden.png", 1);
  ASSERT_OK(WriteFileSynced(folder_ / "train/ant/notes.txt", "no picture"));
  ASSERT_OK_AND_ASSIGN(auto data, OpenDataset("imagenet", folder_.path(), "train"));
  EXPECT_THAT(data->classes(), ElementsAre("ant", "zebra"));
  ASSERT_EQ(data->size(), 3);
  EXPECT_EQ(data->label(0), 0);
  EXPECT_EQ(data->label(2), 1);
  EXPECT_EQ(data->Read(0, 3, true)->pixels[0], 30);
  EXPECT_EQ(data->Read(1, 3, true)->pixels[0], 20);
  EXPECT_EQ(data->Extension(1), ".png");
}

TEST_F(ImageFolderTest, AMissingSplitIsNamedWithTheOthers) {
  Put("train/a/1.png", 1);
  Put("valid/a/1.png", 1);
  EXPECT_THAT(OpenDataset("imagenet", folder_.path(), "val"),
              StatusIs(absl::StatusCode::kNotFound,
                       AllOf(HasSubstr("\"val\""), HasSubstr("train, valid"))));
}

TEST_F(ImageFolderTest, NoPicturesIsInvalid) {
  fs::create_directories(folder_ / "train/a");
  EXPECT_THAT(OpenDataset("imagenet", folder_.path(), "train"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no pictures")));
}

TEST_F(ImageFolderTest, AnUndecodablePictureIsNamed) {
  Put("train/a/1.png", 1);
  ASSERT_OK(WriteFileSynced(folder_ / "train/a/2.jpg", "not a picture at all"));
  ASSERT_OK_AND_ASSIGN(auto data, OpenDataset("imagenet", folder_.path(), "train"));
  EXPECT_THAT(data->Read(1, 3, true),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("2.jpg")));
}

}  // namespace
}  // namespace pyramid
