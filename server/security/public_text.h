// Error texts for clients: no paths of this machine, no addresses. The log gets the text as it was.
#ifndef PYRAMID_SERVER_SECURITY_PUBLIC_TEXT_H_
#define PYRAMID_SERVER_SECURITY_PUBLIC_TEXT_H_

#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace pyramid {

class PublicText {
 public:
  // `data`: the data folder, which shows as <data>. Relative or absolute.
  explicit PublicText(const std::filesystem::path& data);

  // What someone who sends pictures may read. Of an absolute path only the last part is left
  // (".../loadsave.cpp"), except in the data folder ("<data>/models/bars/3"); host:port and
  // pointers become <address>.
  std::string ForPictures(absl::string_view text) const;

  // What someone who trains on this machine may read: paths that a recipe names stay, or its author
  // couldn't mend them. The data folder and addresses go.
  std::string ForJobs(absl::string_view text) const;

 private:
  std::string HideData(absl::string_view text) const;
  std::string data_;
};

// Parts of both, for tests.
std::string HidePaths(absl::string_view text);
std::string HideAddresses(absl::string_view text);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SECURITY_PUBLIC_TEXT_H_
