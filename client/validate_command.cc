#include <algorithm>
#include <deque>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/answerer.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"
#include "client/exported_pictures.h"
#include "client/format.h"
#include "client/progress.h"
#include "client/retry.h"
#include "client/worker_process.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr absl::string_view kPushback = "grpc-retry-pushback-ms";
constexpr absl::Duration kRequestTimeout = absl::Seconds(60);
constexpr int64_t kRequestBytes = 3 << 20;     // of pictures; under gRPC's default limit of 4 MiB
constexpr int64_t kRequestOverhead = 1 << 16;  // at most, of a request beside its pictures
constexpr int kTopFive = 5;

struct Options {
  std::string data;
  std::string model;
  std::string split = "val";
  int batch = 32;
  int concurrency = 8;
  int64_t request_bytes = kRequestBytes;
  bool json = false;
};

struct Counts {
  int64_t answered = 0;
  int64_t failed = 0;  // pictures with an error of their own; not in `answered`
  int64_t top1 = 0;
  int64_t top5 = 0;
  std::string first_error;
  std::string other_label;  // the first class whose name differs between data and model
};

double Share(int64_t part, int64_t whole) {
  return whole == 0 ? 0 : static_cast<double>(part) / static_cast<double>(whole);
}

// The version to ask for, fixed at the start: a promotion in the middle must not mix two models in
// one number.
absl::StatusOr<v1::ModelVersion> FindModel(Connection& connection, const std::string& text,
                                           v1::ListModelsResponse& listed) {
  ModelName wanted;
  if (!text.empty()) {
    ASSIGN_OR_RETURN(wanted, ParseModelName(text));
  }
  grpc::ClientContext context;
  SetDeadline(context, kCallTimeout);
  const grpc::Status status =
      connection.classification()->ListModels(&context, v1::ListModelsRequest(), &listed);
  if (!status.ok()) return connection.ToStatus(status);
  const v1::ModelVersion* found = nullptr;
  for (const v1::ModelVersion& model : listed.models()) {
    if (!wanted.name.empty() && model.name() != wanted.name) continue;
    const bool meant = !wanted.alias.empty()
                           ? std::find(model.aliases().begin(), model.aliases().end(),
                                       wanted.alias) != model.aliases().end()
                       : wanted.version != 0 ? model.version() == wanted.version
                                             : model.serving();
    if (!meant) continue;
    if (found != nullptr) {
      return UsageError("the server has several models in service; name one with --model");
    }
    found = &model;
  }
  if (found == nullptr) {
    return absl::NotFoundError(
        text.empty() ? std::string("the server has no model in service")
                     : absl::StrCat("no model \"", text, "\" in service; see pyramid models"));
  }
  return *found;
}

// Sends batches from several threads and counts what comes back.
class Validation {
 public:
  Validation(Connection& connection, const v1::ModelVersion& model, const Options& options,
             const std::vector<std::string>& classes)
      : connection_(connection), model_(model), options_(options), classes_(classes) {
    for (int i = 0; i < options.concurrency; ++i) {
      threads_.emplace_back([this, i] { SendAll(static_cast<unsigned>(i)); });
    }
  }
  ~Validation() { Stop(); }

  // Waits while the queue is full. False: a request failed for good.
  bool Add(std::vector<LabelledPicture> batch) {
    absl::MutexLock lock(&mutex_);
    mutex_.Await(absl::Condition(this, &Validation::HasRoom));
    if (!error_.ok()) return false;
    queue_.push_back(std::move(batch));
    return true;
  }

  // Waits until all is answered, at most until `deadline`; true when it is.
  bool AwaitEnd(absl::Time deadline) {
    absl::MutexLock lock(&mutex_);
    closed_ = true;
    return mutex_.AwaitWithDeadline(absl::Condition(this, &Validation::IsDone), deadline);
  }

  Counts counts() const {
    absl::MutexLock lock(&mutex_);
    return counts_;
  }
  absl::Status error() const {
    absl::MutexLock lock(&mutex_);
    return error_;
  }

 private:
  bool HasRoom() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return queue_.size() < static_cast<size_t>(options_.concurrency) || !error_.ok();
  }
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !queue_.empty() || closed_ || !error_.ok();
  }
  bool IsDone() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return (queue_.empty() && in_flight_ == 0) || (!error_.ok() && in_flight_ == 0);
  }

  void Stop() {
    {
      absl::MutexLock lock(&mutex_);
      closed_ = true;
      if (error_.ok()) error_ = absl::CancelledError("stopped");
    }
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  void SendAll(unsigned seed) {
    std::minstd_rand random(seed + 1);
    while (true) {
      std::vector<LabelledPicture> batch;
      {
        absl::MutexLock lock(&mutex_);
        mutex_.Await(absl::Condition(this, &Validation::HasWork));
        if (queue_.empty() || !error_.ok()) return;
        batch = std::move(queue_.front());
        queue_.pop_front();
        ++in_flight_;
      }
      absl::StatusOr<v1::ClassifyResponse> response = Send(batch, random);
      absl::MutexLock lock(&mutex_);
      --in_flight_;
      if (response.ok()) {
        Count(batch, *response);
      } else if (error_.ok()) {
        error_ = response.status();
      }
    }
  }

  bool HasFailed() const {
    absl::MutexLock lock(&mutex_);
    return !error_.ok();
  }

  absl::StatusOr<v1::ClassifyResponse> Send(const std::vector<LabelledPicture>& batch,
                                            std::minstd_rand& random) {
    v1::ClassifyRequest request;
    request.set_model(model_.name());
    request.set_version(model_.version());
    request.set_top_k(kTopFive);
    for (const LabelledPicture& picture : batch) {
      request.add_pictures()->set_encoded(picture.bytes);
    }
    const absl::Time start = absl::Now();
    for (int tries = 1;; ++tries) {
      grpc::ClientContext context;
      SetDeadline(context, kRequestTimeout);
      v1::ClassifyResponse response;
      const grpc::Status status =
          connection_.classification()->Classify(&context, request, &response);
      if (status.ok()) {
        if (response.results_size() == request.pictures_size()) return response;
        return absl::InternalError("the server gave another number of results than of pictures");
      }
      const absl::Status error = connection_.ToStatus(status);
      std::optional<int64_t> pushback;
      const auto& trailers = context.GetServerTrailingMetadata();
      if (const auto found = trailers.find(grpc::string_ref(kPushback.data(), kPushback.size()));
          found != trailers.end()) {
        pushback = ParsePushback(absl::string_view(found->second.data(), found->second.size()));
      }
      const double jitter = std::uniform_real_distribution<double>()(random);
      const std::optional<absl::Duration> delay =
          RetryDelay(RetryPolicy(), error.code(), tries, absl::Now() - start, pushback, jitter);
      if (!delay.has_value() || HasFailed()) return error;
      absl::SleepFor(*delay);
      if (absl::IsUnavailable(error)) connection_.Refresh();
    }
  }

  void Count(const std::vector<LabelledPicture>& batch, const v1::ClassifyResponse& response)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (size_t i = 0; i < batch.size(); ++i) {
      const v1::PictureResult& result = response.results(static_cast<int>(i));
      if (result.code() != 0) {
        if (counts_.failed++ == 0) counts_.first_error = result.message();
        continue;
      }
      ++counts_.answered;
      for (int rank = 0; rank < result.predictions_size() && rank < kTopFive; ++rank) {
        const v1::Prediction& prediction = result.predictions(rank);
        if (prediction.index() != batch[i].label) continue;
        counts_.top1 += rank == 0 ? 1 : 0;
        ++counts_.top5;
        const std::string& name = classes_[static_cast<size_t>(batch[i].label)];
        const bool named = prediction.label() != absl::StrCat(prediction.index());
        if (named && prediction.label() != name && counts_.other_label.empty()) {
          counts_.other_label =
              absl::StrCat("class ", prediction.index(), " is \"", name, "\" in the data and \"",
                           prediction.label(), "\" in the model");
        }
      }
    }
  }

  Connection& connection_;
  const v1::ModelVersion model_;
  const Options options_;
  const std::vector<std::string> classes_;
  mutable absl::Mutex mutex_;
  std::deque<std::vector<LabelledPicture>> queue_ ABSL_GUARDED_BY(mutex_);
  int in_flight_ ABSL_GUARDED_BY(mutex_) = 0;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status error_ ABSL_GUARDED_BY(mutex_);
  Counts counts_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

void ShowProgress(const Environment& environment, const Counts& counts, int64_t total,
                  absl::Duration taken, ProgressDisplay& display) {
  const int64_t done = counts.answered + counts.failed;
  if (done == 0) return;
  const double fraction = Share(done, total);
  const double rate = static_cast<double>(done) / std::max(1e-9, absl::ToDoubleSeconds(taken));
  const std::string text =
      absl::StrCat(FormatCount(done), "/", FormatCount(total), " pictures ", FormatRate(rate),
                   " images/s top-1 ", FormatFraction(Share(counts.top1, counts.answered)),
                   " left ", FormatSeconds(static_cast<double>(total - done) / rate));
  const int room = std::clamp(environment.columns - static_cast<int>(text.size()) - 14, 3, 40);
  display.Update(absl::StrCat("validating ", Bar(fraction, room), " ", text),
                 absl::StrCat("validating ", text), fraction, /*milestone=*/done == total,
                 absl::Now());
}

// Reads the export to its end and validates every picture of it.
absl::Status ValidateAll(const Environment& environment, ExportedPictures& pictures,
                         const Options& options, Validation& validation, absl::Time start) {
  ProgressDisplay display(*environment.err, environment.err_is_terminal);
  std::vector<LabelledPicture> batch;
  int64_t batch_bytes = 0;
  const auto send = [&] {
    if (!validation.Add(std::exchange(batch, {}))) return false;
    batch_bytes = 0;
    ShowProgress(environment, validation.counts(), pictures.count(), absl::Now() - start, display);
    return true;
  };
  while (true) {
    ASSIGN_OR_RETURN(std::optional<LabelledPicture> picture, pictures.Next());
    if (!picture.has_value()) break;
    const auto bytes = static_cast<int64_t>(picture->bytes.size());
    if (!batch.empty() && (static_cast<int>(batch.size()) >= options.batch ||
                           batch_bytes + bytes > options.request_bytes)) {
      if (!send()) return validation.error();
    }
    batch_bytes += bytes;
    batch.push_back(*std::move(picture));
  }
  if (!batch.empty() && !send()) return validation.error();
  while (!validation.AwaitEnd(absl::Now() + absl::Milliseconds(200))) {
    ShowProgress(environment, validation.counts(), pictures.count(), absl::Now() - start, display);
  }
  RETURN_IF_ERROR(validation.error());
  ShowProgress(environment, validation.counts(), pictures.count(), absl::Now() - start, display);
  return absl::OkStatus();
}

int Report(Environment& environment, const Options& options, const v1::ModelVersion& model,
           const Counts& counts, absl::Duration taken) {
  const double seconds = absl::ToDoubleSeconds(taken);
  const double rate = static_cast<double>(counts.answered + counts.failed) / seconds;
  const bool has_top5 = model.network().num_classes() >= kTopFive;
  const double top1 = Share(counts.top1, counts.answered);
  const double top5 = Share(counts.top5, counts.answered);
  if (!counts.other_label.empty()) {
    *environment.err << absl::StrCat("warning: ", OneLine(counts.other_label),
                                     "; are the classes in the same order?\n");
  }
  if (options.json) {
    nlohmann::json json = {
        {"model", model.name()},  {"version", model.version()}, {"digest", model.digest()},
        {"split", options.split}, {"images", counts.answered},  {"failed", counts.failed},
        {"top1", top1},           {"seconds", seconds},         {"images_per_second", rate}};
    json["top5"] = has_top5 ? nlohmann::json(top5) : nlohmann::json(nullptr);
    *environment.out << json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  } else {
    *environment.out << absl::StrCat("top-1 ", FormatFraction(top1), "\n");
    if (has_top5) *environment.out << absl::StrCat("top-5 ", FormatFraction(top5), "\n");
    *environment.out << absl::StrFormat("images %d\nfailed %d\nimages/s %.0f\n", counts.answered,
                                        counts.failed, rate);
  }
  if (counts.failed == 0 && counts.answered > 0) return kDone;
  if (counts.answered + counts.failed == 0) {
    return Fail(environment, absl::InternalError("there are no pictures in this split"));
  }
  return Fail(environment,
              absl::InternalError(absl::StrCat(FormatCount(counts.failed),
                                               " pictures failed, the first: ", counts.first_error,
                                               "; the numbers are of the others")));
}

int Validate(Environment& environment, Options options) {
  if (options.data.empty()) {
    return Fail(environment,
                UsageError("DATA is missing: a data folder or a recipe file; or validate here with "
                           "-c RECIPE --ckpt_path FILE|FOLDER"));
  }
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(environment);
  if (!connection.ok()) return Fail(environment, connection.status());
  v1::ListModelsResponse listed;
  const absl::StatusOr<v1::ModelVersion> model = FindModel(**connection, options.model, listed);
  if (!model.ok()) return Fail(environment, model.status());
  if (listed.max_pictures() > 0) options.batch = std::min(options.batch, listed.max_pictures());
  if (listed.max_message_bytes() > 0) {
    options.request_bytes =
        std::min(options.request_bytes, listed.max_message_bytes() - kRequestOverhead);
  }
  if (environment.worker.empty()) {
    return Fail(environment,
                absl::InternalError("pyramid-worker is neither beside this program nor on PATH; it "
                                    "reads the data, so build or install it"));
  }
  absl::StatusOr<std::unique_ptr<WorkerPipe>> pipe = WorkerPipe::Start(
      environment.worker, {"data", "export", options.data, "--split", options.split, "--out", "-"},
      environment.folder);
  if (!pipe.ok()) return Fail(environment, absl::InternalError(pipe.status().message()));
  WorkerPipe& worker = **pipe;
  absl::StatusOr<ExportedPictures> pictures =
      ExportedPictures::Open([&worker](char* to, size_t size) { return worker.Read(to, size); });
  if (!pictures.ok()) {
    // A worker that says why it failed knows better than the end of its output.
    const absl::Status ended = worker.Finish();
    return Fail(environment, ended.ok() ? pictures.status() : ended);
  }
  const int classes = model->network().num_classes();
  if (classes > 0 && static_cast<int>(pictures->classes().size()) != classes) {
    return Fail(environment, absl::InvalidArgumentError(absl::StrCat(
                                 options.data, " has ", pictures->classes().size(),
                                 " classes, the model ", model->name(), " has ", classes)));
  }
  const absl::Time start = absl::Now();
  Validation validation(**connection, *model, options, pictures->classes());
  absl::Status status = ValidateAll(environment, *pictures, options, validation, start);
  const absl::Duration taken = absl::Now() - start;
  if (status.ok() || absl::IsDataLoss(status)) {
    const absl::Status ended = worker.Finish();
    if (!ended.ok()) status = ended;
  }
  if (!status.ok()) return Fail(environment, status);
  return Report(environment, options, *model, validation.counts(), taken);
}

}  // namespace

void AddValidateCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      line.app.add_subcommand("validate", "Measure top-1 and top-5 of a model on a data set");
  command->add_option("data", options->data, "A data folder, or a recipe that names one")
      ->type_name("DATA");
  command->add_option("--model", options->model, "The server's model; default: the only one")
      ->type_name("NAME[:VERSION|@ALIAS]");
  command->add_option("--split", options->split, "The part of the data (val)")->type_name("SPLIT");
  command->add_option("--batch", options->batch, "Pictures a request (32)")
      ->type_name("N")
      ->check(CLI::Range(1, 4096));
  command->add_option("--concurrency", options->concurrency, "Requests in flight (8)")
      ->type_name("N")
      ->check(CLI::Range(1, 256));
  command->add_flag("--json", options->json, "Print one JSON object");
  AddServerFlag(*command, line.environment);
  command->footer(
      "Offline, without a server: pyramid validate -c RECIPE --ckpt_path FILE|FOLDER runs "
      "pyramid-worker validate.");
  command->callback([line, options] {
    line.action = [line, options] { return Validate(line.environment, *options); };
  });
}

}  // namespace pyramid
