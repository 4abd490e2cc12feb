#include "model/recipe.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "proto/base/nearest.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

// Calls visit(name, field) for every key, in the order in which RecipeToYaml writes them.
template <typename R, typename Visitor>
void VisitRecipe(R& r, Visitor&& visit) {
  visit("mode", r.mode);
  visit("distribute", r.distribute);
  visit("workers", r.workers);
  visit("device", r.device);
  visit("launcher", r.launcher);
  visit("val_while_train", r.val_while_train);
  visit("val_interval", r.val_interval);
  visit("log_interval", r.log_interval);
  visit("seed", r.seed);
  visit("priority", r.priority);
  visit("owner", r.owner);
  visit("max_restarts", r.max_restarts);

  visit("dataset", r.dataset);
  visit("data_dir", r.data_dir);
  visit("train_split", r.train_split);
  visit("val_split", r.val_split);
  visit("dataset_download", r.dataset_download);
  visit("num_parallel_workers", r.num_parallel_workers);
  visit("shuffle", r.shuffle);
  visit("num_samples", r.num_samples);
  visit("batch_size", r.batch_size);
  visit("drop_remainder", r.drop_remainder);

  visit("image_resize", r.image_resize);
  visit("image_pad", r.image_pad);
  visit("crop_padding", r.crop_padding);
  visit("scale", r.scale);
  visit("ratio", r.ratio);
  visit("hflip", r.hflip);
  visit("vflip", r.vflip);
  visit("color_jitter", r.color_jitter);
  visit("interpolation", r.interpolation);
  visit("auto_augment", r.auto_augment);
  visit("aug_splits", r.aug_splits);
  visit("aug_repeats", r.aug_repeats);
  visit("re_prob", r.re_prob);
  visit("re_scale", r.re_scale);
  visit("re_ratio", r.re_ratio);
  visit("re_value", r.re_value);
  visit("re_max_attempts", r.re_max_attempts);
  visit("mean", r.mean);
  visit("std", r.std);
  visit("crop_pct", r.crop_pct);
  visit("mixup", r.mixup);
  visit("cutmix", r.cutmix);
  visit("cutmix_prob", r.cutmix_prob);
  visit("compat", r.compat);

  visit("model", r.model);
  visit("num_classes", r.num_classes);
  visit("in_channels", r.in_channels);
  visit("drop_rate", r.drop_rate);
  visit("drop_path_rate", r.drop_path_rate);
  visit("pretrained", r.pretrained);
  visit("ckpt_path", r.ckpt_path);
  visit("resume_opt", r.resume_opt);
  visit("keep_checkpoint_max", r.keep_checkpoint_max);
  visit("ckpt_save_dir", r.ckpt_save_dir);
  visit("ckpt_save_interval", r.ckpt_save_interval);
  visit("ckpt_save_policy", r.ckpt_save_policy);
  visit("ckpt_format", r.ckpt_format);
  visit("epoch_size", r.epoch_size);
  visit("dataset_sink_mode", r.dataset_sink_mode);
  visit("ema", r.ema);
  visit("ema_decay", r.ema_decay);
  visit("clip_grad", r.clip_grad);
  visit("clip_value", r.clip_value);
  visit("layer_decay", r.layer_decay);
  visit("gradient_accumulation_steps", r.gradient_accumulation_steps);
  visit("keep_global_batch", r.keep_global_batch);

  visit("opt", r.opt);
  visit("momentum", r.momentum);
  visit("weight_decay", r.weight_decay);
  visit("use_nesterov", r.use_nesterov);
  visit("weight_decay_filter", r.weight_decay_filter);
  visit("eps", r.eps);

  visit("scheduler", r.scheduler);
  visit("lr", r.lr);
  visit("min_lr", r.min_lr);
  visit("warmup_epochs", r.warmup_epochs);
  visit("warmup_factor", r.warmup_factor);
  visit("decay_epochs", r.decay_epochs);
  visit("decay_rate", r.decay_rate);
  visit("multi_step_decay_milestones", r.multi_step_decay_milestones);
  visit("lr_epoch_stair", r.lr_epoch_stair);
  visit("num_cycles", r.num_cycles);
  visit("cycle_decay", r.cycle_decay);
  visit("lr_scaling", r.lr_scaling);

  visit("loss", r.loss);
  visit("label_smoothing", r.label_smoothing);
  visit("aux_factor", r.aux_factor);
  visit("reduction", r.reduction);

  visit("amp_level", r.amp_level);
  visit("amp_dtype", r.amp_dtype);
  visit("val_amp_level", r.val_amp_level);
  visit("amp_cast_list", r.amp_cast_list);
  visit("loss_scale_type", r.loss_scale_type);
  visit("loss_scale", r.loss_scale);
  visit("drop_overflow_update", r.drop_overflow_update);
  visit("eval_shuffle", r.eval_shuffle);
}

// Keys that are read but have no field of their own.
const std::set<std::string, std::less<>>& AliasKeys() {
  static const std::set<std::string, std::less<>> keys = {"device_target", "filter_bias_and_bn"};
  return keys;
}

absl::Status Bad(absl::string_view key, absl::string_view text) {
  return absl::InvalidArgumentError(absl::StrCat("recipe.", key, " ", text));
}

std::string Shown(const YAML::Node& node) {
  YAML::Emitter out;
  out << YAML::Flow << node;
  std::string text = out.c_str();
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

// A text in quotes is that text, also "None": the parser tags it "!".
bool IsNone(const YAML::Node& node) {
  return node.IsNull() || (node.IsScalar() && node.Tag() != "!" &&
                           (node.Scalar() == "None" || node.Scalar() == "null"));
}

absl::Status Read(absl::string_view key, const YAML::Node& node, bool& out) {
  if (node.IsScalar()) {
    const std::string text = absl::AsciiStrToLower(node.Scalar());
    if (text == "true" || text == "yes" || text == "1" || text == "on")
      return out = true, absl::OkStatus();
    if (text == "false" || text == "no" || text == "0" || text == "off")
      return out = false, absl::OkStatus();
  }
  return Bad(key, absl::StrCat("is ", Shown(node), "; use True or False"));
}

template <typename Int>
absl::Status ReadInt(absl::string_view key, const YAML::Node& node, Int& out) {
  // Whole numbers may be written as 128.0 or 1e3, up to what a double holds exactly.
  int64_t whole = 0;
  double value = 0;
  bool good = node.IsScalar();
  if (good && !absl::SimpleAtoi(node.Scalar(), &whole)) {
    good = absl::SimpleAtod(node.Scalar(), &value) && std::floor(value) == value &&
           std::abs(value) <= 9.0e15;
    if (good) whole = static_cast<int64_t>(value);
  }
  if (!good || whole < std::numeric_limits<Int>::min() || whole > std::numeric_limits<Int>::max()) {
    return Bad(key, absl::StrCat("is ", Shown(node), "; use a whole number"));
  }
  out = static_cast<Int>(whole);
  return absl::OkStatus();
}
absl::Status Read(absl::string_view key, const YAML::Node& node, int& out) {
  return ReadInt(key, node, out);
}
absl::Status Read(absl::string_view key, const YAML::Node& node, int64_t& out) {
  return ReadInt(key, node, out);
}

absl::Status Read(absl::string_view key, const YAML::Node& node, double& out) {
  double value = 0;
  if (!node.IsScalar() || !absl::SimpleAtod(node.Scalar(), &value) || !std::isfinite(value)) {
    return Bad(key, absl::StrCat("is ", Shown(node), "; use a number"));
  }
  out = value;
  return absl::OkStatus();
}

absl::Status Read(absl::string_view key, const YAML::Node& node, std::string& out) {
  if (!node.IsScalar()) return Bad(key, absl::StrCat("is ", Shown(node), "; use a text"));
  out = node.Scalar();
  return absl::OkStatus();
}

absl::Status Read(absl::string_view key, const YAML::Node& node, std::vector<double>& out) {
  if (!node.IsSequence())
    return Bad(key, absl::StrCat("is ", Shown(node), "; use a list of numbers"));
  out.clear();
  for (const YAML::Node& item : node) {
    double value = 0;
    RETURN_IF_ERROR(Read(key, item, value));
    out.push_back(value);
  }
  return absl::OkStatus();
}

std::string Written(bool value) { return value ? "true" : "false"; }
std::string Written(int value) { return absl::StrCat(value); }
std::string Written(int64_t value) { return absl::StrCat(value); }
std::string Written(double value) {
  // The shortest text that reads back as the same number.
  for (int digits = 6; digits <= 17; ++digits) {
    std::string text = absl::StrFormat("%.*g", digits, value);
    double back = 0;
    if (absl::SimpleAtod(text, &back) && back == value) return text;
  }
  return absl::StrCat(value);
}
std::string Written(const std::string& value) {
  YAML::Emitter out;
  // Quoted, so that "0" and "None" stay texts.
  out << YAML::DoubleQuoted << value;
  return out.c_str();
}
std::string Written(const std::vector<double>& values) {
  return absl::StrCat(
      "[",
      absl::StrJoin(values, ", ",
                    [](std::string* out, double value) { absl::StrAppend(out, Written(value)); }),
      "]");
}

std::string TypeName(bool) { return "bool"; }
std::string TypeName(int) { return "int"; }
std::string TypeName(int64_t) { return "int"; }
std::string TypeName(double) { return "float"; }
std::string TypeName(const std::string&) { return "text"; }
std::string TypeName(const std::vector<double>&) { return "list"; }

// Sets one key. None gives the default back.
absl::Status SetKey(Recipe& recipe, const std::string& key, const YAML::Node& node,
                    std::vector<std::string>& warnings) {
  if (key == "device_target") {
    std::string target;
    RETURN_IF_ERROR(Read(key, node, target));
    if (target == "CPU")
      recipe.device = "cpu";
    else if (target == "GPU")
      recipe.device = "cuda";
    else if (target == "Ascend")
      recipe.device = "npu";
    else
      return Bad(key, absl::StrCat("is ", target, "; use CPU, GPU or Ascend"));
    return absl::OkStatus();
  }
  if (key == "filter_bias_and_bn") {
    bool filter = false;
    RETURN_IF_ERROR(Read(key, node, filter));
    warnings.push_back(
        "filter_bias_and_bn never kept its promise: weights published with it were decayed "
        "everywhere (MindCV #752). It is read as weight_decay_filter: disable; write "
        "weight_decay_filter: norm_and_bias to exempt norms and biases");
    return absl::OkStatus();
  }
  absl::Status status;
  bool found = false;
  const Recipe defaults;
  VisitRecipe(recipe, [&](absl::string_view name, auto& field) {
    if (name != key) return;
    found = true;
    if (IsNone(node)) {
      using Field = std::decay_t<decltype(field)>;
      VisitRecipe(defaults, [&](absl::string_view other, const auto& value) {
        if constexpr (std::is_same_v<std::decay_t<decltype(value)>, Field>) {
          if (other == name) field = value;
        }
      });
      return;
    }
    status = Read(key, node, field);
  });
  if (!found) {
    std::vector<std::string> known(AliasKeys().begin(), AliasKeys().end());
    for (const RecipeKey& candidate : RecipeKeys()) known.push_back(candidate.name);
    return absl::InvalidArgumentError(absl::StrCat(
        "recipe.", key, " is not a known key; did you mean ", Nearest(key, known), "?"));
  }
  return status;
}

// One spelling of values that have several.
void Normalise(Recipe& r) {
  const std::string mode = absl::AsciiStrToLower(r.mode);
  if (mode == "0" || mode == "g" || mode == "graph") r.mode = "G";
  if (mode == "1" || mode == "f" || mode == "pynative") r.mode = "F";
  r.loss = absl::AsciiStrToUpper(r.loss);
  r.opt = absl::AsciiStrToLower(r.opt);
  if (r.scheduler == "warmup_cosine_decay") r.scheduler = "cosine_decay";
  if (r.ckpt_save_policy.empty()) r.ckpt_save_policy = "none";
}

template <typename T>
absl::Status InRange(absl::string_view key, T value, T low, T high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Bad(key, absl::StrCat("is ", Written(value), "; use ", Written(low), "..", Written(high)));
}

absl::Status OneOf(absl::string_view key, const std::string& value,
                   const std::vector<std::string>& allowed) {
  if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return absl::OkStatus();
  const std::string nearest = Nearest(value, allowed);
  const bool close = EditDistance(value, nearest) <= 3;
  return Bad(key, absl::StrCat("is \"", value, "\"; use ", absl::StrJoin(allowed, ", "),
                               close ? absl::StrCat(" (did you mean ", nearest, "?)") : ""));
}

absl::Status NotYet(bool wanted, absl::string_view key, absl::string_view value,
                    absl::string_view way_out) {
  if (!wanted) return absl::OkStatus();
  return Bad(key, absl::StrCat("is ", value, "; not supported yet: ", key, ". ", way_out));
}

absl::Status CheckPair(absl::string_view key, const std::vector<double>& pair, double low,
                       double high) {
  if (pair.size() != 2) return Bad(key, absl::StrCat("has ", pair.size(), " values; use two"));
  if (pair[0] < low || pair[1] > high || pair[0] > pair[1]) {
    return Bad(key, absl::StrCat("is ", Written(pair), "; use two rising numbers in ", Written(low),
                                 "..", Written(high)));
  }
  return absl::OkStatus();
}

absl::Status CheckData(const Recipe& r) {
  RETURN_IF_ERROR(OneOf("dataset", r.dataset, {"imagenet", "fashion_mnist", "mnist"}));
  RETURN_IF_ERROR(NotYet(r.dataset_download, "dataset_download", "True",
                         "Set it to False and data_dir to a folder that holds the data"));
  if (r.data_dir.empty()) return Bad("data_dir", "is empty; use the folder that holds the data");
  RETURN_IF_ERROR(InRange("num_parallel_workers", r.num_parallel_workers, 1, 256));
  RETURN_IF_ERROR(InRange<int64_t>("num_samples", r.num_samples, 0, int64_t{1} << 40));
  RETURN_IF_ERROR(InRange("batch_size", r.batch_size, 1, 4096));
  RETURN_IF_ERROR(InRange("image_resize", r.image_resize, 29, 2048));
  RETURN_IF_ERROR(InRange("image_pad", r.image_pad, 0, 2048));
  if (r.image_pad != 0 && r.image_pad < r.image_resize) {
    return Bad("image_pad",
               absl::StrCat("is ", r.image_pad, "; use at least image_resize, ", r.image_resize));
  }
  RETURN_IF_ERROR(InRange("crop_padding", r.crop_padding, 0, 512));
  if (r.crop_padding > 0 && r.image_pad == 0) {
    return Bad("crop_padding",
               absl::StrCat("is ", r.crop_padding, " but image_pad is 0; set image_pad"));
  }
  RETURN_IF_ERROR(CheckPair("scale", r.scale, 1e-4, 1.0));
  RETURN_IF_ERROR(CheckPair("ratio", r.ratio, 0.01, 100.0));
  RETURN_IF_ERROR(InRange("hflip", r.hflip, 0.0, 1.0));
  RETURN_IF_ERROR(InRange("vflip", r.vflip, 0.0, 1.0));
  RETURN_IF_ERROR(InRange("color_jitter", r.color_jitter, 0.0, 1.0));
  RETURN_IF_ERROR(OneOf("interpolation", r.interpolation, {"bilinear", "bicubic"}));
  RETURN_IF_ERROR(NotYet(!r.auto_augment.empty(), "auto_augment", r.auto_augment, "Leave it out"));
  RETURN_IF_ERROR(NotYet(r.aug_splits != 0, "aug_splits", Written(r.aug_splits), "Leave it out"));
  RETURN_IF_ERROR(
      NotYet(r.aug_repeats != 0, "aug_repeats", Written(r.aug_repeats), "Leave it out"));
  RETURN_IF_ERROR(InRange("re_prob", r.re_prob, 0.0, 1.0));
  RETURN_IF_ERROR(CheckPair("re_scale", r.re_scale, 0.0, 1.0));
  RETURN_IF_ERROR(CheckPair("re_ratio", r.re_ratio, 0.01, 100.0));
  double constant = 0;
  if (r.re_value != "random" && !absl::SimpleAtod(r.re_value, &constant)) {
    return Bad("re_value", absl::StrCat("is \"", r.re_value, "\"; use a number or \"random\""));
  }
  RETURN_IF_ERROR(InRange("re_max_attempts", r.re_max_attempts, 1, 1000));
  for (const auto& [key, values] : {std::pair{"mean", &r.mean}, std::pair{"std", &r.std}}) {
    if (!values->empty() && static_cast<int>(values->size()) != r.in_channels) {
      return Bad(key,
                 absl::StrCat("has ", values->size(), " values; in_channels is ", r.in_channels));
    }
  }
  for (const double value : r.mean) RETURN_IF_ERROR(InRange("mean", value, 0.0, 255.0));
  for (const double value : r.std) RETURN_IF_ERROR(InRange("std", value, 1e-3, 255.0));
  RETURN_IF_ERROR(InRange("crop_pct", r.crop_pct, 0.1, 1.0));
  RETURN_IF_ERROR(NotYet(r.mixup != 0, "mixup", Written(r.mixup), "Set it to 0"));
  RETURN_IF_ERROR(NotYet(r.cutmix != 0, "cutmix", Written(r.cutmix), "Set it to 0"));
  return OneOf("compat", r.compat, {"timm", "mindcv"});
}

absl::Status CheckModel(const Recipe& r) {
  const std::vector<std::string> variants(VariantNames().begin(), VariantNames().end());
  RETURN_IF_ERROR(OneOf("model", r.model, variants));
  RETURN_IF_ERROR(InRange("num_classes", r.num_classes, 0, 1'000'000));
  if (r.in_channels != 1 && r.in_channels != 3) {
    return Bad("in_channels", absl::StrCat("is ", r.in_channels, "; pictures have 1 or 3"));
  }
  RETURN_IF_ERROR(NotYet(r.drop_rate != 0, "drop_rate", Written(r.drop_rate), "Set it to 0"));
  RETURN_IF_ERROR(InRange("drop_path_rate", r.drop_path_rate, 0.0, 0.99));
  if (r.pretrained && !r.ckpt_path.empty())
    return Bad("pretrained", "is True and ckpt_path is set; use one of them");
  if (r.resume_opt && r.ckpt_path.empty())
    return Bad("resume_opt", "is True but ckpt_path is empty; set ckpt_path");
  RETURN_IF_ERROR(InRange("keep_checkpoint_max", r.keep_checkpoint_max, 1, 10000));
  RETURN_IF_ERROR(InRange("ckpt_save_interval", r.ckpt_save_interval, 1, 100000));
  RETURN_IF_ERROR(OneOf("ckpt_save_policy", r.ckpt_save_policy, {"latest_k", "top_k", "none"}));
  RETURN_IF_ERROR(OneOf("ckpt_format", r.ckpt_format, {"pyramid", "mindspore", "safetensors"}));
  RETURN_IF_ERROR(InRange("epoch_size", r.epoch_size, 1, 100000));
  RETURN_IF_ERROR(NotYet(r.ema, "ema", "True", "Set it to False"));
  RETURN_IF_ERROR(InRange("clip_value", r.clip_value, 1e-9, 1e9));
  RETURN_IF_ERROR(
      NotYet(r.layer_decay != 0, "layer_decay", Written(r.layer_decay), "Leave it out"));
  RETURN_IF_ERROR(InRange("gradient_accumulation_steps", r.gradient_accumulation_steps, 1, 4096));
  return NotYet(r.keep_global_batch, "keep_global_batch", "True", "Set it to False");
}

absl::Status CheckOptimizer(const Recipe& r) {
  RETURN_IF_ERROR(
      OneOf("opt", r.opt,
            {"adamw", "sgd", "momentum", "adam", "lion", "rmsprop", "adagrad", "lamb", "nadam"}));
  RETURN_IF_ERROR(NotYet(r.opt != "adamw", "opt", r.opt, "Use adamw"));
  RETURN_IF_ERROR(InRange("weight_decay", r.weight_decay, 0.0, 10.0));
  RETURN_IF_ERROR(
      OneOf("weight_decay_filter", r.weight_decay_filter, {"disable", "norm_and_bias", "auto"}));
  RETURN_IF_ERROR(OneOf("scheduler", r.scheduler,
                        {"constant", "cosine_decay", "exponential_decay", "step_decay",
                         "multi_step_decay", "one_cycle", "cyclic"}));
  RETURN_IF_ERROR(NotYet(r.scheduler != "constant" && r.scheduler != "cosine_decay", "scheduler",
                         r.scheduler, "Use cosine_decay or constant"));
  RETURN_IF_ERROR(InRange("lr", r.lr, 0.0, 100.0));
  RETURN_IF_ERROR(InRange("min_lr", r.min_lr, 0.0, 100.0));
  RETURN_IF_ERROR(InRange("warmup_epochs", r.warmup_epochs, 0, 100000));
  RETURN_IF_ERROR(InRange("warmup_factor", r.warmup_factor, 0.0, 1.0));
  RETURN_IF_ERROR(InRange("decay_epochs", r.decay_epochs, 1, 100000));
  RETURN_IF_ERROR(InRange("num_cycles", r.num_cycles, 1, 1000));
  RETURN_IF_ERROR(InRange("cycle_decay", r.cycle_decay, 0.0, 1.0));
  RETURN_IF_ERROR(OneOf("lr_scaling", r.lr_scaling, {"none", "linear"}));
  RETURN_IF_ERROR(
      NotYet(r.lr_scaling == "linear", "lr_scaling", r.lr_scaling, "Use none and set lr"));
  RETURN_IF_ERROR(OneOf("loss", r.loss, {"CE", "BCE"}));
  RETURN_IF_ERROR(NotYet(r.loss == "BCE", "loss", r.loss, "Use CE"));
  RETURN_IF_ERROR(InRange("label_smoothing", r.label_smoothing, 0.0, 0.999));
  RETURN_IF_ERROR(NotYet(r.aux_factor != 0, "aux_factor", Written(r.aux_factor),
                         "PVT v2 has no auxiliary head; set it to 0"));
  return NotYet(r.reduction != "mean", "reduction", r.reduction, "Use mean");
}

absl::Status CheckSystem(const Recipe& r) {
  RETURN_IF_ERROR(OneOf("mode", r.mode, {"G", "F"}));
  RETURN_IF_ERROR(InRange("workers", r.workers, 1, 1024));
  RETURN_IF_ERROR(OneOf("device", r.device, {"cpu", "cuda", "npu"}));
  RETURN_IF_ERROR(OneOf("launcher", r.launcher, {"local", "slurm", "kubernetes"}));
  RETURN_IF_ERROR(NotYet(r.launcher != "local", "launcher", r.launcher, "Use local"));
  RETURN_IF_ERROR(InRange("val_interval", r.val_interval, 1, 100000));
  RETURN_IF_ERROR(InRange("log_interval", r.log_interval, 1, 1000000));
  RETURN_IF_ERROR(InRange("priority", r.priority, -1000, 1000));
  RETURN_IF_ERROR(InRange("max_restarts", r.max_restarts, 0, 1000));
  RETURN_IF_ERROR(OneOf("amp_level", r.amp_level, {"O0", "O1", "O2", "O3"}));
  RETURN_IF_ERROR(OneOf("amp_dtype", r.amp_dtype, {"fp16", "bf16"}));
  RETURN_IF_ERROR(NotYet(r.amp_level != "O0" && r.amp_dtype == "fp16", "amp_dtype", r.amp_dtype,
                         "Use bf16, or amp_level O0"));
  RETURN_IF_ERROR(OneOf("val_amp_level", r.val_amp_level, {"O0", "O1", "O2", "O3"}));
  RETURN_IF_ERROR(NotYet(r.val_amp_level != "O0", "val_amp_level", r.val_amp_level, "Use O0"));
  RETURN_IF_ERROR(
      NotYet(!r.amp_cast_list.empty(), "amp_cast_list", r.amp_cast_list, "Leave it out"));
  RETURN_IF_ERROR(OneOf("loss_scale_type", r.loss_scale_type, {"fixed", "dynamic", "auto"}));
  if (r.loss_scale < 1)
    return Bad("loss_scale", absl::StrCat("is ", Written(r.loss_scale), "; use at least 1"));
  return absl::OkStatus();
}

void Warn(const Recipe& r, std::vector<std::string>& warnings) {
  if (r.lr_epoch_stair && r.warmup_epochs > 0 && r.warmup_factor == 0) {
    warnings.push_back(
        "lr_epoch_stair with warmup_factor 0 runs the whole first epoch at learning rate 0; "
        "set warmup_factor: 0.01");
  }
  if (r.scheduler == "cosine_decay" &&
      r.warmup_epochs + r.num_cycles * r.decay_epochs > r.epoch_size) {
    warnings.push_back(absl::StrCat(
        "warmup_epochs + decay_epochs is ", r.warmup_epochs + r.num_cycles * r.decay_epochs,
        ", more than epoch_size ", r.epoch_size, ": the decay won't reach min_lr"));
  }
  if (r.loss_scale_type != "fixed" || r.loss_scale != 1.0) {
    warnings.push_back("loss scaling serves fp16 only; it has no effect in fp32 and bf16");
  }
}

}  // namespace

absl::StatusOr<ParsedRecipe> ParseRecipe(absl::string_view yaml,
                                         std::span<const std::string> overrides) {
  ParsedRecipe parsed;
  try {
    if (yaml.size() > (1 << 20)) return absl::InvalidArgumentError("recipe: over 1 MiB of YAML");
    const YAML::Node root = YAML::Load(std::string(yaml));
    if (!root.IsNull() && !root.IsMap())
      return absl::InvalidArgumentError("recipe: not a YAML map of keys and values");
    std::set<std::string> seen;
    for (const auto& entry : root) {
      if (!entry.first.IsScalar()) return absl::InvalidArgumentError("recipe: a key is not a word");
      const std::string key = entry.first.Scalar();
      if (!seen.insert(key).second) return Bad(key, "stands twice");
      RETURN_IF_ERROR(SetKey(parsed.recipe, key, entry.second, parsed.warnings));
    }
    for (const std::string& override_text : overrides) {
      const std::pair<std::string, std::string> parts =
          absl::StrSplit(override_text, absl::MaxSplits('=', 1));
      if (!absl::StrContains(override_text, '=')) {
        return absl::InvalidArgumentError(absl::StrCat("\"", override_text, "\" is not key=value"));
      }
      RETURN_IF_ERROR(SetKey(parsed.recipe, std::string(absl::StripAsciiWhitespace(parts.first)),
                             YAML::Load(parts.second), parsed.warnings));
    }
  } catch (const YAML::Exception& e) {
    return absl::InvalidArgumentError(absl::StrCat("recipe: not YAML: ", e.what()));
  }
  Normalise(parsed.recipe);
  RETURN_IF_ERROR(CheckSystem(parsed.recipe));
  RETURN_IF_ERROR(CheckData(parsed.recipe));
  RETURN_IF_ERROR(CheckModel(parsed.recipe));
  RETURN_IF_ERROR(CheckOptimizer(parsed.recipe));
  Warn(parsed.recipe, parsed.warnings);
  return parsed;
}

std::string RecipeToYaml(const Recipe& recipe) {
  std::string out;
  VisitRecipe(recipe, [&](absl::string_view name, const auto& field) {
    absl::StrAppend(&out, name, ": ", Written(field), "\n");
  });
  return out;
}

std::vector<RecipeKey> RecipeKeys() {
  std::vector<RecipeKey> keys;
  const Recipe defaults;
  VisitRecipe(defaults, [&](absl::string_view name, const auto& field) {
    keys.push_back({std::string(name), TypeName(field), Written(field)});
  });
  return keys;
}

v1::Numerics NumericsOf(absl::string_view origin) {
  const bool mindcv = origin == "mindcv";
  v1::Numerics numerics;
  numerics.set_pad_style(mindcv ? "same" : "torch");
  numerics.set_gelu(mindcv ? "tanh" : "erf");
  numerics.set_eps_outer(mindcv ? 1e-7 : origin == "transformers" ? 1e-6 : 1e-5);
  numerics.set_eps_block(1e-6);
  return numerics;
}

std::string CompatOf(absl::string_view origin, const v1::Numerics& numerics) {
  if (origin == "mindcv") return "mindcv";
  const bool ours = origin == "pyramid" || origin.empty();
  return ours && (numerics.pad_style() == "same" || numerics.gelu() == "tanh") ? "mindcv" : "timm";
}

std::string DescribeNumerics(const v1::Numerics& numerics) {
  return absl::StrFormat("padding %s, GELU %s, outer eps %g", numerics.pad_style(), numerics.gelu(),
                         numerics.eps_outer());
}

std::string DescribePreprocessing(const v1::Preprocessing& p) {
  if (p.crop() == 0) return "none";
  const std::string scale =
      p.has_pad() ? absl::StrCat("pad to ", p.pad().to(), " with ", p.pad().fill())
                  : absl::StrCat("resize to ", p.resize().side(), " (", p.resize().kernel(),
                                 ", antialias ", p.resize().antialias(), ")");
  return absl::StrCat(scale, ", crop ", p.crop(), ", EXIF ", p.exif());
}

v1::NetworkConfig NetworkOf(const Recipe& recipe, int num_classes) {
  v1::NetworkConfig config;
  config.set_variant(recipe.model);
  config.set_num_classes(recipe.num_classes > 0 ? recipe.num_classes : num_classes);
  config.set_in_channels(recipe.in_channels);
  *config.mutable_numerics() = NumericsOf(recipe.compat);
  return config;
}

v1::Preprocessing EvalPreprocessingOf(const Recipe& recipe) {
  v1::Preprocessing p;
  p.set_channels(recipe.in_channels);
  p.set_exif("apply");
  if (recipe.image_pad > 0) {
    p.mutable_pad()->set_to(recipe.image_pad);
    p.mutable_pad()->set_fill(0);
  } else {
    v1::Resize& resize = *p.mutable_resize();
    resize.set_side(static_cast<int>(std::floor(recipe.image_resize / recipe.crop_pct)));
    resize.set_kernel(recipe.interpolation);
    resize.set_antialias(recipe.compat == "mindcv" ? "none" : "pillow");
    resize.set_other_side("floor");
  }
  p.set_crop(recipe.image_resize);
  static constexpr double kImageNetMean[] = {0.485, 0.456, 0.406};  // timm.data.constants
  static constexpr double kImageNetStd[] = {0.229, 0.224, 0.225};
  for (int c = 0; c < recipe.in_channels; ++c) {
    const bool rgb = recipe.in_channels == 3;
    p.add_mean(recipe.mean.empty() ? (rgb ? kImageNetMean[c] : 0.5) : recipe.mean[c] / 255.0);
    p.add_std(recipe.std.empty() ? (rgb ? kImageNetStd[c] : 0.5) : recipe.std[c] / 255.0);
  }
  return p;
}

std::span<const std::string> VariantNames() {
  static const std::vector<std::string> names = {
      "pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "pvt_v2_b2_li", "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5"};
  return names;
}

}  // namespace pyramid
