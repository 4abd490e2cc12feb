// The exit codes of `pyramid`, and how errors get there.
#ifndef PYRAMID_CLIENT_EXIT_CODE_H_
#define PYRAMID_CLIENT_EXIT_CODE_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "client/environment.h"

namespace pyramid {

enum ExitCode {
  kDone = 0,
  kFailed = 1,
  kWrongUsage = 2,  // of the command line itself
  kNotFound = 3,
  kRefused = 4,      // FAILED_PRECONDITION, RESOURCE_EXHAUSTED, ALREADY_EXISTS, UNAUTHENTICATED,
                     // PERMISSION_DENIED
  kUnreachable = 5,  // no server, or one that takes no requests now
};

// InvalidArgument that ExitCodeOf maps to kWrongUsage; any other InvalidArgument is kFailed.
absl::Status UsageError(absl::string_view message);

ExitCode ExitCodeOf(const absl::Status& status);

// Prints "pyramid: <message>", one line, and returns the code.
int Fail(const Environment& environment, const absl::Status& status);

// One line without control characters, so that text from elsewhere can't play tricks on a terminal.
std::string OneLine(absl::string_view text);

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_EXIT_CODE_H_
