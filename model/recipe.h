// The recipe: what a user writes to describe a training job. YAML with MindCV's keys (its
// config.py, commit 51b0636) and ours.
//
// Schema, defaults and errors live here once, for server, worker and command line. Precedence:
// overrides > YAML > defaults. An unknown key is an error that names the nearest known one. Every
// key's name, type and default is in VisitRecipe (recipe.cc).
#ifndef PYRAMID_MODEL_RECIPE_H_
#define PYRAMID_MODEL_RECIPE_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "proto/model.pb.h"

namespace pyramid {

struct Recipe {
  // System
  // "G": fused and packed path, "F": plain path (0, 1, graph, pynative read as well)
  std::string mode = "G";
  bool distribute = false;         // data parallel over `workers`
  int workers = 1;                 // processes, one rank each
  std::string device = "cpu";      // cpu | cuda | npu (device_target CPU | GPU | Ascend sets it)
  std::string launcher = "local";  // local | slurm | kubernetes
  bool val_while_train = true;
  int val_interval = 1;    // epochs between validations
  int log_interval = 100;  // steps between progress lines
  int64_t seed = 42;
  int priority = 0;  // larger goes first
  std::string owner;
  int max_restarts = 3;  // attempts after the first

  // Data
  // imagenet: a folder of class folders | fashion_mnist, mnist: IDX files
  std::string dataset = "imagenet";
  std::string data_dir = "./";
  std::string train_split = "train";
  std::string val_split = "val";
  bool dataset_download = false;
  int num_parallel_workers = 8;  // loader threads
  bool shuffle = true;
  int64_t num_samples = 0;  // training pictures used; 0: all
  int batch_size = 128;     // per worker
  bool drop_remainder = true;

  // Augmentation
  int image_resize = 224;  // side of the network's input, pixels
  int image_pad = 0;       // side to pad small pictures to instead of resizing; 0: resize
  int crop_padding = 0;    // with image_pad: random shift by up to so many pixels
  std::vector<double> scale = {0.08, 1.0};
  std::vector<double> ratio = {0.75, 1.333};
  double hflip = 0.5;  // probability
  double vflip = 0.0;
  double color_jitter = 0.4;
  std::string interpolation = "bilinear";  // bilinear | bicubic
  std::string auto_augment;                // empty: none
  int aug_splits = 0;
  int aug_repeats = 0;
  double re_prob = 0.0;  // random erasing
  std::vector<double> re_scale = {0.02, 0.33};
  std::vector<double> re_ratio = {0.3, 3.3};
  std::string re_value = "0";  // a number or "random"
  int re_max_attempts = 10;
  std::vector<double> mean;  // 0..255 per channel; empty: ImageNet's for 3 channels, else 127.5
  std::vector<double> std;
  double crop_pct = 0.875;
  double mixup = 0.0;
  double cutmix = 0.0;
  double cutmix_prob = 1.0;
  std::string compat = "timm";  // timm | mindcv: whose numerics and resampling

  // Model
  std::string model = "pvt_v2_b0";
  int num_classes = 0;  // 0: as many as the data has
  int in_channels = 3;
  double drop_rate = 0.0;
  double drop_path_rate = 0.0;
  bool pretrained = false;  // start from the published weights (FindPretrained)
  std::string ckpt_path;    // start from these: a file or a checkpoint's folder (OpenWeights)
  bool resume_opt = false;  // with ckpt_path: go on from its optimizer state and step too
  int keep_checkpoint_max = 10;
  std::string ckpt_save_dir = "./ckpt";
  int ckpt_save_interval = 1;                 // epochs
  std::string ckpt_save_policy = "latest_k";  // latest_k | top_k | none
  // pyramid | mindspore | safetensors: beside each checkpoint a file <model>-<epoch>_<steps>.ckpt
  // in MindCV's names, or .safetensors in the official ones
  std::string ckpt_format = "pyramid";
  int epoch_size = 90;
  bool dataset_sink_mode = true;  // has no meaning here
  bool ema = false;
  double ema_decay = 0.9999;
  bool clip_grad = false;
  double clip_value = 15.0;  // global norm
  double layer_decay = 0.0;  // 0: none
  int gradient_accumulation_steps = 1;
  bool keep_global_batch = false;

  // Optimizer
  std::string opt = "adamw";
  double momentum = 0.9;
  double weight_decay = 1e-6;
  bool use_nesterov = false;
  std::string weight_decay_filter = "disable";  // disable: decay everything | norm_and_bias | auto
  double eps = 1e-10;                           // unused by adamw (its eps is 1e-8), as in MindCV

  // Schedule
  std::string scheduler = "cosine_decay";
  double lr = 0.001;
  double min_lr = 1e-6;
  int warmup_epochs = 3;
  double warmup_factor = 0.0;
  int decay_epochs = 100;
  double decay_rate = 0.9;
  std::vector<double> multi_step_decay_milestones = {30, 60, 90};
  bool lr_epoch_stair = false;
  int num_cycles = 1;
  double cycle_decay = 1.0;
  std::string lr_scaling = "none";  // none | linear

  // Loss
  std::string loss = "CE";
  double label_smoothing = 0.0;
  double aux_factor = 0.0;
  std::string reduction = "mean";

  // Precision
  std::string amp_level = "O0";    // O0: fp32
  std::string amp_dtype = "bf16";  // of O1..O3: fp16 | bf16
  std::string val_amp_level = "O0";
  std::string amp_cast_list;
  std::string loss_scale_type = "fixed";
  double loss_scale = 1.0;
  bool drop_overflow_update = false;
  bool eval_shuffle = false;

  // Pictures per optimizer step, all workers together.
  int64_t global_batch() const {
    return int64_t{batch_size} * workers * gradient_accumulation_steps;
  }
};

struct ParsedRecipe {
  Recipe recipe;
  std::vector<std::string>
      warnings;  // one line each: a key without effect, a schedule that starts at 0 …
};

// Reads, applies "key=value" overrides, checks every rule that needs no data. `yaml` may be empty.
//   InvalidArgument  not YAML, unknown key, wrong type, value out of range, a feature not supported
//   yet: "recipe.<key> …"
absl::StatusOr<ParsedRecipe> ParseRecipe(absl::string_view yaml,
                                         std::span<const std::string> overrides = {});

// All keys with their values, in the schema's order. ParseRecipe of it gives the same recipe.
std::string RecipeToYaml(const Recipe& recipe);

struct RecipeKey {
  std::string name;
  std::string type;           // "bool", "int", "float", "text", "list"
  std::string default_value;  // as YAML
};
std::vector<RecipeKey> RecipeKeys();

// The network of the recipe; `num_classes` is the data's if the recipe has none. compat decides the
// numerics.
v1::NetworkConfig NetworkOf(const Recipe& recipe, int num_classes);

// Padding, GELU and epsilons of a code base: "official" and "timm" (and "pyramid", the default) |
// "transformers" | "mindcv".
v1::Numerics NumericsOf(absl::string_view origin);

// Which compat a network with this origin and these numerics belongs to.
std::string CompatOf(absl::string_view origin, const v1::Numerics& numerics);

// For people: "padding torch, GELU erf, outer eps 1e-05"; "resize to 248 (bicubic, antialias
// pillow), crop 224, EXIF apply", "none".
std::string DescribeNumerics(const v1::Numerics& numerics);
std::string DescribePreprocessing(const v1::Preprocessing& preprocessing);

// How pictures are evaluated: pad or resize to image_resize / crop_pct, centre crop. compat decides
// the resampling.
v1::Preprocessing EvalPreprocessingOf(const Recipe& recipe);

// The names of the variants, "pvt_v2_b0" first.
std::span<const std::string> VariantNames();

}  // namespace pyramid

#endif  // PYRAMID_MODEL_RECIPE_H_
