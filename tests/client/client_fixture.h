// Runs command lines in process against a FakeServer, in a folder of their own.
#ifndef PYRAMID_TESTS_CLIENT_CLIENT_FIXTURE_H_
#define PYRAMID_TESTS_CLIENT_CLIENT_FIXTURE_H_

#include <gtest/gtest.h>

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "client/environment.h"
#include "client/program.h"
#include "tests/client/fake_server.h"
#include "tests/testing/temp_folder.h"

namespace pyramid::testing {

struct CommandResult {
  int code = -1;
  std::string out;
  std::string err;
};

class ClientFixture : public ::testing::Test {
 protected:
  // Runs with the fake server as PYRAMID_SERVER, unless that was changed in `environment_`.
  CommandResult Pyramid(const std::vector<std::string>& arguments) {
    std::ostringstream out;
    std::ostringstream err;
    environment_.out = &out;
    environment_.err = &err;
    environment_.folder = folder_.path();
    environment_.server_flag.clear();
    if (environment_.server_variable.empty() && use_fake_) {
      environment_.server_variable = server_.address();
    }
    CommandResult result;
    result.code = RunProgram(arguments, environment_);
    result.out = out.str();
    result.err = err.str();
    return result;
  }

  std::filesystem::path Write(const std::string& name, absl::string_view bytes) {
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
    return folder_ / name;
  }

  // An executable shell script.
  std::filesystem::path WriteScript(const std::string& name, absl::string_view text) {
    const std::filesystem::path path = Write(name, text);
    std::filesystem::permissions(path, std::filesystem::perms::owner_all);
    return path;
  }

  TempFolder folder_;
  FakeServer server_;
  Environment environment_;
  bool use_fake_ = true;  // false: the default and data/server.json decide
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_CLIENT_CLIENT_FIXTURE_H_
