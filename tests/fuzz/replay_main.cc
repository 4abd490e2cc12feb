// Tries a fuzz target without libFuzzer: every file of the corpus as it is, then mutations of them
// that are the same in every run, until the time is up.
//
//   fuzz_replay_<target> [--seconds 2] [--mutations 4000] FOLDER|FILE…
//
// What breaks the target is written to ./crash-<process id>; give that file with --mutations 0 to
// see it again.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz_target.h"

namespace {

namespace fs = std::filesystem;
using SteadyClock = std::chrono::steady_clock;

constexpr double kLongest = 5;  // seconds for one input; more counts as a hang

struct Input {
  std::string name;
  std::string bytes;
};

struct Options {
  double seconds = 2;
  uint64_t mutations = 4000;  // of each file, at most
  std::vector<fs::path> paths;
};

// What is being tried, for the report of a crash.
const char* current_name = "";
uint64_t current_mutation = 0;
const std::string* current_bytes = nullptr;

void Report() {
  if (current_bytes == nullptr) return;
  char text[512];
  int length = std::snprintf(text, sizeof text, "fuzz: %s, mutation %llu, %zu bytes: ./crash-%d\n",
                             current_name, static_cast<unsigned long long>(current_mutation),
                             current_bytes->size(), static_cast<int>(getpid()));
  ssize_t ignored = write(STDERR_FILENO, text, static_cast<size_t>(length));
  std::snprintf(text, sizeof text, "crash-%d", static_cast<int>(getpid()));
  const int file = open(text, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (file >= 0) ignored = write(file, current_bytes->data(), current_bytes->size());
  (void)ignored;
  current_bytes = nullptr;
}

void OnSignal(int number) {
  Report();
  signal(number, SIG_DFL);
  raise(number);
}

// One to four small changes. std::mt19937_64's numbers are the same everywhere; distributions'
// aren't, hence the remainders.
std::string Mutate(const std::vector<Input>& corpus, size_t file, uint64_t mutation) {
  std::mt19937_64 random(mutation * 1'000'003 + file);
  const auto below = [&random](size_t limit) { return limit == 0 ? 0 : random() % limit; };
  static constexpr uint64_t kNumbers[] = {0,          1,          0x7f,       0x80,
                                          0xff,       0x7fff,     0xffff,     0x7fffffff,
                                          0x80000000, 0xffffffff, ~0ull >> 1, ~0ull};
  std::string bytes = corpus[file].bytes;
  for (uint64_t change = below(4) + 1; change > 0; --change) {
    const size_t at = below(bytes.size() + 1);
    const size_t length = std::min<size_t>(below(32) + 1, bytes.size() - at);
    switch (below(8)) {
      case 0:
        if (at < bytes.size()) bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 1:
        if (at < bytes.size()) bytes[at] = static_cast<char>(random());
        break;
      case 2:
        bytes.resize(at);
        break;
      case 3:
        bytes.erase(at, length);
        break;
      case 4:
        bytes.insert(at, bytes.substr(below(bytes.size() + 1), length));
        break;
      case 5: {  // a number that parsers meet with surprise, of 1, 2, 4 or 8 bytes, either way
                 // round
        uint64_t number = kNumbers[below(std::size(kNumbers))];
        const size_t width = std::min<size_t>(size_t{1} << below(4), bytes.size() - at);
        const bool big_endian = below(2) == 1;
        for (size_t i = 0; i < width; ++i, number >>= 8) {
          bytes[big_endian ? at + width - 1 - i : at + i] = static_cast<char>(number);
        }
        break;
      }
      case 6:
        bytes.insert(at, std::string(below(64) + 1, static_cast<char>(random())));
        break;
      case 7: {  // this one's beginning, another's end
        const std::string& other = corpus[below(corpus.size())].bytes;
        bytes = bytes.substr(0, at) + other.substr(below(other.size() + 1));
        break;
      }
    }
  }
  return bytes;
}

// How long the target took, in seconds.
double Try(const std::string& name, uint64_t mutation, const std::string& bytes) {
  // A copy of exactly its size, so that a sanitizer sees the first byte beyond it.
  const std::vector<uint8_t> exact(bytes.begin(), bytes.end());
  current_name = name.c_str();
  current_mutation = mutation;
  current_bytes = &bytes;
  const auto start = SteadyClock::now();
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
  const double seconds = std::chrono::duration<double>(SteadyClock::now() - start).count();
  if (seconds > kLongest) {
    std::fprintf(stderr, "fuzz: %.1f s for one input\n", seconds);
    std::abort();
  }
  current_bytes = nullptr;
  return seconds;
}

std::vector<Input> ReadCorpus(const std::vector<fs::path>& paths) {
  std::vector<fs::path> files;
  for (const fs::path& path : paths) {
    if (!fs::is_directory(path)) {
      files.push_back(path);
      continue;
    }
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(path)) {
      if (entry.is_regular_file()) files.push_back(entry.path());
    }
  }
  std::sort(files.begin(), files.end());
  std::vector<Input> corpus;
  for (const fs::path& path : files) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
      std::fprintf(stderr, "fuzz: can't read %s\n", path.c_str());
      std::exit(2);
    }
    corpus.push_back({path.string(), std::string(std::istreambuf_iterator<char>(file), {})});
  }
  return corpus;
}

Options ParseArguments(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const bool has_value = i + 1 < argc;
    if (std::strcmp(argv[i], "--seconds") == 0 && has_value) {
      options.seconds = std::atof(argv[++i]);
    } else if (std::strcmp(argv[i], "--mutations") == 0 && has_value) {
      options.mutations = std::strtoull(argv[++i], nullptr, 10);
    } else {
      options.paths.emplace_back(argv[i]);
    }
  }
  return options;
}

}  // namespace

extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

int main(int argc, char** argv) {
  const Options options = ParseArguments(argc, argv);
  for (const int number : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) signal(number, OnSignal);
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(Report);

  const std::vector<Input> corpus = ReadCorpus(options.paths);
  if (corpus.empty()) {
    std::fprintf(stderr, "fuzz: no corpus; name folders or files\n");
    return 2;
  }
  double longest = 0;
  for (const Input& input : corpus) longest = std::max(longest, Try(input.name, 0, input.bytes));

  const auto end = SteadyClock::now() + std::chrono::duration<double>(options.seconds);
  uint64_t tried = 0;
  for (uint64_t mutation = 1; mutation <= options.mutations; ++mutation) {
    for (size_t file = 0; file < corpus.size() && SteadyClock::now() < end; ++file, ++tried) {
      const std::string bytes = Mutate(corpus, file, mutation);
      longest = std::max(longest, Try(corpus[file].name, mutation, bytes));
    }
  }
  std::printf("%zu inputs, %llu mutations, longest %.1f ms\n", corpus.size(),
              static_cast<unsigned long long>(tried), longest * 1000);
  return 0;
}
