// pyramid-worker: one rank of a training job, and what else needs the training engine.
#include <pthread.h>

#include <cstdio>
#include <exception>
#include <string>

#include "worker/commands.h"
#include "worker/failure.h"

namespace {

constexpr char kUsage[] =
    "pyramid-worker COMMAND …\n"
    "  train     -c RECIPE [--key value …]   one rank of a training job (also when the first "
    "argument is a flag)\n"
    "  validate  -c RECIPE --ckpt_path PATH  scores a checkpoint or a file of weights, offline\n"
    "  bench     model|train                 measures speed\n"
    "  data      export|verify               writes a data set's pictures out, finds bad ones\n"
    "Each has --help. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 10 saved and "
    "stopped as asked.\n";

int Main(int argc, char** argv) {
  pyramid::Arguments arguments(argv + 1, argv + argc);
  const std::string command = arguments.empty() ? "" : arguments.front();
  if (command == "--help" || command == "-h" || command == "help") {
    std::fputs(kUsage, stdout);
    return pyramid::kExitDone;
  }
  if (!command.empty() && command.front() == '-') return pyramid::TrainCommand(arguments);
  if (!command.empty()) arguments.erase(arguments.begin());
  if (command == "train") return pyramid::TrainCommand(arguments);
  if (command == "validate") return pyramid::ValidateCommand(arguments);
  if (command == "bench") return pyramid::BenchCommand(arguments);
  if (command == "data") return pyramid::DataCommand(arguments);
  std::fprintf(stderr,
               "pyramid-worker: %s; use train, validate, bench or data (--help says more)\n",
               command.empty() ? "no command" : ("no command \"" + command + "\"").c_str());
  return pyramid::kExitUsage;
}

}  // namespace

int main(int argc, char** argv) {
  pthread_setname_np(pthread_self(),
                     "pyramid-worker");  // the local launcher starts it as /proc/self/exe
  try {
    return Main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pyramid-worker: %s\n", error.what());
    return pyramid::kExitFailed;
  }
}
