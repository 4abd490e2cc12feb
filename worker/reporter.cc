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

class CoordinatorReporter final : public Reporter {
 public:
  CoordinatorReporter(CoordinatorClient& client, bool leads)
      : client_(client), leads_(leads), console_(true, {}) {}
  void OnProgress(const v1::Progress& progress) override {
    if (leads_) client_.SetProgress(progress);
  }
  void OnCheckpoint(const v1::Checkpoint& checkpoint) override {
    client_.AddCheckpoint(checkpoint);
  }
  void OnLine(absl::string_view line) override {
    console_.OnLine(line);
    if (leads_) client_.AddLine(line);
  }
  bool StopAsked() const override { return client_.StopAsked(); }
  bool SaveAsked() const override { return leads_ && client_.SaveAsked(); }
  void SaveDone() override {
    if (leads_) client_.SaveDone();
  }

 private:
  CoordinatorClient& client_;
  const bool leads_;
  ConsoleReporter console_;
};

}  // namespace

std::unique_ptr<Reporter> MakeConsoleReporter(bool speak, const std::filesystem::path& log_file) {
  return std::make_unique<ConsoleReporter>(speak, log_file);
}

std::unique_ptr<Reporter> MakeCoordinatorReporter(CoordinatorClient& client, int rank) {
  return std::make_unique<CoordinatorReporter>(client, rank == 0);
}

std::vector<std::string> ExperimentLines(const Recipe& r, const RunFacts& facts) {
  std::vector<std::string> lines = {"Essential Experiment Configurations:"};
  const auto add = [&](absl::string_view name, const auto&... value) {
    lines.push_back(absl::StrCat(name, ": ", value...));
  };
  add("MindSpore mode[GRAPH(0)/PYNATIVE(1)]", r.mode == "G" ? 0 : 1);
  add("Distributed mode", facts.world > 1 ? "True" : "False", " (launcher: ", facts.launcher, ")");
  add("Number of devices", facts.world, " x ", facts.device, ", ", facts.threads,
      facts.threads == 1 ? " thread" : " threads", " each");
  add("Number of training samples", facts.train_pictures);
  add("Number of validation samples",
      facts.val_pictures < 0 ? "None" : absl::StrCat(facts.val_pictures));
  add("Number of classes", facts.classes);
  add("Number of batches", facts.steps_per_epoch);
  add("Batch size", r.batch_size, " per worker, ", facts.global_batch, " per step");
  add("Auto augment", r.auto_augment.empty() ? "None" : r.auto_augment);
  add("Color jitter", r.in_channels == 1 ? "None (one channel)" : absl::StrCat(r.color_jitter));
  add("MixUp", r.mixup);
  add("CutMix", r.cutmix);
  add("Model", r.model);
  add("Model parameters", facts.parameters);
  add("Number of epochs", r.epoch_size);
  add("Optimizer", r.opt);
  add("Learning rate", r.lr);
  add("LR Scheduler", r.scheduler);
  add("Weight decay", r.weight_decay, " (filter: ", r.weight_decay_filter, ")");
  add("Auto mixed precision", r.amp_level,
      r.amp_level == "O0" ? "" : absl::StrCat(" ", r.amp_dtype));
  add("Kernels", facts.kernels);
  add("Checkpoints", facts.checkpoints);
  return lines;
}

}  // namespace pyramid
