#include "client/about_weights.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "proto/base/status.h"

namespace pyramid {

void AddWeightFlags(CLI::App& command, WeightOptions& options, CLI::Option* needs) {
  std::vector<CLI::Option*> flags = {
      command
          .add_option("--origin", options.origin,
                      "Whose weights they are: official, timm, transformers, mindcv or pyramid. "
                      "Decides numerics "
                      "and pixels; default: by the names in the file")
          ->type_name("ORIGIN")
          ->check(CLI::IsMember({"official", "timm", "transformers", "mindcv", "pyramid"})),
      command.add_flag("--ema", options.ema, "Take the averaged weights"),
      command
          .add_option("--head", options.head,
                      "new: leave the file's classifier out, for --num-classes others")
          ->type_name("new")
          ->check(CLI::IsMember({"new"})),
      command.add_option("--num-classes", options.num_classes, "Of the new head")
          ->type_name("N")
          ->check(CLI::Range(1, 1'000'000)),
      command.add_option("--pad-style", options.pad_style, "Not the origin's: torch or same")
          ->type_name("STYLE")
          ->check(CLI::IsMember({"torch", "same"})),
      command.add_option("--gelu", options.gelu, "Not the origin's: erf or tanh")
          ->type_name("KIND")
          ->check(CLI::IsMember({"erf", "tanh"})),
      command
          .add_option("--eps-outer", options.eps_outer,
                      "Not the origin's: epsilon of the norms in patch embedding and reduction")
          ->type_name("EPS")
          ->check(CLI::Range(1e-12, 0.1))};
  for (CLI::Option* flag : flags) {
    flag->group("Whose weights");
    if (needs != nullptr) flag->needs(needs);
  }
}

std::string DescribeNetwork(const v1::NetworkConfig& network) {
  return absl::StrCat(network.variant(), ", ", network.num_classes(), " classes, ",
                      network.in_channels(), " channels");
}

std::string FactOf(const Weights& weights, absl::string_view name) {
  for (const auto& [key, value] : weights.facts()) {
    if (absl::string_view(key) == name) return value;
  }
  return "";
}

absl::Status VerifyChecksums(const WeightFile& file) {
  for (const StoredTensor& tensor : file.tensors) {
    if (tensor.checksum == nullptr || tensor.checksum->verified) continue;
    ASSIGN_OR_RETURN(const uint32_t crc32, Crc32OfExtents(*file.source, tensor.storage));
    if (crc32 != tensor.checksum->crc32) {
      return absl::DataLossError(
          absl::StrFormat("the values of %s are damaged: their CRC-32 is %08x, the file says %08x",
                          PrintableText(tensor.name), crc32, tensor.checksum->crc32));
    }
    tensor.checksum->verified = true;
  }
  return absl::OkStatus();
}

}  // namespace pyramid
