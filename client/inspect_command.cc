#include <google/protobuf/stubs/common.h>
#include <grpcpp/grpcpp.h>

#include <nlohmann/json.hpp>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/format.h"
#include "client/machine.h"
#include "model/checkpoint.h"
#include "model/device.h"
#include "model/formats/safetensors.h"
#include "proto/base/file.h"
#include "proto/base/hash.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

struct Options {
  std::string path;
  bool machine = false;
  bool json = false;
};

std::string Dump(const nlohmann::json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

struct TensorFacts {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  int64_t elements = 1;
};

std::vector<TensorFacts> Facts(const SafetensorsView& view) {
  std::vector<TensorFacts> facts;
  for (const TensorBytes& tensor : view.tensors) {
    TensorFacts one{tensor.name, tensor.dtype, tensor.shape};
    for (const int64_t side : tensor.shape) one.elements *= side;
    facts.push_back(std::move(one));
  }
  return facts;
}

int64_t Parameters(const std::vector<TensorFacts>& tensors) {
  int64_t parameters = 0;
  for (const TensorFacts& tensor : tensors) parameters += tensor.elements;
  return parameters;
}

nlohmann::json TensorsJson(const std::vector<TensorFacts>& tensors) {
  nlohmann::json json = nlohmann::json::array();
  for (const TensorFacts& tensor : tensors) {
    json.push_back({{"name", tensor.name}, {"dtype", tensor.dtype}, {"shape", tensor.shape}});
  }
  return json;
}

std::string TensorsText(const std::vector<TensorFacts>& tensors) {
  Table table({"TENSOR", "DTYPE", "SHAPE", "ELEMENTS"});
  table.Right(3);
  for (const TensorFacts& tensor : tensors) {
    table.Add({OneLine(tensor.name), tensor.dtype,
               absl::StrCat("[", absl::StrJoin(tensor.shape, ", "), "]"),
               FormatCount(tensor.elements)});
  }
  return table.Text();
}

int InspectFile(Environment& environment, const Options& options,
                const std::filesystem::path& path) {
  const absl::StatusOr<std::string> bytes = ReadFile(path);
  if (!bytes.ok()) return Fail(environment, bytes.status());
  const absl::StatusOr<SafetensorsView> view = ParseSafetensors(*bytes);
  if (!view.ok()) return Fail(environment, Annotate(view.status(), options.path));
  const std::vector<TensorFacts> tensors = Facts(*view);
  const std::string digest = Sha256Hex(*bytes);
  if (options.json) {
    *environment.out << Dump({{"kind", "safetensors"},
                              {"bytes", bytes->size()},
                              {"sha256", digest},
                              {"parameters", Parameters(tensors)},
                              {"metadata", view->metadata},
                              {"tensors", TensorsJson(tensors)}});
    return kDone;
  }
  Table facts;
  facts.Add({"file", options.path});
  facts.Add({"size", FormatBytes(static_cast<int64_t>(bytes->size()))});
  facts.Add({"sha256", digest});
  facts.Add({"parameters", FormatCount(Parameters(tensors))});
  for (const auto& [key, value] : view->metadata) facts.Add({OneLine(key), OneLine(value)});
  *environment.out << facts.Text() << "\n" << TensorsText(tensors);
  return kDone;
}

struct FileState {
  std::string name;
  int64_t bytes = 0;
  absl::Status state;
};

std::string ScaleText(const v1::Preprocessing& p) {
  if (p.has_pad()) return absl::StrCat("pad to ", p.pad().to(), " with ", p.pad().fill());
  return absl::StrCat("resize to ", p.resize().side(), " (", p.resize().kernel(), ", antialias ",
                      p.resize().antialias(), ")");
}

std::string ManifestText(const std::string& path, const v1::Manifest& manifest) {
  const v1::NetworkConfig& network = manifest.network();
  const v1::Preprocessing& p = manifest.preprocessing();
  const v1::TrainingRecord& training = manifest.training();
  Table facts;
  facts.Add({"checkpoint", path});
  facts.Add({"network", absl::StrCat(network.variant(), ", ", network.num_classes(), " classes, ",
                                     network.in_channels(), " channels")});
  facts.Add({"numerics",
             absl::StrFormat("padding %s, GELU %s, outer eps %g", network.numerics().pad_style(),
                             network.numerics().gelu(), network.numerics().eps_outer())});
  facts.Add({"origin", OneLine(manifest.origin())});
  facts.Add({"pictures", absl::StrCat(ScaleText(p), ", crop ", p.crop(), ", EXIF ", p.exif())});
  facts.Add({"labels", manifest.labels().empty() ? "none" : FormatCount(manifest.labels_size())});
  facts.Add(
      {"trained",
       absl::StrCat(FormatCount(training.step()), " steps, ", training.epochs_done(),
                    " epochs, global batch ", training.global_batch(), ", seed ", training.seed(),
                    training.job_id().empty() ? "" : ", job ", OneLine(training.job_id()))});
  if (training.validated()) {
    facts.Add({"validated", absl::StrCat("top-1 ", FormatFraction(training.val_top1()), ", loss ",
                                         FormatFraction(training.val_loss()), " on ",
                                         FormatCount(training.val_images()), " pictures")});
  }
  facts.Add({"digest", OneLine(manifest.digest())});
  facts.Add({"created",
             absl::StrCat(FormatTime(manifest.created()), " by ", OneLine(manifest.created_by()))});
  return facts.Text();
}

// A damaged file doesn't hide the others: each is checked and told.
int InspectFolder(Environment& environment, const Options& options,
                  const std::filesystem::path& folder) {
  const absl::StatusOr<v1::Manifest> manifest = ReadManifest(folder);
  if (!manifest.ok()) return Fail(environment, Annotate(manifest.status(), options.path));
  std::vector<FileState> files;
  std::vector<TensorFacts> tensors;
  absl::Status damage;
  for (const v1::FileEntry& file : manifest->files()) {
    const absl::StatusOr<std::string> bytes = ReadCheckpointFile(folder, *manifest, file.name());
    absl::Status state = bytes.status();
    if (bytes.ok() && file.name() == kWeightsFile) {
      const absl::StatusOr<SafetensorsView> view = ParseSafetensors(*bytes);
      if (view.ok()) tensors = Facts(*view);
      state = view.status();
    }
    if (damage.ok()) damage = state;
    files.push_back({file.name(), file.bytes(), state});
  }
  if (options.json) {
    nlohmann::json list = nlohmann::json::array();
    for (const FileState& file : files) {
      nlohmann::json one = {{"name", file.name}, {"bytes", file.bytes}, {"ok", file.state.ok()}};
      if (!file.state.ok()) one["damage"] = std::string(file.state.message());
      list.push_back(std::move(one));
    }
    *environment.out << Dump(
        {{"kind", "checkpoint"},
         {"verified", damage.ok()},
         {"digest", manifest->digest()},
         {"parameters", Parameters(tensors)},
         {"files", std::move(list)},
         {"manifest", nlohmann::json::parse(ToJson(*manifest), nullptr, false)},
         {"tensors", TensorsJson(tensors)}});
  } else {
    Table table({"FILE", "SIZE", "STATE"});
    table.Right(1);
    for (const FileState& file : files) {
      table.Add({OneLine(file.name), FormatBytes(file.bytes),
                 file.state.ok() ? "verified" : OneLine(file.state.message())});
    }
    *environment.out << ManifestText(options.path, *manifest) << "parameters  "
                     << FormatCount(Parameters(tensors)) << "\n\n"
                     << table.Text() << "\n"
                     << TensorsText(tensors);
  }
  if (damage.ok()) return kDone;
  return Fail(environment,
              absl::DataLossError(absl::StrCat(options.path, " is damaged: ", damage.message())));
}

int InspectMachine(Environment& environment, const Options& options) {
  const Machine machine = ReadMachine();
  const std::string protobuf = google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION);
  if (options.json) {
    nlohmann::json devices = nlohmann::json::array();
    for (const DeviceKind& kind : ProbeDevices()) {
      devices.push_back(
          {{"kind", kind.kind}, {"count", kind.count}, {"unavailable", kind.unavailable}});
    }
    *environment.out << Dump({{"processor", machine.processor},
                              {"cores", machine.cores},
                              {"instruction_sets", machine.instruction_sets},
                              {"memory_bytes", machine.memory_bytes},
                              {"memory_available_bytes", machine.memory_available_bytes},
                              {"system", machine.system},
                              {"devices", std::move(devices)},
                              {"versions",
                               {{"pyramid", PYRAMID_VERSION},
                                {"libtorch", PYRAMID_LIBTORCH_VERSION},
                                {"grpc", grpc::Version()},
                                {"protobuf", protobuf}}}});
    return kDone;
  }
  Table facts;
  facts.Add({"processor", machine.processor.empty() ? "unknown" : OneLine(machine.processor)});
  facts.Add({"cores", absl::StrCat(machine.cores)});
  facts.Add({"instruction sets", machine.instruction_sets.empty()
                                     ? "none that kernels choose by"
                                     : absl::StrJoin(machine.instruction_sets, " ")});
  facts.Add({"memory", absl::StrCat(FormatBytes(machine.memory_bytes), ", ",
                                    FormatBytes(machine.memory_available_bytes), " available")});
  facts.Add({"devices", DescribeDevices()});
  facts.Add({"system", machine.system});
  facts.Add({"versions", absl::StrCat("pyramid " PYRAMID_VERSION
                                      ", LibTorch " PYRAMID_LIBTORCH_VERSION ", gRPC ",
                                      grpc::Version(), ", protobuf ", protobuf)});
  *environment.out << facts.Text();
  return kDone;
}

int Inspect(Environment& environment, const Options& options) {
  if (options.machine != options.path.empty()) {
    return Fail(environment,
                UsageError("name a checkpoint's folder or a .safetensors file, or say --machine"));
  }
  if (options.machine) return InspectMachine(environment, options);
  const std::filesystem::path path = environment.folder / options.path;
  std::error_code ignored;
  return std::filesystem::is_directory(path, ignored) ? InspectFolder(environment, options, path)
                                                      : InspectFile(environment, options, path);
}

}  // namespace

void AddInspectCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand(
      "inspect", "Show and verify a checkpoint or a weight file; or show this machine");
  command->add_option("path", options->path, "A checkpoint's folder, or a .safetensors file")
      ->type_name("FOLDER|FILE");
  command->add_flag("--machine", options->machine,
                    "Cores, instruction sets, memory, devices, versions");
  command->add_flag("--json", options->json, "Print one JSON object");
  command->callback([line, options] {
    line.action = [line, options] { return Inspect(line.environment, *options); };
  });
}

}  // namespace pyramid
