// `pyramid` without its main: tests run it in process.
#ifndef PYRAMID_CLIENT_PROGRAM_H_
#define PYRAMID_CLIENT_PROGRAM_H_

#include <string>
#include <vector>

#include "client/environment.h"

namespace pyramid {

// Runs one command line, without the program's name. Returns its exit code (exit_code.h).
int RunProgram(const std::vector<std::string>& arguments, Environment& environment);

// Long flags take '-' and '_' alike: the names in "--top_k" and "--ckpt_path=a_b" become "--top-k"
// and "--ckpt-path=a_b". Values stay as they are, and so does everything after "--".
std::vector<std::string> NormaliseFlags(std::vector<std::string> arguments);

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_PROGRAM_H_
