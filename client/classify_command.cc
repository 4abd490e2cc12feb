#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/about_weights.h"
#include "client/answerer.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/format.h"
#include "client/npy.h"
#include "proto/base/file.h"
#include "proto/base/status.h"
#include "proto/base/time.h"

namespace pyramid {
namespace {

// One request's worth: under every server's limits (gRPC's own default is 4 MiB).
constexpr int kRequestPictures = 32;
constexpr int64_t kRequestBytes = 3 << 20;
constexpr int64_t kLargestArray = int64_t{1} << 30;

struct Options {
  std::vector<std::string> inputs;
  std::string model;
  std::string checkpoint;
  std::string device = "cpu";
  std::string dtype = "fp32";
  WeightOptions weights;
  DecodeLimits decode;
  int top_k = 5;
  bool logits = false;
  bool json = false;
  double timeout = 30;
};

struct Answer {
  std::string picture;  // the file, with [index] for an array's
  v1::PictureResult result;
};

// Gathers pictures into requests and answers, in order.
class Run {
 public:
  explicit Run(Answerer& answerer) : answerer_(answerer) {}

  absl::Status Add(std::string name, v1::Picture picture, int64_t bytes) {
    if (!waiting_.empty() && (static_cast<int>(waiting_.size()) >= kRequestPictures ||
                              waiting_bytes_ + bytes > kRequestBytes)) {
      RETURN_IF_ERROR(Send());
    }
    waiting_at_.push_back(answers_.size());
    answers_.push_back({std::move(name), {}});
    waiting_.push_back(std::move(picture));
    waiting_bytes_ += bytes;
    return absl::OkStatus();
  }

  void AddError(std::string name, const absl::Status& status) {
    Answer answer{std::move(name), {}};
    answer.result.set_code(static_cast<int>(status.code()));
    answer.result.set_message(std::string(status.message()));
    answers_.push_back(std::move(answer));
  }

  absl::Status Send() {
    if (waiting_.empty()) return absl::OkStatus();
    ASSIGN_OR_RETURN(last_, answerer_.Classify(std::exchange(waiting_, {})));
    for (size_t i = 0; i < waiting_at_.size(); ++i) {
      answers_[waiting_at_[i]].result = std::move(*last_.mutable_results(static_cast<int>(i)));
    }
    answered_ = true;
    waiting_at_.clear();
    waiting_bytes_ = 0;
    return absl::OkStatus();
  }

  const std::vector<Answer>& answers() const { return answers_; }
  bool answered() const { return answered_; }
  const v1::ClassifyResponse& last() const { return last_; }  // model, version, digest, timings

 private:
  Answerer& answerer_;
  std::vector<Answer> answers_;
  std::vector<v1::Picture> waiting_;
  std::vector<size_t> waiting_at_;
  int64_t waiting_bytes_ = 0;
  bool answered_ = false;
  v1::ClassifyResponse last_;
};

absl::Status AddArray(const std::filesystem::path& path, const std::string& name, Run& run) {
  absl::StatusOr<std::string> bytes = ReadFile(path, kLargestArray);
  if (!bytes.ok()) return run.AddError(name, bytes.status()), absl::OkStatus();
  const absl::StatusOr<NpyTensor> tensor = ParseNpy(*bytes);
  if (!tensor.ok()) return run.AddError(name, tensor.status()), absl::OkStatus();
  bytes->clear();
  for (int i = 0; i < tensor->batch; ++i) {
    v1::Picture picture;
    v1::ImageTensor& image = *picture.mutable_tensor();
    image.set_channels(tensor->channels);
    image.set_height(tensor->height);
    image.set_width(tensor->width);
    const std::span<const float> values = tensor->picture(i);
    image.mutable_values()->Add(values.begin(), values.end());
    RETURN_IF_ERROR(run.Add(absl::StrCat(name, "[", i, "]"), std::move(picture),
                            static_cast<int64_t>(values.size_bytes())));
  }
  return absl::OkStatus();
}

absl::Status AddInputs(const Environment& environment, const Options& options, Run& run) {
  for (const std::string& name : options.inputs) {
    const std::filesystem::path path = environment.folder / name;
    if (absl::EndsWith(name, ".npy")) {
      RETURN_IF_ERROR(AddArray(path, name, run));
      continue;
    }
    absl::StatusOr<std::string> bytes = ReadFile(path, options.decode.max_bytes);
    if (!bytes.ok()) {
      run.AddError(name, bytes.status());
      continue;
    }
    const auto size = static_cast<int64_t>(bytes->size());
    v1::Picture picture;
    picture.set_encoded(*std::move(bytes));
    RETURN_IF_ERROR(run.Add(name, std::move(picture), size));
  }
  return run.Send();
}

nlohmann::json ErrorJson(const v1::PictureResult& result) {
  return {{"code", absl::StatusCodeToString(static_cast<absl::StatusCode>(result.code()))},
          {"message", result.message()}};
}

nlohmann::json LogitsJson(const std::vector<Answer>& answers) {
  nlohmann::json rows = nlohmann::json::array();
  nlohmann::json errors = nlohmann::json::array();
  for (const Answer& answer : answers) {
    if (answer.result.code() == 0) {
      rows.push_back(
          std::vector<float>(answer.result.logits().begin(), answer.result.logits().end()));
    } else {
      rows.push_back(nullptr);  // a row a picture
      nlohmann::json error = ErrorJson(answer.result);
      error["picture"] = answer.picture;
      errors.push_back(std::move(error));
    }
  }
  nlohmann::json json = {{"logits", std::move(rows)}};
  if (!errors.empty()) json["errors"] = std::move(errors);
  return json;
}

nlohmann::json AnswersJson(const Run& run) {
  nlohmann::json results = nlohmann::json::array();
  for (const Answer& answer : run.answers()) {
    nlohmann::json one = {{"picture", answer.picture}};
    if (answer.result.code() != 0) {
      one["error"] = ErrorJson(answer.result);
    } else {
      nlohmann::json predictions = nlohmann::json::array();
      for (const v1::Prediction& p : answer.result.predictions()) {
        predictions.push_back(
            {{"index", p.index()}, {"label", p.label()}, {"probability", p.probability()}});
      }
      one["predictions"] = std::move(predictions);
    }
    results.push_back(std::move(one));
  }
  const v1::ClassifyResponse& last = run.last();
  return {{"model", last.model()},
          {"version", last.version()},
          {"digest", last.digest()},
          {"results", std::move(results)}};
}

std::string AnswersText(const std::vector<Answer>& answers, bool logits) {
  Table table;
  table.Right(2);
  std::string text;
  for (const Answer& answer : answers) {
    if (answer.result.code() != 0) continue;
    if (logits) {
      absl::StrAppend(&text, OneLine(answer.picture), "  ",
                      absl::StrJoin(answer.result.logits(), " ",
                                    [](std::string* out, float value) {
                                      absl::StrAppend(out, absl::StrFormat("%.6g", value));
                                    }),
                      "\n");
      continue;
    }
    std::string name = OneLine(answer.picture);
    for (const v1::Prediction& p : answer.result.predictions()) {
      table.Add({std::exchange(name, ""), OneLine(p.label()),
                 absl::StrFormat("%.2f %%", 100 * p.probability())});
    }
  }
  return logits ? text : table.Text();
}

int Report(Environment& environment, const Options& options, const Run& run) {
  bool failed = false;
  for (const Answer& answer : run.answers()) {
    if (answer.result.code() == 0) continue;
    failed = true;
    *environment.err << absl::StrCat("pyramid: ", OneLine(answer.picture), ": ",
                                     OneLine(answer.result.message()), "\n");
  }
  if (options.json) {
    const nlohmann::json json = options.logits ? LogitsJson(run.answers()) : AnswersJson(run);
    *environment.out << json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  } else {
    if (run.answered()) {
      const v1::ClassifyResponse& last = run.last();
      *environment.err << absl::StrCat(
          "model ", OneLine(last.model()),
          last.version() == 0 ? "" : absl::StrCat(" version ", last.version()), ", ",
          FormatSeconds(absl::ToDoubleSeconds(FromProto(last.timings().total()))), "\n");
    }
    *environment.out << AnswersText(run.answers(), options.logits);
  }
  return failed ? kFailed : kDone;
}

int Classify(Environment& environment, const Options& options) {
  const AnswerOptions answer_options{
      .top_k = options.top_k, .logits = options.logits, .decode = options.decode};
  std::unique_ptr<Connection> connection;
  std::unique_ptr<Answerer> answerer;
  if (!options.checkpoint.empty()) {
    const ClassifierOptions classifier{
        .device = options.device, .dtype = options.dtype, .weights = options.weights};
    absl::StatusOr<std::unique_ptr<Answerer>> made =
        AnswerFromCheckpoint(environment, options.checkpoint, classifier, answer_options);
    if (!made.ok()) return Fail(environment, made.status());
    answerer = *std::move(made);
  } else {
    ModelName model;
    if (!options.model.empty()) {
      absl::StatusOr<ModelName> parsed = ParseModelName(options.model);
      if (!parsed.ok()) return Fail(environment, parsed.status());
      model = *std::move(parsed);
    }
    absl::StatusOr<std::unique_ptr<Connection>> opened = Connection::Open(environment);
    if (!opened.ok()) return Fail(environment, opened.status());
    connection = *std::move(opened);
    answerer = AnswerFromServer(*connection, model, answer_options, absl::Seconds(options.timeout));
  }
  Run run(*answerer);
  if (const absl::Status status = AddInputs(environment, options, run); !status.ok()) {
    return Fail(environment, status);
  }
  return Report(environment, options, run);
}

// Defaults and meaning as a server's serving.max_picture_bytes and so on.
void AddLimitFlags(CLI::App& command, DecodeLimits& limits, CLI::Option* needs) {
  const DecodeLimits defaults;
  for (CLI::Option* flag :
       {command.add_option("--max-picture-bytes", limits.max_bytes,
                           absl::StrCat("Of a picture's file (", defaults.max_bytes, ")")),
        command.add_option(
            "--max-picture-pixels", limits.max_pixels,
            absl::StrCat("Width times height, by the file's header (", defaults.max_pixels, ")")),
        command.add_option("--max-picture-side", limits.max_side,
                           absl::StrCat("Width or height (", defaults.max_side, ")")),
        command.add_option(
            "--max-pixels-per-byte", limits.max_pixels_per_byte,
            absl::StrCat("Of pictures over a megapixel (", defaults.max_pixels_per_byte, ")"))}) {
    flag->type_name("N")
        ->check(CLI::Range(1, 1'000'000'000))
        ->needs(needs)
        ->group("Limits of a picture, with --ckpt-path");
  }
}

}  // namespace

void AddClassifyCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      line.app.add_subcommand("classify", "Classify pictures, by a server's model or a checkpoint");
  command
      ->add_option("inputs", options->inputs,
                   "Picture files, or .npy files with float32 arrays [pictures, channels, height, "
                   "width] that are normalised already")
      ->type_name("PICTURE|ARRAY.npy")
      ->required();
  CLI::Option* model =
      command->add_option("--model", options->model, "The server's model; default: the only one")
          ->type_name("NAME[:VERSION|@ALIAS]");
  CLI::Option* checkpoint =
      command
          ->add_option("--ckpt-path,--ckpt", options->checkpoint,
                       "A checkpoint's folder, or a file of weights (safetensors, PyTorch's .pth, "
                       "MindSpore's .ckpt): classify here, without a server")
          ->type_name("FOLDER|FILE")
          ->excludes(model);
  command->add_option("--device", options->device, "With --ckpt-path: cpu, cuda:N or npu:N")
      ->type_name("DEVICE")
      ->needs(checkpoint);
  command->add_option("--dtype", options->dtype, "With --ckpt-path: fp32 (default) or bf16")
      ->type_name("DTYPE")
      ->check(CLI::IsMember({"fp32", "bf16"}))
      ->needs(checkpoint);
  AddWeightFlags(*command, options->weights, checkpoint);
  AddLimitFlags(*command, options->decode, checkpoint);
  command->add_option("--top-k", options->top_k, "Predictions a picture (5)")
      ->type_name("K")
      ->check(CLI::Range(1, 1'000'000));
  command->add_flag("--logits", options->logits, "Print every class's logit instead");
  command->add_flag("--json", options->json, "Print one JSON object");
  command->add_option("--timeout", options->timeout, "Seconds a request may take (30)")
      ->type_name("SECONDS")
      ->check(CLI::Range(0.001, 86400.0));
  AddServerFlag(*command, line.environment);
  command->callback([line, options] {
    line.action = [line, options] { return Classify(line.environment, *options); };
  });
}

}  // namespace pyramid
