#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"
#include "proto/base/time.h"

namespace pyramid {
namespace {

struct Options {
  std::string checkpoint;
  std::string max_latency;
  v1::PromoteCheckpointRequest request;
};

int Promote(Environment& environment, const Options& options) {
  const size_t colon = options.checkpoint.find(':');
  v1::PromoteCheckpointRequest request = options.request;
  request.set_job_id(options.checkpoint.substr(0, colon));
  if (colon != std::string::npos) request.set_checkpoint_id(options.checkpoint.substr(colon + 1));
  if (request.job_id().empty() || (colon != std::string::npos && request.checkpoint_id().empty())) {
    return Fail(environment, UsageError(absl::StrCat("\"", options.checkpoint,
                                                     "\" is not JOB or JOB:CHECKPOINT")));
  }
  if (!options.max_latency.empty()) {
    absl::Duration latency;
    if (!absl::ParseDuration(options.max_latency, &latency) || latency < absl::ZeroDuration() ||
        latency > absl::Hours(1)) {
      return Fail(environment,
                  UsageError(absl::StrCat("--max-latency is \"", options.max_latency,
                                          "\"; use a duration like 25ms, at most 1h")));
    }
    *request.mutable_max_latency() = ToProto(latency);
  }
  request.set_actor(environment.user);
  const absl::StatusOr<v1::PromoteCheckpointResponse> response = CallTraining(
      environment, &v1::TrainingService::Stub::PromoteCheckpoint, request, kPromoteTimeout);
  if (!response.ok()) return Fail(environment, response.status());
  const bool stable = response->alias().empty() || response->alias() == "stable";
  *environment.out << absl::StrCat("model ", OneLine(response->model()), " version ",
                                   response->version(),
                                   response->existed() ? " (it was there already)" : "",
                                   stable ? std::string(" in service, ")
                                          : absl::StrCat(" is ", OneLine(response->alias()), ", "),
                                   OneLine(response->digest()), "\n");
  for (const std::string& gate : response->gates()) {
    *environment.out << absl::StrCat("  ", OneLine(gate), "\n");
  }
  return kDone;
}

// The server's gates hold where none of these is given.
void AddGateFlags(CLI::App& command, Options& options) {
  v1::PromoteCheckpointRequest& request = options.request;
  const char* const group = "Gates; 0 asks for nothing, without the flag the server decides";
  command
      .add_option_function<double>(
          "--min-top1", [&request](const double& share) { request.set_min_top1(share); },
          "Least top-1 of the checkpoint's validation, 0..1")
      ->type_name("SHARE")
      ->check(CLI::Range(0.0, 1.0))
      ->group(group);
  command
      .add_option("--max-latency", options.max_latency, "Longest median forward pass, such as 25ms")
      ->type_name("DURATION")
      ->group(group);
  command
      .add_option_function<int>(
          "--latency-batch", [&request](const int& batch) { request.set_latency_batch(batch); },
          "Pictures in that pass")
      ->type_name("N")
      ->check(CLI::Range(1, 1024))
      ->group(group);
  command
      .add_option_function<double>(
          "--min-agreement", [&request](const double& share) { request.set_min_agreement(share); },
          "Least share of the self-test's pictures answered as the stable version does, 0..1")
      ->type_name("SHARE")
      ->check(CLI::Range(0.0, 1.0))
      ->group(group);
  command
      .add_option_function<bool>(
          "--require-self-test",
          [&request](const bool& required) { request.set_require_self_test(required); },
          "The checkpoint must bring a self-test")
      ->type_name("true|false")
      ->expected(0, 1)
      ->default_str("true")
      ->group(group);
}

}  // namespace

void AddPromoteCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand("promote", "Put a job's checkpoint into service");
  command
      ->add_option("checkpoint", options->checkpoint,
                   "The job; its newest checkpoint if none is named")
      ->type_name("JOB[:CHECKPOINT]")
      ->required();
  command->add_option("--as", *options->request.mutable_model(), "The model's name")
      ->type_name("NAME")
      ->required();
  command->add_option("--dtype", *options->request.mutable_dtype(), "fp32 (default) or bf16")
      ->type_name("DTYPE")
      ->check(CLI::IsMember({"fp32", "bf16"}));
  command
      ->add_option("--alias", *options->request.mutable_alias(),
                   "Names the version; stable (default) answers requests that name nothing")
      ->type_name("ALIAS");
  command
      ->add_option_function<double>(
          "--traffic",
          [options = options.get()](const double& percent) {
            options->request.set_traffic_percent(percent);
          },
          "Share of the requests that name nothing for this alias")
      ->type_name("PERCENT")
      ->check(CLI::Range(0.0, 100.0));
  AddGateFlags(*command, *options);
  AddServerFlag(*command, line.environment);
  command->callback([line, options] {
    line.action = [line, options] { return Promote(line.environment, *options); };
  });
}

}  // namespace pyramid
