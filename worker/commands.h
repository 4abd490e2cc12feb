// The program's commands. Each takes its arguments without the command's own name and returns the
// exit code (failure.h).
#ifndef PYRAMID_WORKER_COMMANDS_H_
#define PYRAMID_WORKER_COMMANDS_H_

#include <string>
#include <vector>

namespace pyramid {

using Arguments = std::vector<std::string>;

int TrainCommand(const Arguments& arguments);
int ValidateCommand(const Arguments& arguments);
int BenchCommand(const Arguments& arguments);
int DataCommand(const Arguments& arguments);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_COMMANDS_H_
