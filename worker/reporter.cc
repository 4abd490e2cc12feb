#include "worker/reporter.h"

#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace pyramid {
namespace {

class ConsoleReporter final : public Reporter {
 public:
  ConsoleReporter(bool speak, const std::filesystem::path& log_file) : speak_(speak) {
    if (!log_file.empty()) file_ = std::fopen(log_file.c_str(), "a");
  }
  ~ConsoleReporter() override {
    if (file_ != nullptr) std::fclose(file_);
  }
  void OnProgress(const v1::Progress&) override {}
  void OnCheckpoint(const v1::Checkpoint&) override {}
  void OnLine(absl::string_view line) override {
    const std::string text =
        absl::StrCat("[", absl::FormatTime("%Y-%m-%d %H:%M:%S", absl::Now(), absl::LocalTimeZone()),
                     "] pyramid.train INFO - ", line, "\n");
    for (std::FILE* out : {speak_ ? stdout : nullptr, file_}) {
      if (out == nullptr) continue;
      std::fwrite(text.data(), 1, text.size(), out);
      std::fflush(out);
    }
  }
  bool StopAsked() const override { return false; }
  bool SaveAsked() const override { return false; }
  void SaveDone() override {}

 private:
  const bool speak_;
  std::FILE* file_ = nullptr;
};

}  // namespace

std::unique_ptr<Reporter> MakeConsoleReporter(bool speak, const std::filesystem::path& log_file) {
  return std::make_unique<ConsoleReporter>(speak, log_file);
}

}  // namespace pyramid
