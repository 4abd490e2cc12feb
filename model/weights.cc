#include "model/weights.h"

#include <google/protobuf/util/json_util.h>
#include <google/protobuf/util/message_differencer.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "model/checkpoint.h"
#include "model/imagenet_labels.h"
#include "model/recipe.h"
#include "model/variants.h"
#include "model/weight_notes.h"
#include "proto/base/hash.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;

constexpr absl::string_view kOrigins[] = {"official", "timm", "transformers", "mindcv", "pyramid"};
constexpr absl::string_view kFirstConv = "patch_embed1.proj.weight";
constexpr absl::string_view kHeadWeight = "head.weight";

// Where people keep the weights of a network, first choice first: a bare state dict, timm's, the
// official code's; and the averaged ones (timm/models/_helpers.py).
constexpr absl::string_view kWrappers[] = {"", "state_dict", "model"};
constexpr absl::string_view kAveragedWrappers[] = {"state_dict_ema", "model_ema", "ema"};
constexpr absl::string_view kMindSporeAveraged = "ema.";

bool IsHead(absl::string_view official) { return absl::StartsWith(official, "head."); }

std::string ShapeText(std::span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape.begin(), shape.end(), ", "), "]");
}

// ---- Which tensors ----

struct Entry {
  size_t index = 0;  // in the file
  std::string name;  // without what wrappers put before it
};

// The tensors of a file that are meant to be the network's.
struct Selection {
  Naming naming = Naming::kOfficial;
  std::string wrapper;  // "" none
  std::vector<Entry> entries;
  std::vector<std::string> set_aside;  // "180 optimizer tensors"
};

// DistributedDataParallel's and torch.compile's, in any order.
absl::string_view WithoutPrefixes(absl::string_view name) {
  while (absl::ConsumePrefix(&name, "module.") || absl::ConsumePrefix(&name, "_orig_mod.")) {
  }
  return name;
}

// What MindSpore's training cells keep beside the network's parameters: moments and accumulated
// gradients under the parameters' names, learning rates, and scalars (counters, powers of beta,
// loss scales), which no parameter is. Sources: mindspore nn/optim, nn/wrap/loss_scale.py, boost
// grad_accumulation.py; mindcv optim/adamw.py, utils/train_step.py.
bool IsMindSporeTraining(absl::string_view name, const StoredTensor& tensor) {
  static constexpr absl::string_view kPrefixes[] = {
      "adam_m.",  "adam_v.",   "moment.",   "moments.", "moment1.",
      "moment2.", "moment_m.", "moment_v.", "accum.",   "grad_accumulation_."};
  for (const absl::string_view prefix : kPrefixes) {
    if (absl::StartsWith(name, prefix)) return true;
  }
  return name == "learning_rate" || tensor.shape.empty() ||
         (tensor.shape.size() == 1 && tensor.shape[0] <= 1);
}

std::string Counted(size_t count, absl::string_view what) {
  return absl::StrCat(count, " ", what, count == 1 ? "" : "s");
}

// Takes what training kept beside the parameters out of a MindSpore file's entries, and of the
// averaged and the plain parameters those that weren't asked for.
void SetAsideMindSpore(const WeightFile& file, bool averaged, Selection& selection) {
  std::vector<Entry> kept;
  size_t training = 0, others = 0;
  for (Entry& entry : selection.entries) {
    absl::string_view name = entry.name;
    const bool is_averaged = absl::ConsumePrefix(&name, kMindSporeAveraged);
    const bool is_parameter = ToOfficial(name, selection.naming).has_value();
    if (!is_parameter && IsMindSporeTraining(name, file.tensors[entry.index])) {
      ++training;
    } else if (is_averaged != averaged) {
      ++others;
    } else {
      kept.push_back({entry.index, std::string(name)});
    }
  }
  selection.entries = std::move(kept);
  if (training > 0) selection.set_aside.push_back(Counted(training, "optimizer tensor"));
  if (others > 0) {
    selection.set_aside.push_back(Counted(others, averaged ? "plain tensor" : "averaged tensor"));
  }
}

// The naming asked for, or detected; nothing if the entries aren't a PVT v2's.
std::optional<Naming> NamingOf(const std::vector<Entry>& entries, std::optional<Naming> asked) {
  std::vector<std::string> names;
  for (const Entry& entry : entries) names.push_back(entry.name);
  if (!asked) return DetectNaming(names);
  const bool any = std::any_of(names.begin(), names.end(), [&](const std::string& name) {
    return ToOfficial(name, *asked).has_value();
  });
  return any ? asked : std::nullopt;
}

std::vector<Entry> EntriesOf(const WeightFile& file, absl::string_view group) {
  std::vector<Entry> entries;
  for (size_t i = 0; i < file.tensors.size(); ++i) {
    if (file.tensors[i].group != group) continue;
    entries.push_back({i, std::string(WithoutPrefixes(file.tensors[i].name))});
  }
  return entries;
}

// MindSpore's averaged weights lie among the plain ones: "ema.<parameter>".
std::vector<Entry> AveragedAmong(const std::vector<Entry>& entries) {
  std::vector<Entry> averaged;
  for (const Entry& entry : entries) {
    absl::string_view name = entry.name;
    if (absl::ConsumePrefix(&name, kMindSporeAveraged)) {
      averaged.push_back({entry.index, std::string(name)});
    }
  }
  return averaged;
}

absl::Status NotPvt(const WeightFile& file, std::optional<Naming> asked) {
  if (file.tensors.empty()) {
    return absl::InvalidArgumentError("holds no tensors; is it a file of weights?");
  }
  std::vector<std::string> shown;
  for (const StoredTensor& tensor : file.tensors) {
    if (shown.size() == 4) break;
    shown.push_back(tensor.group.empty() ? tensor.name
                                         : absl::StrCat(tensor.group, ": ", tensor.name));
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "not a PVT v2: ", Counted(file.tensors.size(), "tensor"), " (", absl::StrJoin(shown, ", "),
      shown.size() < file.tensors.size() ? ", …" : "", "), none with a name of ",
      asked ? absl::StrCat("the naming ", NamingName(*asked), "; leave naming empty to detect it")
            : "the official, timm's, MindCV's or transformers' first patch embedding "
              "(patch_embed1.proj.weight, patch_embed.proj.weight, "
              "patch_embed_list.0.proj.weight, pvt_v2.encoder.layers.0.patch_embedding."
              "proj.weight)"));
}

absl::StatusOr<Selection> Select(const WeightFile& file, std::optional<Naming> asked, bool ema) {
  Selection selection;
  bool found = false;
  const auto take = [&](absl::string_view wrapper, std::vector<Entry> entries, bool among) {
    const std::optional<Naming> naming = NamingOf(among ? AveragedAmong(entries) : entries, asked);
    if (!naming) return false;
    selection = {.naming = *naming, .wrapper = std::string(wrapper)};
    selection.entries = std::move(entries);
    return true;
  };
  bool others = false;  // the file has weights of the other kind
  if (ema) {
    for (const absl::string_view wrapper : kAveragedWrappers) {
      found = found || take(wrapper, EntriesOf(file, wrapper), false);
    }
    for (const absl::string_view wrapper : kWrappers) {
      found = found || take(wrapper, EntriesOf(file, wrapper), true);
      others = others || NamingOf(EntriesOf(file, wrapper), asked).has_value();
    }
  } else {
    for (const absl::string_view wrapper : kWrappers) {
      found = found || take(wrapper, EntriesOf(file, wrapper), false);
      others = others || NamingOf(AveragedAmong(EntriesOf(file, wrapper)), asked).has_value();
    }
    for (const absl::string_view wrapper : kAveragedWrappers) {
      others = others || NamingOf(EntriesOf(file, wrapper), asked).has_value();
    }
  }
  if (!found && others) {
    return absl::InvalidArgumentError(
        ema ? "has no averaged weights (state_dict_ema, model_ema, or ema.<parameter>); leave out "
              "ema to take the plain ones"
            : "has averaged weights only; ask for them with ema");
  }
  if (!found) return NotPvt(file, asked);

  const size_t elsewhere = file.tensors.size() - selection.entries.size();
  if (selection.naming == Naming::kMindCv) SetAsideMindSpore(file, ema, selection);
  if (elsewhere > 0) {
    selection.set_aside.push_back(Counted(elsewhere, "tensor") + " outside the wrapper");
  }
  return selection;
}

// ---- Which network ----

// A parameter's tensors in the file, -1 where there is none; two where keys and values lie apart.
struct Source {
  std::array<int64_t, 2> tensors = {-1, -1};
  int parts = 1;
};

// Official name → source, and what has no place.
struct Places {
  std::map<std::string, Source> sources;
  std::vector<std::string> unused;
  std::vector<std::string> twice;
};

Places PlacesOf(const Selection& selection) {
  Places places;
  for (const Entry& entry : selection.entries) {
    const std::optional<OfficialPlace> place = ToOfficial(entry.name, selection.naming);
    if (!place) {
      places.unused.push_back(entry.name);
      continue;
    }
    Source& source = places.sources[place->name];
    source.parts = place->parts;
    int64_t& tensor = source.tensors[static_cast<size_t>(place->part)];
    if (tensor >= 0) places.twice.push_back(entry.name);
    tensor = static_cast<int64_t>(entry.index);
  }
  return places;
}

// The shape of a parameter as the file has it; nothing if a part is missing or the parts differ.
std::optional<std::vector<int64_t>> ShapeOf(const WeightFile& file, const Source& source) {
  std::vector<int64_t> shape;
  for (int part = 0; part < source.parts; ++part) {
    const int64_t index = source.tensors[static_cast<size_t>(part)];
    if (index < 0) return std::nullopt;
    const std::vector<int64_t>& own = file.tensors[static_cast<size_t>(index)].shape;
    if (part == 0) {
      shape = own;
      if (source.parts == 2 && !shape.empty()) shape[0] *= 2;
    } else if (own != file.tensors[static_cast<size_t>(source.tensors[0])].shape) {
      return std::nullopt;
    }
  }
  return shape;
}

// One dimension of a parameter in the file; 0: the parameter isn't there, or it can't be.
int DimensionOf(const WeightFile& file, const Places& places, absl::string_view official,
                size_t rank, size_t axis) {
  const auto found = places.sources.find(std::string(official));
  if (found == places.sources.end()) return 0;
  const auto shape = ShapeOf(file, found->second);
  if (!shape || shape->size() != rank || (*shape)[axis] > std::numeric_limits<int>::max()) return 0;
  return static_cast<int>((*shape)[axis]);
}

// What a file that is no variant looks like, for the message.
std::string DescribeUnknown(const WeightFile& file, const Places& places) {
  std::vector<int> dims;
  std::array<int, 4> blocks = {};
  for (size_t stage = 0; stage < 4; ++stage) {
    dims.push_back(
        DimensionOf(file, places, absl::StrCat("patch_embed", stage + 1, ".proj.weight"), 4, 0));
    const auto has = [&](int block) {
      const std::string prefix = absl::StrCat("block", stage + 1, ".", block, ".");
      const auto at = places.sources.lower_bound(prefix);
      return at != places.sources.end() && absl::StartsWith(at->first, prefix);
    };
    while (has(blocks[stage])) ++blocks[stage];
  }
  return absl::StrCat("stages of ", absl::StrJoin(dims, ", "), " channels with ",
                      absl::StrJoin(blocks, ", "), " blocks");
}

// The variant whose parameters the file has the most of; null if that is less than half. Classes
// and input channels don't count.
const Variant* InferVariant(const WeightFile& file, const Places& places) {
  const Variant* best = nullptr;
  int64_t best_score = std::numeric_limits<int64_t>::min();
  for (const Variant& variant : Variants()) {
    int64_t matches = 0;
    const std::vector<ParameterShape> table = ParametersOf(variant, 3, 1000);
    for (const ParameterShape& parameter : table) {
      const auto found = places.sources.find(parameter.name);
      if (found == places.sources.end()) continue;
      const bool free = IsHead(parameter.name) || parameter.name == kFirstConv;
      if (free || ShapeOf(file, found->second) == parameter.shape) ++matches;
    }
    const auto expected = static_cast<int64_t>(table.size());
    if (2 * matches < expected) continue;
    const int64_t score = 2 * matches - expected - static_cast<int64_t>(places.sources.size());
    if (score > best_score) {
      best = &variant;
      best_score = score;
    }
  }
  return best;
}

std::string KnownVariants() {
  return absl::StrJoin(Variants(), ", ", [](std::string* out, const Variant& variant) {
    absl::StrAppend(out, variant.name);
  });
}

// "3 missing (a, b, c)"; at most eight names, and how many more there are.
void AppendList(absl::string_view what, const std::vector<std::string>& names,
                std::vector<std::string>& parts) {
  if (names.empty()) return;
  constexpr size_t kShown = 8;
  const size_t shown = std::min(names.size(), kShown);
  std::string text = absl::StrCat(names.size(), " ", what, " (",
                                  absl::StrJoin(names.begin(), names.begin() + shown, ", "));
  if (names.size() > shown) absl::StrAppend(&text, " and ", names.size() - shown, " more");
  parts.push_back(text + ")");
}

// Every parameter of `table` has a source of its shape, and every source is one of them.
absl::Status CheckStrictly(const WeightFile& file, const Selection& selection, const Places& places,
                           std::span<const WeightParameter> table, absl::string_view variant) {
  const auto shown = [&](const std::string& official) {
    const std::string own = FromOfficial(official, selection.naming);
    return own.empty() ? official : own;
  };
  std::vector<std::string> missing, misshapen, unused = places.unused;
  std::set<absl::string_view> known;
  bool head = false;  // is what's wrong
  for (const WeightParameter& parameter : table) {
    known.insert(parameter.name);
    if (parameter.fresh) continue;
    const auto found = places.sources.find(parameter.name);
    if (found == places.sources.end()) {
      missing.push_back(shown(parameter.name));
      head = head || IsHead(parameter.name);
      continue;
    }
    const auto shape = ShapeOf(file, found->second);
    if (!shape) {
      missing.push_back(absl::StrCat("a part of ", shown(parameter.name)));
    } else if (*shape != parameter.shape) {
      misshapen.push_back(absl::StrCat(shown(parameter.name), " is ", ShapeText(*shape), ", not ",
                                       ShapeText(parameter.shape)));
      head = head || IsHead(parameter.name);
    }
  }
  for (const auto& [name, source] : places.sources) {
    if (known.count(name) == 0) unused.push_back(shown(name));
  }
  std::vector<std::string> parts;
  AppendList("missing", missing, parts);
  AppendList("unused", unused, parts);
  AppendList("misshapen", misshapen, parts);
  AppendList("twice", places.twice, parts);
  if (parts.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "these tensors don't fit the network: ", absl::StrJoin(parts, "; "), ". It was taken for ",
      variant, " in ", NamingName(selection.naming), " naming; ",
      head ? "with head new and num_classes the classifier is left out and starts anew"
           : "the file must hold exactly that network's parameters"));
}

// ---- The manifest ----

template <typename List>
bool Contains(const List& list, absl::string_view value) {
  return std::find(std::begin(list), std::end(list), value) != std::end(list);
}

absl::Status CheckOptions(const WeightOptions& options) {
  const auto bad = [](absl::string_view name, const auto& value, absl::string_view use) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, "; use ", use));
  };
  const auto quoted = [](const std::string& text) { return absl::StrCat("\"", text, "\""); };
  if (!options.origin.empty() && !Contains(kOrigins, options.origin))
    return bad("origin", quoted(options.origin), "official, timm, transformers, mindcv or pyramid");
  if (!options.pad_style.empty() && options.pad_style != "torch" && options.pad_style != "same")
    return bad("pad_style", quoted(options.pad_style), "torch or same");
  if (!options.gelu.empty() && options.gelu != "erf" && options.gelu != "tanh")
    return bad("gelu", quoted(options.gelu), "erf or tanh");
  if (!(options.eps_outer >= 0 && options.eps_outer < 1))
    return bad("eps_outer", options.eps_outer, "a number in (0, 1), or 0 for the origin's");
  if (!options.head.empty() && options.head != "new")
    return bad("head", quoted(options.head), "new, or leave it empty for the file's");
  if (options.head == "new" && options.num_classes < 1)
    return bad("num_classes", options.num_classes, "1 or more with head new");
  if (options.num_classes < 0) return bad("num_classes", options.num_classes, "0 or more");
  if (options.in_channels < 0)
    return bad("in_channels", options.in_channels, "1 or more, or 0 for the file's");
  return absl::OkStatus();
}

const char* OriginOfNaming(Naming naming) {
  switch (naming) {
    case Naming::kTimm:
      return "timm";
    case Naming::kMindCv:
      return "mindcv";
    case Naming::kTransformers:
      return "transformers";
    case Naming::kOfficial:
      break;
  }
  return "official";
}

// Grey pictures are normalised by the mean of the three, as ImageNet's grey models are.
void SetChannels(v1::Preprocessing& p, int channels) {
  if (channels != 1 && channels != 3) {
    p.Clear();
    return;
  }
  if (p.channels() == channels) return;
  for (auto* list : {p.mutable_mean(), p.mutable_std()}) {
    double sum = 0;
    for (const double value : *list) sum += value;
    const double mean = list->empty() ? 0.5 : sum / list->size();
    list->Clear();
    for (int c = 0; c < channels; ++c) list->Add(mean);
  }
  p.set_channels(channels);
}

// What an explicit origin brings, and the overrides on top.
void ApplyOptions(const WeightOptions& options, v1::Manifest& manifest) {
  if (!options.origin.empty()) {
    manifest.set_origin(options.origin);
    *manifest.mutable_network()->mutable_numerics() = NumericsOf(options.origin);
    *manifest.mutable_preprocessing() =
        OriginPreprocessing(options.origin, manifest.network().in_channels());
  }
  v1::Numerics& numerics = *manifest.mutable_network()->mutable_numerics();
  if (!options.pad_style.empty()) numerics.set_pad_style(options.pad_style);
  if (!options.gelu.empty()) numerics.set_gelu(options.gelu);
  if (options.eps_outer > 0) numerics.set_eps_outer(options.eps_outer);
  if (options.head == "new") {
    manifest.mutable_network()->set_num_classes(options.num_classes);
    manifest.clear_labels();
  }
  if (options.in_channels > 0 && options.in_channels != manifest.network().in_channels()) {
    manifest.mutable_network()->set_in_channels(options.in_channels);
    SetChannels(*manifest.mutable_preprocessing(), options.in_channels);
  }
}

// ---- Reading ----

// [outputs, from, area] to [outputs, to, area]: one channel sums all, more repeat them in turn,
// cut, scaled so that the sum over them stays (timm/models/_manipulate.py, adapt_input_conv).
void AdaptChannels(std::span<const float> in, int64_t from, int64_t to, int64_t area,
                   std::span<float> out) {
  const auto outputs = static_cast<int64_t>(out.size()) / (to * area);
  const float scale = static_cast<float>(from) / static_cast<float>(to);
  for (int64_t o = 0; o < outputs; ++o) {
    const float* source = in.data() + o * from * area;
    float* target = out.data() + o * to * area;
    for (int64_t c = 0; c < to; ++c) {
      for (int64_t i = 0; i < area; ++i) {
        float value = 0;
        if (to == 1) {
          for (int64_t k = 0; k < from; ++k) value += source[k * area + i];
        } else {
          value = source[c % from * area + i] * scale;
        }
        target[c * area + i] = value;
      }
    }
  }
}

class FileWeights : public Weights {
 public:
  FileWeights(WeightFile file, v1::Manifest manifest, std::vector<WeightParameter> parameters,
              std::vector<Source> sources, int source_channels,
              std::vector<std::pair<std::string, std::string>> facts)
      : file_(std::move(file)),
        manifest_(std::move(manifest)),
        parameters_(std::move(parameters)),
        sources_(std::move(sources)),
        source_channels_(source_channels),
        facts_(std::move(facts)) {
    for (size_t i = 0; i < parameters_.size(); ++i) by_name_[parameters_[i].name] = i;
  }

  const v1::Manifest& manifest() const override { return manifest_; }
  const std::vector<WeightParameter>& parameters() const override { return parameters_; }
  const std::vector<std::pair<std::string, std::string>>& facts() const override { return facts_; }

  absl::Status Read(const WeightParameter& parameter, std::span<float> out) const override {
    const auto found = by_name_.find(parameter.name);
    if (found == by_name_.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat("the network has no parameter ", parameter.name));
    }
    const WeightParameter& known = parameters_[found->second];
    if (known.fresh) {
      return absl::FailedPreconditionError(
          absl::StrCat(known.name, " is new: it has no values in the file"));
    }
    int64_t elements = 1;
    for (const int64_t dimension : known.shape) elements *= dimension;
    if (out.size() != static_cast<size_t>(elements)) {
      return absl::InvalidArgumentError(
          absl::StrCat(known.name, " has ", elements, " numbers, the result ", out.size()));
    }
    const int64_t channels = manifest_.network().in_channels();
    if (known.name != kFirstConv || channels == source_channels_) {
      return ReadStored(sources_[found->second], out);
    }
    std::vector<float> stored(out.size() / static_cast<size_t>(channels) *
                              static_cast<size_t>(source_channels_));
    RETURN_IF_ERROR(ReadStored(sources_[found->second], stored));
    AdaptChannels(stored, source_channels_, channels, known.shape[2] * known.shape[3], out);
    return absl::OkStatus();
  }

 private:
  absl::Status ReadStored(const Source& source, std::span<float> out) const {
    const size_t each = out.size() / static_cast<size_t>(source.parts);
    for (size_t part = 0; part < static_cast<size_t>(source.parts); ++part) {
      RETURN_IF_ERROR(ReadTensorAsFloat(file_,
                                        file_.tensors[static_cast<size_t>(source.tensors[part])],
                                        out.subspan(part * each, each)));
    }
    return absl::OkStatus();
  }

  const WeightFile file_;
  const v1::Manifest manifest_;
  const std::vector<WeightParameter> parameters_;
  const std::vector<Source> sources_;  // of each parameter
  const int source_channels_;          // of the first convolution in the file
  const std::vector<std::pair<std::string, std::string>> facts_;
  std::map<std::string, size_t, std::less<>> by_name_;
};

// ---- Opening ----

// The eight hex digits of "pvt_v2_b0-1c4f6683.ckpt" and "pvt_v2_b0-d9cd9d6a-910v2.ckpt"; empty:
// another kind of name.
std::string PublishedPrefix(const fs::path& path) {
  const std::string name = path.filename().string();
  const size_t dash = name.find('-');
  constexpr size_t kDigits = 8;
  if (dash == std::string::npos || FindVariant(name.substr(0, dash)) == nullptr) return "";
  const std::string digits = absl::AsciiStrToLower(name.substr(dash + 1, kDigits));
  const size_t end = dash + 1 + kDigits;
  if (end >= name.size() || (name[end] != '.' && name[end] != '-')) return "";
  return std::all_of(digits.begin(), digits.end(), absl::ascii_isxdigit) ? digits : "";
}

absl::Status CheckPublishedPrefix(const fs::path& path, absl::string_view sha256) {
  const std::string prefix = PublishedPrefix(path);
  if (prefix.empty() || absl::StartsWith(sha256, prefix)) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(
      "its name says that its SHA-256 begins with ", prefix, ", it is ", sha256,
      ": the file is damaged or another one. Fetch it again, or rename it if that isn't a hash"));
}

std::string DtypesOf(const WeightFile& file, const std::vector<Source>& sources) {
  std::set<std::string> dtypes;
  for (const Source& source : sources) {
    for (const int64_t index : source.tensors) {
      if (index >= 0) dtypes.insert(file.tensors[static_cast<size_t>(index)].dtype);
    }
  }
  return absl::StrJoin(dtypes, ", ");
}

// A file's manifest before the options: what it says of itself, else what its naming implies.
absl::StatusOr<v1::Manifest> ManifestOfFile(const WeightFile& file, Naming naming,
                                            v1::NetworkConfig network) {
  v1::Manifest manifest;
  manifest.set_created_by("pyramid " PYRAMID_VERSION);
  *manifest.mutable_network() = std::move(network);
  RETURN_IF_ERROR(ReadWeightNotes(file.notes, manifest));
  if (!manifest.origin().empty() && !Contains(kOrigins, manifest.origin())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "its metadata says the origin \"", manifest.origin(),
        "\", which isn't known; say origin official, timm, transformers, mindcv or pyramid"));
  }
  if (manifest.origin().empty()) manifest.set_origin(OriginOfNaming(naming));
  if (!manifest.network().has_numerics()) {
    *manifest.mutable_network()->mutable_numerics() = NumericsOf(manifest.origin());
  }
  const int channels = manifest.network().in_channels();
  if (!manifest.has_preprocessing() || manifest.preprocessing().channels() != channels) {
    *manifest.mutable_preprocessing() = OriginPreprocessing(manifest.origin(), channels);
  }
  const std::span<const std::string> imagenet = ImageNetLabels();
  if (manifest.labels_size() != manifest.network().num_classes()) {
    manifest.clear_labels();
    if (manifest.network().num_classes() == static_cast<int>(imagenet.size())) {
      manifest.mutable_labels()->Add(imagenet.begin(), imagenet.end());
    }
  }
  return manifest;
}

// Everything after the file is open. `folder`: the manifest of the checkpoint that the file is of,
// null for a file by itself.
absl::StatusOr<std::unique_ptr<Weights>> Assemble(WeightFile file, const std::string& sha256,
                                                  const v1::Manifest* folder,
                                                  const WeightOptions& options) {
  std::optional<Naming> asked;
  if (!options.naming.empty()) {
    ASSIGN_OR_RETURN(asked, ParseNaming(options.naming));
  }
  ASSIGN_OR_RETURN(Selection selection, Select(file, asked, options.ema));
  const Places places = PlacesOf(selection);

  const Variant* variant =
      folder != nullptr ? FindVariant(folder->network().variant()) : InferVariant(file, places);
  if (variant == nullptr && folder != nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "network.variant is \"", folder->network().variant(), "\"; use one of ", KnownVariants()));
  }
  if (variant == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a PVT v2 by its names, but no variant that is known: ", DescribeUnknown(file, places),
        "; known are ", KnownVariants()));
  }

  v1::Manifest manifest;
  if (folder != nullptr) {
    manifest = *folder;
  } else {
    v1::NetworkConfig network;
    network.set_variant(std::string(variant->name));
    network.set_in_channels(std::max(1, DimensionOf(file, places, kFirstConv, 4, 1)));
    network.set_num_classes(std::max(1, DimensionOf(file, places, kHeadWeight, 2, 0)));
    ASSIGN_OR_RETURN(manifest, ManifestOfFile(file, selection.naming, std::move(network)));
  }
  const v1::NetworkConfig stored = manifest.network();
  if (options.head.empty() && options.num_classes > 0 &&
      options.num_classes != stored.num_classes() && places.sources.count("head.weight") > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the classifier has ", stored.num_classes(), " classes, asked are ",
                     options.num_classes, "; with head new it is left out and starts anew"));
  }
  ApplyOptions(options, manifest);

  // The table as the file should have it; a new head has no place there.
  std::vector<WeightParameter> parameters;
  for (ParameterShape& shape : ParametersOf(*variant, stored.in_channels(), stored.num_classes())) {
    const bool fresh = options.head == "new" && IsHead(shape.name);
    parameters.push_back({std::move(shape.name), std::move(shape.shape), fresh});
  }
  RETURN_IF_ERROR(CheckStrictly(file, selection, places, parameters, variant->name));
  std::vector<Source> sources;
  int64_t numbers = 0;
  for (WeightParameter& parameter : parameters) {
    if (parameter.name == kFirstConv) parameter.shape[1] = manifest.network().in_channels();
    if (IsHead(parameter.name)) parameter.shape[0] = manifest.network().num_classes();
    const auto found = places.sources.find(parameter.name);
    sources.push_back(parameter.fresh ? Source{} : found->second);
    int64_t elements = 1;
    for (const int64_t dimension : parameter.shape) elements *= dimension;
    numbers += elements;
    if (parameter.fresh && found != places.sources.end()) {
      selection.set_aside.push_back(parameter.name);
    }
  }
  const bool as_folder =
      folder != nullptr && google::protobuf::util::MessageDifferencer::Equals(manifest, *folder);
  if (!as_folder) manifest.set_digest(ManifestDigest(manifest, sha256));

  std::vector<std::pair<std::string, std::string>> facts = {
      {"format", WeightFormatName(file.format)},
      {"naming", NamingName(selection.naming)},
      {"wrapper", selection.wrapper.empty() ? "none" : selection.wrapper},
      {"weights", options.ema ? "averaged" : "plain"},
      {"dtype", DtypesOf(file, sources)},
      {"tensors", absl::StrCat(parameters.size())},
      {"parameters", absl::StrCat(numbers)},
      {"sha256", sha256}};
  if (!selection.set_aside.empty()) {
    facts.emplace_back("set aside", absl::StrJoin(selection.set_aside, ", "));
  }
  return std::make_unique<FileWeights>(std::move(file), std::move(manifest), std::move(parameters),
                                       std::move(sources), stored.in_channels(), std::move(facts));
}

absl::StatusOr<std::unique_ptr<Weights>> OpenFolder(const fs::path& folder,
                                                    const WeightOptions& options) {
  ASSIGN_OR_RETURN(const v1::Manifest manifest, VerifyCheckpoint(folder));
  ASSIGN_OR_RETURN(WeightFile file, OpenWeightFile(folder / std::string(kWeightsFile)));
  std::string sha256;
  for (const v1::FileEntry& entry : manifest.files()) {
    if (absl::string_view(entry.name()) == kWeightsFile) sha256 = entry.sha256();
  }
  return Assemble(std::move(file), sha256, &manifest, options);
}

absl::StatusOr<std::unique_ptr<Weights>> OpenFile(const fs::path& path,
                                                  const WeightOptions& options) {
  ASSIGN_OR_RETURN(const std::string sha256, Sha256HexOfFile(path));
  RETURN_IF_ERROR(Annotate(CheckPublishedPrefix(path, sha256), path.string()));
  ASSIGN_OR_RETURN(WeightFile file, OpenWeightFile(path));
  auto weights = Assemble(std::move(file), sha256, nullptr, options);
  if (!weights.ok()) return Annotate(weights.status(), path.string());
  return weights;
}

}  // namespace

v1::Preprocessing OriginPreprocessing(absl::string_view origin, int channels) {
  v1::Preprocessing p;
  p.set_channels(3);
  p.set_exif("apply");
  v1::Resize& resize = *p.mutable_resize();
  resize.set_side(origin == "official" || origin == "transformers" ? 256 : 248);
  resize.set_kernel("bicubic");
  resize.set_antialias(origin == "mindcv" ? "none" : "pillow");
  resize.set_other_side("floor");
  p.set_crop(224);
  for (const double value : {0.485, 0.456, 0.406}) p.add_mean(value);
  for (const double value : {0.229, 0.224, 0.225}) p.add_std(value);
  SetChannels(p, channels);
  return p;
}

absl::StatusOr<std::unique_ptr<Weights>> OpenWeights(const fs::path& path,
                                                     const WeightOptions& options) {
  RETURN_IF_ERROR(CheckOptions(options));
  std::error_code error;
  return fs::is_directory(path, error) ? OpenFolder(path, options) : OpenFile(path, options);
}

}  // namespace pyramid
