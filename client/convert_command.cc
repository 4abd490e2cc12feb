#include <google/protobuf/util/message_differencer.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/about_weights.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/format.h"
#include "client/progress.h"
#include "model/checkpoint.h"
#include "model/recipe.h"
#include "model/weights.h"
#include "proto/base/file.h"
#include "proto/base/hash.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;

constexpr int kSelfTestPictures = 16;

struct Options {
  std::string in;
  std::string out;
  std::string naming;
  WeightOptions weights;
  bool force = false;
  bool json = false;
};

struct Written {
  std::string format;  // "checkpoint", else as WeightFormatName
  Naming naming = Naming::kOfficial;
  v1::Manifest manifest;
  int64_t tensors = 0;
  int64_t parameters = 0;
  int64_t bytes = 0;
  std::string sha256;      // of a file
  bool self_test = false;  // of a checkpoint's folder
};

// By the name's end; nothing: a checkpoint's folder.
std::optional<OutputFormat> FormatOf(const std::string& out) {
  if (absl::EndsWith(out, ".safetensors")) return OutputFormat::kSafetensors;
  if (absl::EndsWith(out, ".pth") || absl::EndsWith(out, ".pt") || absl::EndsWith(out, ".pth.tar"))
    return OutputFormat::kTorchZip;
  if (absl::EndsWith(out, ".ckpt")) return OutputFormat::kMindSpore;
  return std::nullopt;
}

WeightFormat FormatRead(OutputFormat format) {
  switch (format) {
    case OutputFormat::kSafetensors:
      return WeightFormat::kSafetensors;
    case OutputFormat::kTorchZip:
      return WeightFormat::kTorchZip;
    case OutputFormat::kMindSpore:
      break;
  }
  return WeightFormat::kMindSpore;
}

// What was asked for, else MindCV's names in a .ckpt and the source's elsewhere.
absl::StatusOr<Naming> NamingFor(const Options& options, std::optional<OutputFormat> format,
                                 const Weights& weights) {
  if (!options.naming.empty()) return ParseNaming(options.naming);
  if (format == OutputFormat::kMindSpore) return Naming::kMindCv;
  ASSIGN_OR_RETURN(const Naming own, ParseNaming(FactOf(weights, "naming")));
  return !format || own == Naming::kTransformers ? Naming::kOfficial : own;
}

// Who loads the file elsewhere computes as that code base does. Empty: as these weights want it.
std::string NumericsWarning(const std::string& out, const v1::Numerics& own, Naming naming) {
  const v1::Numerics home = NumericsOf(NamingName(naming));
  if (google::protobuf::util::MessageDifferencer::Equals(own, home)) return "";
  const char* who = naming == Naming::kMindCv ? "MindCV"
                    : naming == Naming::kTimm ? "timm"
                                              : "the official code";
  return absl::StrCat(out, " has the names of ", who, ", which computes with ",
                      DescribeNumerics(home), "; these weights were trained with ",
                      DescribeNumerics(own), ", so their answers there differ from the ones here");
}

absl::Status CheckTarget(const Options& options, const fs::path& out, bool as_folder) {
  std::error_code error;
  const fs::file_status there = fs::status(out, error);
  if (!fs::exists(there)) return absl::OkStatus();
  if (!options.force) {
    return absl::AlreadyExistsError(
        absl::StrCat(options.out, " exists; choose another name or say --force"));
  }
  if (as_folder ? !fs::exists(out / std::string(kManifestFile), error)
                : !fs::is_regular_file(there)) {
    return absl::AlreadyExistsError(absl::StrCat(options.out, " exists and isn't ",
                                                 as_folder ? "a checkpoint's folder" : "a file",
                                                 "; it is left alone"));
  }
  return absl::OkStatus();
}

// Stored answers that a server checks after loading. Empty: this build can't make them.
absl::StatusOr<std::string> SelfTest(Environment& environment, const Options& options) {
  if (!environment.load_classifier || !environment.make_self_test) {
    *environment.err << "warning: without a self-test: this pyramid was built without LibTorch\n";
    return std::string();
  }
  ASSIGN_OR_RETURN(
      const std::unique_ptr<Classifier> classifier,
      environment.load_classifier(environment.folder / options.in, {.weights = options.weights}));
  return environment.make_self_test(*classifier, kSelfTestPictures);
}

// A checkpoint that is there steps aside until the new one is whole.
absl::StatusOr<v1::Manifest> WriteFolder(const Weights& weights, const fs::path& out,
                                         const std::string& self_test) {
  const fs::path aside = out.string() + ".replaced";
  std::error_code error;
  const bool replaces = fs::exists(out, error);
  if (replaces) {
    fs::remove_all(aside, error);
    RETURN_IF_ERROR(RenameSynced(out, aside));
  }
  absl::StatusOr<v1::Manifest> written = WriteWeightsAsCheckpoint(weights, out, self_test);
  if (replaces && !written.ok()) RenameSynced(aside, out).IgnoreError();
  if (replaces && written.ok()) fs::remove_all(aside, error);
  return written;
}

absl::StatusOr<Written> Write(Environment& environment, const Options& options,
                              const Weights& weights, std::optional<OutputFormat> format,
                              Naming naming) {
  const WaitNotice notice(*environment.err, environment.err_is_terminal,
                          absl::StrCat("writing ", OneLine(options.out)));
  const fs::path out = environment.folder / options.out;
  Written written{.naming = naming, .manifest = weights.manifest()};
  for (const WeightParameter& parameter : weights.parameters()) {
    int64_t elements = 1;
    for (const int64_t side : parameter.shape) elements *= side;
    written.parameters += elements;
    ++written.tensors;
  }
  if (!format) {
    ASSIGN_OR_RETURN(const std::string self_test, SelfTest(environment, options));
    ASSIGN_OR_RETURN(written.manifest, WriteFolder(weights, out, self_test));
    written.format = "checkpoint";
    written.self_test = !self_test.empty();
    for (const v1::FileEntry& file : written.manifest.files()) written.bytes += file.bytes();
    return written;
  }
  RETURN_IF_ERROR(WriteWeights(weights, out, *format, naming));
  written.format = WeightFormatName(FormatRead(*format));
  std::error_code error;
  written.bytes = static_cast<int64_t>(fs::file_size(out, error));
  ASSIGN_OR_RETURN(written.sha256, Sha256HexOfFile(out));
  return written;
}

std::string Text(const Options& options, const Weights& source, const Written& written) {
  Table table;
  table.Add({"from", absl::StrCat(OneLine(options.in), " (", FactOf(source, "format"), ", ",
                                  FactOf(source, "naming"), " naming)")});
  table.Add({"to", absl::StrCat(OneLine(options.out), " (", written.format, ", ",
                                NamingName(written.naming), " naming)")});
  table.Add({"network", DescribeNetwork(written.manifest.network())});
  table.Add({"origin", OneLine(written.manifest.origin())});
  table.Add({"numerics", DescribeNumerics(written.manifest.network().numerics())});
  table.Add({"pictures", DescribePreprocessing(written.manifest.preprocessing())});
  table.Add({"tensors", FormatCount(written.tensors)});
  table.Add({"parameters", FormatCount(written.parameters)});
  table.Add({"size", FormatBytes(written.bytes)});
  if (!written.sha256.empty()) {
    table.Add({"sha256", written.sha256});
  } else {
    table.Add({"digest", OneLine(written.manifest.digest())});
    table.Add(
        {"self-test", written.self_test ? absl::StrCat(kSelfTestPictures, " pictures") : "none"});
  }
  return table.Text();
}

std::string Json(const Options& options, const Weights& source, const Written& written,
                 const std::string& warning) {
  nlohmann::json json = {
      {"in", options.in},
      {"out", options.out},
      {"from", {{"format", FactOf(source, "format")}, {"naming", FactOf(source, "naming")}}},
      {"format", written.format},
      {"naming", NamingName(written.naming)},
      {"origin", written.manifest.origin()},
      {"network", nlohmann::json::parse(ToJson(written.manifest.network()), nullptr, false)},
      {"tensors", written.tensors},
      {"parameters", written.parameters},
      {"bytes", written.bytes}};
  if (!written.sha256.empty()) {
    json["sha256"] = written.sha256;
  } else {
    json["digest"] = written.manifest.digest();
    json["self_test"] = written.self_test;
  }
  if (!warning.empty()) json["warning"] = warning;
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

int Convert(Environment& environment, const Options& options) {
  const std::optional<OutputFormat> format = FormatOf(options.out);
  if (!format && !options.naming.empty() && options.naming != "official") {
    return Fail(environment,
                UsageError(absl::StrCat(options.out,
                                        " becomes a checkpoint's folder, which has the "
                                        "official names; for --naming let OUT end in "
                                        ".safetensors, .pth, .pt or .ckpt")));
  }
  const absl::Status target = CheckTarget(options, environment.folder / options.out, !format);
  if (!target.ok()) return Fail(environment, target);

  const absl::StatusOr<std::unique_ptr<Weights>> weights = [&] {
    const WaitNotice notice(*environment.err, environment.err_is_terminal,
                            absl::StrCat("reading ", OneLine(options.in)));
    return OpenWeights(environment.folder / options.in, options.weights);
  }();
  if (!weights.ok()) return Fail(environment, weights.status());
  const absl::StatusOr<Naming> naming = NamingFor(options, format, **weights);
  if (!naming.ok()) return Fail(environment, naming.status());

  std::string warning;
  if (format) {
    warning = NumericsWarning(options.out, (*weights)->manifest().network().numerics(), *naming);
  }
  if (!warning.empty()) *environment.err << absl::StrCat("warning: ", OneLine(warning), "\n");
  const absl::StatusOr<Written> written = Write(environment, options, **weights, format, *naming);
  if (!written.ok()) return Fail(environment, written.status());
  *environment.out << (options.json ? Json(options, **weights, *written, warning)
                                    : Text(options, **weights, *written));
  return kDone;
}

}  // namespace

void AddConvertCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand(
      "convert", "Write weights in another format, under another code base's names");
  command
      ->add_option("in", options->in,
                   "A checkpoint's folder, or a file of weights: safetensors, PyTorch's .pth, "
                   "MindSpore's .ckpt")
      ->type_name("IN")
      ->required();
  command
      ->add_option("out", options->out,
                   "Its end decides: .safetensors, .pth or .pt (PyTorch), .ckpt (MindSpore); "
                   "anything else becomes a checkpoint's folder")
      ->type_name("OUT")
      ->required();
  command
      ->add_option(
          "--naming", options->naming,
          "Of the parameters in OUT: official, timm or mindcv; default: mindcv in a .ckpt, "
          "else the source's")
      ->type_name("NAMING")
      ->check(CLI::IsMember({"official", "timm", "mindcv"}));
  AddWeightFlags(*command, options->weights);
  command->add_flag("--force", options->force, "Replace OUT");
  command->add_flag("--json", options->json, "Print one JSON object");
  command->callback([line, options] {
    line.action = [line, options] { return Convert(line.environment, *options); };
  });
}

}  // namespace pyramid
