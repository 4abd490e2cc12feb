// A folder of its own for each test, removed afterwards.
#ifndef PYRAMID_TESTS_TESTING_TEMP_FOLDER_H_
#define PYRAMID_TESTS_TESTING_TEMP_FOLDER_H_

#include <filesystem>

namespace pyramid::testing {

class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::filesystem::path& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_TEMP_FOLDER_H_
