#include <google/protobuf/stubs/common.h>
#include <grpcpp/grpcpp.h>

#include <nlohmann/json.hpp>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "client/about_weights.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/format.h"
#include "client/machine.h"
#include "client/progress.h"
#include "model/checkpoint.h"
#include "model/device.h"
#include "model/formats/weight_file.h"
#include "model/kernels/cpu_kernels.h"
#include "model/recipe.h"
#include "model/weights.h"
#include "proto/base/hash.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

struct Options {
  std::string path;
  WeightOptions weights;
  bool machine = false;
  bool json = false;
};

std::string Dump(const nlohmann::json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

struct TensorFacts {
  std::string group;
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  int64_t elements = 1;
};

std::vector<TensorFacts> Facts(const WeightFile& file) {
  std::vector<TensorFacts> facts;
  for (const StoredTensor& tensor : file.tensors) {
    facts.push_back(
        {tensor.group, PrintableText(tensor.name), tensor.dtype, tensor.shape, tensor.elements()});
  }
  return facts;
}

int64_t Parameters(const std::vector<TensorFacts>& tensors) {
  int64_t parameters = 0;
  for (const TensorFacts& tensor : tensors) parameters += tensor.elements;
  return parameters;
}

// Numbers of the network, without what the file holds beside it.
int64_t ParametersOf(const Weights& weights) {
  int64_t parameters = 0;
  for (const WeightParameter& parameter : weights.parameters()) {
    int64_t elements = 1;
    for (const int64_t side : parameter.shape) elements *= side;
    parameters += elements;
  }
  return parameters;
}

// Many errors name the file already.
absl::Status AboutPath(const absl::Status& status, const std::string& path) {
  return absl::StrContains(status.message(), path) ? status : Annotate(status, path);
}

nlohmann::json TensorsJson(const std::vector<TensorFacts>& tensors) {
  nlohmann::json json = nlohmann::json::array();
  for (const TensorFacts& tensor : tensors) {
    nlohmann::json one = {{"name", tensor.name}, {"dtype", tensor.dtype}, {"shape", tensor.shape}};
    if (!tensor.group.empty()) one["group"] = tensor.group;
    json.push_back(std::move(one));
  }
  return json;
}

std::string TensorsText(const std::vector<TensorFacts>& tensors) {
  Table table({"TENSOR", "DTYPE", "SHAPE", "ELEMENTS"});
  table.Right(3);
  for (const TensorFacts& tensor : tensors) {
    const std::string group = tensor.group.empty() ? "" : absl::StrCat(tensor.group, ": ");
    table.Add({OneLine(absl::StrCat(group, tensor.name)), tensor.dtype,
               absl::StrCat("[", absl::StrJoin(tensor.shape, ", "), "]"),
               FormatCount(tensor.elements)});
  }
  return table.Text();
}

// What can be told of a file of weights, also of one that isn't a PVT v2's.
struct FileFacts {
  WeightFile file;
  int64_t bytes = 0;
  std::string sha256;
  absl::Status checksums;
  absl::StatusOr<std::unique_ptr<Weights>> weights = absl::UnknownError("not read");
  std::string reason;  // why they are no PVT v2's
};

absl::StatusOr<FileFacts> ReadFacts(const std::filesystem::path& path,
                                    const WeightOptions& options) {
  FileFacts facts;
  ASSIGN_OR_RETURN(facts.file, OpenWeightFile(path));
  facts.bytes = facts.file.source->size();
  facts.weights = OpenWeights(path, options);
  if (facts.weights.ok()) {
    facts.sha256 = FactOf(**facts.weights, "sha256");
  } else {
    facts.reason = std::string(
        absl::StripPrefix(facts.weights.status().message(), absl::StrCat(path.string(), ": ")));
    ASSIGN_OR_RETURN(facts.sha256, Sha256HexOfFile(path));
  }
  facts.checksums = VerifyChecksums(facts.file);
  return facts;
}

std::string ChecksumText(const FileFacts& facts) {
  if (!facts.file.has_checksum) return "none in the file";
  return facts.checksums.ok() ? "CRC-32 verified" : OneLine(facts.checksums.message());
}

std::string FileText(const std::string& path, const FileFacts& facts,
                     const std::vector<TensorFacts>& tensors) {
  Table table;
  table.Add({"file", path});
  table.Add({"size", FormatBytes(facts.bytes)});
  table.Add({"format", WeightFormatName(facts.file.format)});
  if (facts.weights.ok()) {
    const v1::Manifest& manifest = (*facts.weights)->manifest();
    table.Add({"network", DescribeNetwork(manifest.network())});
    table.Add({"numerics", DescribeNumerics(manifest.network().numerics())});
    table.Add({"origin", OneLine(manifest.origin())});
    table.Add({"pictures", DescribePreprocessing(manifest.preprocessing())});
    table.Add({"labels", manifest.labels().empty() ? "none" : FormatCount(manifest.labels_size())});
    for (const auto& [name, value] : (*facts.weights)->facts()) {
      if (name == "format" || name == "sha256") continue;
      int64_t number = 0;
      table.Add(
          {OneLine(name), absl::SimpleAtoi(value, &number) ? FormatCount(number) : OneLine(value)});
    }
    table.Add({"digest", OneLine(manifest.digest())});
  } else {
    table.Add({"network", OneLine(facts.reason)});
    table.Add({"tensors", FormatCount(static_cast<int64_t>(tensors.size()))});
    table.Add({"parameters", FormatCount(Parameters(tensors))});
  }
  table.Add({"sha256", facts.sha256});
  table.Add({"checksum", ChecksumText(facts)});
  std::string text = table.Text();
  if (!facts.file.notes.empty()) {
    Table notes({"NOTE", "VALUE"});
    for (const auto& [name, value] : facts.file.notes) notes.Add({OneLine(name), OneLine(value)});
    absl::StrAppend(&text, "\n", notes.Text());
  }
  return absl::StrCat(text, "\n", TensorsText(tensors));
}

nlohmann::json FileJson(const FileFacts& facts, const std::vector<TensorFacts>& tensors) {
  nlohmann::json notes = nlohmann::json::object();
  for (const auto& [name, value] : facts.file.notes) notes[name] = value;
  nlohmann::json json = {
      {"kind", "weights"},
      {"format", WeightFormatName(facts.file.format)},
      {"bytes", facts.bytes},
      {"sha256", facts.sha256},
      {"checksum",
       facts.file.has_checksum ? (facts.checksums.ok() ? "verified" : "wrong") : "none"},
      {"pvt_v2", facts.weights.ok()},
      {"parameters", Parameters(tensors)},
      {"notes", std::move(notes)},
      {"tensors", TensorsJson(tensors)}};
  if (!facts.weights.ok()) {
    json["reason"] = facts.reason;
    return json;
  }
  for (const auto& [name, value] : (*facts.weights)->facts()) json["facts"][name] = value;
  const v1::Manifest& manifest = (*facts.weights)->manifest();
  json["parameters"] = ParametersOf(**facts.weights);
  json["origin"] = manifest.origin();
  json["digest"] = manifest.digest();
  json["manifest"] = nlohmann::json::parse(ToJson(manifest), nullptr, false);
  return json;
}

int InspectFile(Environment& environment, const Options& options,
                const std::filesystem::path& path) {
  const absl::StatusOr<FileFacts> facts = [&] {
    const WaitNotice notice(*environment.err, environment.err_is_terminal,
                            absl::StrCat("reading ", OneLine(options.path)));
    return ReadFacts(path, options.weights);
  }();
  if (!facts.ok()) return Fail(environment, AboutPath(facts.status(), options.path));
  const std::vector<TensorFacts> tensors = Facts(facts->file);
  if (options.json) {
    *environment.out << Dump(FileJson(*facts, tensors));
  } else {
    *environment.out << FileText(OneLine(options.path), *facts, tensors);
  }
  // Another network's file is no failure, a damaged one is, and so is one without what was asked.
  const absl::Status& network = facts->weights.status();
  if (absl::IsDataLoss(network) || (options.weights.ema && !network.ok())) {
    return Fail(environment, network);
  }
  if (!facts->checksums.ok()) return Fail(environment, Annotate(facts->checksums, options.path));
  return kDone;
}

struct FileState {
  std::string name;
  int64_t bytes = 0;
  absl::Status state;
};

std::string ManifestText(const std::string& path, const v1::Manifest& manifest) {
  const v1::TrainingRecord& training = manifest.training();
  Table facts;
  facts.Add({"checkpoint", path});
  facts.Add({"network", DescribeNetwork(manifest.network())});
  facts.Add({"numerics", DescribeNumerics(manifest.network().numerics())});
  facts.Add({"origin", OneLine(manifest.origin())});
  facts.Add({"pictures", DescribePreprocessing(manifest.preprocessing())});
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
      const absl::StatusOr<WeightFile> weights = OpenWeightFile(folder / file.name());
      if (weights.ok()) tensors = Facts(*weights);
      state = weights.status();
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

// Which sets of kernels the processor runs, and which a network of either dtype computes with.
struct KernelFacts {
  std::vector<kernels::CpuKernelSet> sets;
  std::string forced;
  std::vector<std::pair<std::string, absl::StatusOr<const kernels::CpuKernels*>>> chosen;
};

KernelFacts ReadKernels() {
  const kernels::CpuFeatures features = kernels::DetectCpu();
  KernelFacts facts = {kernels::ListCpuKernels(features), kernels::ForcedCpuKernels(), {}};
  for (const std::string dtype : {"fp32", "bf16"}) {
    facts.chosen.emplace_back(dtype, kernels::ChooseCpuKernels(features, dtype, facts.forced));
  }
  return facts;
}

void AddKernels(const KernelFacts& facts, Table& table) {
  std::vector<std::string> here, missing;
  for (const kernels::CpuKernelSet& set : facts.sets) {
    if (set.runs) {
      here.push_back(set.name);
    } else {
      missing.push_back(absl::StrCat(set.name, " needs ", set.needs));
    }
  }
  table.Add({"kernels", absl::StrJoin(here, " ")});
  if (!missing.empty()) table.Add({"kernels not here", absl::StrJoin(missing, "; ")});
  for (const auto& [dtype, chosen] : facts.chosen) {
    std::string text;
    if (chosen.ok()) {
      const bool widened = dtype == "bf16" && (*chosen)->activation_bytes == 4;
      text = absl::StrCat((*chosen)->name, widened ? " (bf16 computed in f32)" : "",
                          facts.forced.empty() ? "" : ", forced by PYRAMID_KERNELS");
    } else {
      text = absl::StrCat("none: ", OneLine(chosen.status().message()));
    }
    table.Add({absl::StrCat(dtype, " computed by"), text});
  }
}

nlohmann::json KernelsJson(const KernelFacts& facts) {
  nlohmann::json json = {{"forced", nullptr}, {"sets", nlohmann::json::array()}};
  if (!facts.forced.empty()) json["forced"] = facts.forced;
  for (const kernels::CpuKernelSet& set : facts.sets) {
    json["sets"].push_back(
        {{"name", set.name}, {"dtypes", set.dtypes}, {"needs", set.needs}, {"runs", set.runs}});
  }
  for (const auto& [dtype, chosen] : facts.chosen) {
    if (chosen.ok()) {
      json["chosen"][dtype] = (*chosen)->name;
    } else {
      json["chosen"][dtype] = nullptr;
      json["refused"][dtype] = std::string(chosen.status().message());
    }
  }
  return json;
}

int InspectMachine(Environment& environment, const Options& options) {
  const Machine machine = ReadMachine();
  const KernelFacts kernels = ReadKernels();
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
                              {"kernels", KernelsJson(kernels)},
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
  AddKernels(kernels, facts);
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
                UsageError("name a checkpoint's folder or a file of weights, or say --machine"));
  }
  if (options.machine) return InspectMachine(environment, options);
  const std::filesystem::path path = environment.folder / options.path;
  std::error_code ignored;
  if (!std::filesystem::is_directory(path, ignored)) return InspectFile(environment, options, path);
  const WeightOptions& w = options.weights;
  if (w.ema || !w.origin.empty() || !w.pad_style.empty() || !w.gelu.empty() || w.eps_outer > 0) {
    return Fail(environment, UsageError("a checkpoint's manifest says whose weights they are; "
                                        "--origin and the like are for files"));
  }
  return InspectFolder(environment, options, path);
}

}  // namespace

void AddInspectCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand(
      "inspect", "Show and verify a checkpoint or a weight file; or show this machine");
  command
      ->add_option("path", options->path,
                   "A checkpoint's folder, or a file of weights: safetensors, PyTorch's .pth, "
                   "MindSpore's .ckpt")
      ->type_name("FOLDER|FILE");
  command->add_flag("--machine", options->machine,
                    "Cores, instruction sets, kernels, memory, devices, versions");
  AddWeightFlags(*command, options->weights);
  command->add_flag("--json", options->json, "Print one JSON object");
  command->callback([line, options] {
    line.action = [line, options] { return Inspect(line.environment, *options); };
  });
}

}  // namespace pyramid
