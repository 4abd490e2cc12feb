// A worker without a network: takes pyramid-worker's command line, talks to the coordinator as a
// worker does, and behaves as the recipe's `owner` says: words "key=value":
//   steps=8      steps of the whole job           ms=10     milliseconds a step takes
//   save=3       checkpoint every so many steps
//   end=WHAT     what it does at step at=N (in rank=R, default 0, and only in the first attempts=A
//                attempts, default all): exit:CODE | signal:NUMBER | hang | stop | fail:CLASS
//   late=MS      waits before it registers         patience=MS  how long Finish is repeated
//   deaf=1       ignores SIGTERM and STOP
#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "model/recipe.h"
#include "proto/base/file.h"
#include "proto/worker.grpc.pb.h"

namespace pyramid {
namespace {

std::atomic<bool> g_terminate{false};

constexpr int kStale = 4;
constexpr int kStopped = 75;

class Worker {
 public:
  Worker(std::map<std::string, std::string> flags, std::map<std::string, std::string> script)
      : flags_(std::move(flags)), script_(std::move(script)) {
    id_.set_job_id(flags_["--job"]);
    int64_t epoch = 0;
    if (!absl::SimpleAtoi(flags_["--epoch"], &epoch)) exit(2);
    id_.set_epoch(epoch);
    id_.set_rank(atoi(flags_["--rank"].c_str()));
    folder_ = flags_["--folder"];
  }

  int Run() {
    std::printf("scripted worker rank %d of %s, %s threads\n", id_.rank(),
                flags_["--world"].c_str(), flags_["--threads"].c_str());
    std::fflush(stdout);
    absl::SleepFor(absl::Milliseconds(Number("late", 0)));
    Register();
    int64_t step = Resume();
    const int64_t steps = Number("steps", 8);
    while (step < steps) {
      absl::SleepFor(absl::Milliseconds(Number("ms", 10)));
      ++step;
      if (step == Number("at", -1) && id_.rank() == Number("rank", 0) &&
          Attempts() <= Number("attempts", 1000)) {
        Misbehave(step);
      }
      if (step % Number("save", 1'000'000) == 0) Save(step);
      Report(step, steps);
      if (stop_ && Number("deaf", 0) == 0) {
        Save(step);
        return Leave(
            step, [](v1::FinishRequest& finish) { finish.set_stopped(true); }, kStopped);
      }
    }
    Save(step);
    return Leave(
        step, [](v1::FinishRequest& finish) { finish.set_succeeded(true); }, 0);
  }

 private:
  int64_t Number(const std::string& key, int64_t fallback) {
    int64_t value = 0;
    return absl::SimpleAtoi(script_[key], &value) ? value : fallback;
  }

  // Attempts of this job so far, this one included.
  int64_t Attempts() {
    int64_t count = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder_ / "attempts")) {
      count += entry.is_directory() ? 1 : 0;
    }
    return count;
  }

  void Misbehave(int64_t step) {
    const std::pair<std::string, std::string> what =
        absl::StrSplit(script_["end"], absl::MaxSplits(':', 1));
    if (what.first == "exit") {
      std::fprintf(stderr, "last words of rank %d\n", id_.rank());
      std::fflush(stderr);
      _exit(atoi(what.second.c_str()));
    }
    if (what.first == "signal") {
      raise(atoi(what.second.c_str()));
      absl::SleepFor(absl::Hours(1));
    }
    if (what.first == "hang") absl::SleepFor(absl::Hours(1));
    if (what.first == "stop") g_terminate = true;
    if (what.first == "fail") {
      v1::FailureClass failure = v1::USER_ERROR;
      v1::FailureClass_Parse(what.second, &failure);
      exit(Leave(
          step,
          [&](v1::FinishRequest& finish) {
            finish.set_failure(failure);
            finish.set_message("as the script says");
          },
          1));
    }
  }

  // One call to the address in server.json.
  template <typename Function>
  grpc::Status Call(Function&& function) {
    if (stub_ == nullptr) {
      const absl::StatusOr<std::string> text = ReadFile(flags_["--server-file"], 65536);
      const nlohmann::json json = nlohmann::json::parse(text.ok() ? *text : "", nullptr, false);
      if (!json.is_object()) return {grpc::StatusCode::UNAVAILABLE, "no server.json"};
      stub_ = v1::WorkerService::NewStub(
          grpc::CreateChannel(json["grpc"].get<std::string>(), grpc::InsecureChannelCredentials()));
    }
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(2)));
    grpc::Status status = function(*stub_, &context);
    if (status.error_code() == grpc::StatusCode::FAILED_PRECONDITION) {
      std::fprintf(stderr, "refused: %s\n", status.error_message().c_str());
      std::fflush(stderr);
      _exit(kStale);
    }
    if (!status.ok()) stub_ = nullptr;
    return status;
  }

  void Obey(v1::Directive directive) { stop_ = stop_ || directive == v1::STOP || g_terminate; }

  void Register() {
    v1::RegisterRequest request;
    *request.mutable_worker() = id_;
    request.set_pid(getpid());
    v1::RegisterResponse response;
    while (!Call([&](auto& stub, auto* context) {
              return stub.Register(context, request, &response);
            }).ok()) {
      absl::SleepFor(absl::Milliseconds(20));
    }
    Obey(response.directive());
  }

  // Not retried within a step: the training goes on without the coordinator.
  void Report(int64_t step, int64_t steps) {
    v1::ReportRequest request;
    *request.mutable_worker() = id_;
    request.set_sequence(sequence_ + 1);
    v1::Progress& progress = *request.mutable_progress();
    progress.set_phase("train");
    progress.set_step(step);
    progress.set_steps(steps);
    progress.set_images(step * 10);
    request.add_log_lines(absl::StrCat("step ", step));
    for (const v1::Checkpoint& checkpoint : unreported_)
      *request.add_new_checkpoints() = checkpoint;
    v1::ReportResponse response;
    const grpc::Status status =
        Call([&](auto& stub, auto* context) { return stub.Report(context, request, &response); });
    Obey(response.directive());
    if (!status.ok()) return;
    ++sequence_;
    unreported_.clear();
  }

  int64_t Resume() {
    int64_t newest = 0;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(folder_ / "checkpoints", error)) {
      int64_t step = 0;
      const std::string name = entry.path().filename().string();
      if (absl::SimpleAtoi(name.substr(name.find('-') + 1), &step)) newest = std::max(newest, step);
    }
    return newest;
  }

  void Save(int64_t step) {
    if (id_.rank() != 0) return;
    const std::string name = absl::StrFormat("step-%08d", step);
    const std::filesystem::path path = folder_ / "checkpoints" / name;
    if (std::filesystem::exists(path) || !MakeFolders(path).ok()) return;
    v1::Checkpoint& checkpoint = unreported_.emplace_back();
    checkpoint.set_id(name);
    checkpoint.set_step(step);
    checkpoint.set_path(path.string());
    checkpoint.set_digest(absl::StrCat("sha256:", step));
    checkpoint.set_bytes(1000);
    checkpoint.set_write_seconds(0.01);
  }

  template <typename Function>
  int Leave(int64_t step, Function&& fill, int code) {
    v1::FinishRequest finish;
    *finish.mutable_worker() = id_;
    finish.mutable_progress()->set_phase("done");
    finish.mutable_progress()->set_step(step);
    for (const v1::Checkpoint& checkpoint : unreported_) *finish.add_new_checkpoints() = checkpoint;
    fill(finish);
    std::string json;
    if (!google::protobuf::util::MessageToJsonString(finish, &json).ok()) return 3;
    const std::filesystem::path record =
        folder_ / "attempts" / flags_["--epoch"] / absl::StrCat("rank", id_.rank(), ".exit.json");
    if (!WriteFileAtomically(record, json).ok()) return 3;
    const absl::Time deadline = absl::Now() + absl::Milliseconds(Number("patience", 500));
    v1::FinishResponse response;
    while (!Call([&](auto& stub, auto* context) {
              return stub.Finish(context, finish, &response);
            }).ok() &&
           absl::Now() < deadline) {
      absl::SleepFor(absl::Milliseconds(20));
    }
    return code;
  }

  std::map<std::string, std::string> flags_;
  std::map<std::string, std::string> script_;
  v1::WorkerId id_;
  std::filesystem::path folder_;
  std::unique_ptr<v1::WorkerService::Stub> stub_;
  int64_t sequence_ = 0;
  std::vector<v1::Checkpoint> unreported_;
  bool stop_ = false;
};

int Main(int argc, char** argv) {
  std::map<std::string, std::string> flags;
  for (int i = 2; i + 1 < argc; i += 2) flags[argv[i]] = argv[i + 1];
  const absl::StatusOr<std::string> yaml = ReadFile(flags["--config"]);
  if (!yaml.ok()) return 2;
  const absl::StatusOr<ParsedRecipe> recipe = ParseRecipe(*yaml);
  if (!recipe.ok()) return 2;
  std::map<std::string, std::string> script;
  for (const absl::string_view word :
       absl::StrSplit(recipe->recipe.owner, ' ', absl::SkipEmpty())) {
    script.insert(absl::StrSplit(word, absl::MaxSplits('=', 1)));
  }
  signal(SIGPIPE, SIG_IGN);
  signal(SIGTERM, [](int) { g_terminate = true; });
  return Worker(std::move(flags), std::move(script)).Run();
}

}  // namespace
}  // namespace pyramid

int main(int argc, char** argv) { return pyramid::Main(argc, argv); }
