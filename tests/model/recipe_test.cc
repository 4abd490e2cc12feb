#include "model/recipe.h"

#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::testing::_;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

std::string Config(const std::string& name) {
  auto text = ReadFile(absl::StrCat(PYRAMID_SOURCE_DIR, "/configs/", name));
  EXPECT_OK(text);
  return text.ok() ? *text : "";
}

TEST(RecipeTest, AnEmptyTextGivesTheDefaults) {
  // A default schedule of 3 + 100 epochs in 90 is MindCV's own, and warns.
  ASSERT_OK_AND_ASSIGN(const ParsedRecipe parsed, ParseRecipe(""));
  EXPECT_EQ(parsed.recipe.model, "pvt_v2_b0");
  EXPECT_EQ(parsed.recipe.opt, "adamw");
  EXPECT_EQ(parsed.recipe.batch_size, 128);
  EXPECT_EQ(parsed.recipe.lr, 0.001);
  EXPECT_EQ(RecipeToYaml(parsed.recipe), RecipeToYaml(Recipe()));
}

TEST(RecipeTest, OverridesWinOverYamlAndYamlOverDefaults) {
  const std::vector<std::string> overrides = {"lr=0.5", " batch_size =16", "scale=[0.5, 0.9]",
                                              "ckpt_path=a=b"};
  ASSERT_OK_AND_ASSIGN(const ParsedRecipe parsed,
                       ParseRecipe("lr: 0.1\nmin_lr: 0.01\n", overrides));
  EXPECT_EQ(parsed.recipe.lr, 0.5);
  EXPECT_EQ(parsed.recipe.min_lr, 0.01);
  EXPECT_EQ(parsed.recipe.batch_size, 16);
  EXPECT_THAT(parsed.recipe.scale, ElementsAre(0.5, 0.9));
  EXPECT_EQ(parsed.recipe.ckpt_path, "a=b");
  EXPECT_EQ(parsed.recipe.warmup_epochs, 3);
}

TEST(RecipeTest, AnUnknownKeyIsAnErrorThatNamesTheNearest) {
  const std::vector<std::pair<const char*, const char*>> cases = {
      {"batch_sise", "batch_size"},
      {"learning_rate", "log_interval"},
      {"epochs", "workers"},
      {"label_smothing", "label_smoothing"},
      {"devcie", "device"},
      {"device_targe", "device_target"},
      {"filter_bias_and_bm", "filter_bias_and_bn"}};
  for (const auto& [key, nearest] : cases) {
    const auto in_yaml = ParseRecipe(absl::StrCat(key, ": 1"));
    EXPECT_THAT(
        in_yaml,
        StatusIs(absl::StatusCode::kInvalidArgument,
                 HasSubstr(absl::StrCat("recipe.", key, " is not a known key; did you mean "))));
    if (absl::string_view(key) != "learning_rate" && absl::string_view(key) != "epochs") {
      EXPECT_THAT(in_yaml, StatusIs(absl::StatusCode::kInvalidArgument,
                                    HasSubstr(absl::StrCat("did you mean ", nearest, "?"))));
    }
    const std::vector<std::string> overrides = {absl::StrCat(key, "=1")};
    EXPECT_EQ(ParseRecipe("", overrides).status(), in_yaml.status());
  }
}

TEST(RecipeTest, NoneGivesTheDefaultBack) {
  const std::vector<std::string> overrides = {"drop_path_rate=None", "num_samples=None"};
  ASSERT_OK_AND_ASSIGN(
      const ParsedRecipe parsed,
      ParseRecipe(
          "drop_path_rate: 0.3\nauto_augment: None\nmean: null\nseed:\nckpt_save_policy: None\n",
          overrides));
  EXPECT_EQ(parsed.recipe.drop_path_rate, 0.0);
  EXPECT_EQ(parsed.recipe.auto_augment, "");
  EXPECT_THAT(parsed.recipe.mean, IsEmpty());
  EXPECT_EQ(parsed.recipe.seed, 42);
}

TEST(RecipeTest, NoneAsCheckpointPolicyKeepsNone) {
  ASSERT_OK_AND_ASSIGN(const ParsedRecipe parsed, ParseRecipe("ckpt_save_policy: none"));
  EXPECT_EQ(parsed.recipe.ckpt_save_policy, "none");
}

TEST(RecipeTest, ReadsMindCvsSpellings) {
  ASSERT_OK_AND_ASSIGN(const ParsedRecipe parsed, ParseRecipe(R"(
mode: 1
device_target: Ascend
distribute: True
shuffle: false
use_nesterov: no
val_while_train: yes
loss: ce
opt: AdamW
scheduler: warmup_cosine_decay
re_value: random
min_lr: 1e-5
batch_size: 128.0
seed: 9007199254740993
)"));
  EXPECT_EQ(parsed.recipe.mode, "F");
  EXPECT_EQ(parsed.recipe.device, "npu");
  EXPECT_TRUE(parsed.recipe.distribute);
  EXPECT_FALSE(parsed.recipe.shuffle);
  EXPECT_EQ(parsed.recipe.loss, "CE");
  EXPECT_EQ(parsed.recipe.opt, "adamw");
  EXPECT_EQ(parsed.recipe.scheduler, "cosine_decay");
  EXPECT_EQ(parsed.recipe.re_value, "random");
  EXPECT_EQ(parsed.recipe.min_lr, 1e-5);
  EXPECT_EQ(parsed.recipe.batch_size, 128);
  EXPECT_EQ(parsed.recipe.seed, 9007199254740993);  // more than a double holds
}

TEST(RecipeTest, DeviceTargetsAndModesHaveAllTheirNames) {
  for (const auto& [target, device] :
       {std::pair{"CPU", "cpu"}, std::pair{"GPU", "cuda"}, std::pair{"Ascend", "npu"}}) {
    ASSERT_OK_AND_ASSIGN(const ParsedRecipe parsed,
                         ParseRecipe(absl::StrCat("device_target: ", target)));
    EXPECT_EQ(parsed.recipe.device, device);
  }
  for (const auto& [text, mode] :
       {std::pair{"0", "G"}, std::pair{"graph", "G"}, std::pair{"G", "G"}, std::pair{"1", "F"},
        std::pair{"PyNative", "F"}, std::pair{"f", "F"}}) {
    ASSERT_OK_AND_ASSIGN(const ParsedRecipe parsed, ParseRecipe(absl::StrCat("mode: ", text)));
    EXPECT_EQ(parsed.recipe.mode, mode) << text;
  }
}

TEST(RecipeTest, FilterBiasAndBnIsReadWithAWarning) {
  ASSERT_OK_AND_ASSIGN(const ParsedRecipe parsed, ParseRecipe("filter_bias_and_bn: True"));
  EXPECT_EQ(parsed.recipe.weight_decay_filter, "disable");
  EXPECT_THAT(parsed.warnings, Contains(HasSubstr("MindCV #752")));
}

TEST(RecipeTest, EveryRuleHasItsMessage) {
  const std::vector<std::pair<const char*, const char*>> cases = {
      // Types.
      {"shuffle=maybe", "recipe.shuffle is maybe; use True or False"},
      {"workers=two", "recipe.workers is two; use a whole number"},
      {"workers=1.5", "recipe.workers is 1.5; use a whole number"},
      {"workers=3000000000", "use a whole number"},
      {"seed=[1]", "recipe.seed is [1]; use a whole number"},
      {"lr=fast", "recipe.lr is fast; use a number"},
      {"lr=.inf", "recipe.lr is .inf; use a number"},
      {"lr=inf", "recipe.lr is inf; use a number"},
      {"lr=nan", "recipe.lr is nan; use a number"},
      {"model=[a]", "recipe.model is [a]; use a text"},
      {"scale=0.5", "recipe.scale is 0.5; use a list of numbers"},
      {"scale=[a, b]", "recipe.scale is a; use a number"},
      // System.
      {"mode=2", "recipe.mode is \"2\"; use G, F"},
      {"workers=0", "recipe.workers is 0; use 1..1024"},
      {"device=gpu", "recipe.device is \"gpu\"; use cpu, cuda, npu (did you mean cpu?)"},
      {"device_target=TPU", "recipe.device_target is TPU; use CPU, GPU or Ascend"},
      {"launcher=magic", "recipe.launcher is \"magic\"; use local, slurm, kubernetes"},
      {"launcher=slurm", "not supported yet: launcher. Use local"},
      {"val_interval=0", "recipe.val_interval is 0"},
      {"log_interval=0", "recipe.log_interval is 0"},
      {"priority=1001", "recipe.priority is 1001; use -1000..1000"},
      {"max_restarts=-1", "recipe.max_restarts is -1; use 0..1000"},
      {"amp_level=O4", "recipe.amp_level is \"O4\"; use O0, O1, O2, O3"},
      {"amp_dtype=fp8", "recipe.amp_dtype is \"fp8\"; use fp16, bf16"},
      {"val_amp_level=O2", "not supported yet: val_amp_level"},
      {"val_amp_level=x", "recipe.val_amp_level is \"x\""},
      {"amp_cast_list=a", "not supported yet: amp_cast_list"},
      {"loss_scale_type=magic", "recipe.loss_scale_type is \"magic\"; use fixed, dynamic, auto"},
      {"loss_scale=0.5", "recipe.loss_scale is 0.5; use at least 1"},
      // Data.
      {"dataset=imagenette",
       "recipe.dataset is \"imagenette\"; use imagenet, fashion_mnist, mnist (did you mean "
       "imagenet?)"},
      {"dataset_download=True", "not supported yet: dataset_download"},
      {"data_dir=''", "recipe.data_dir is empty"},
      {"num_parallel_workers=0", "recipe.num_parallel_workers is 0; use 1..256"},
      {"num_samples=-1", "recipe.num_samples is -1"},
      {"batch_size=0", "recipe.batch_size is 0; use 1..4096"},
      {"batch_size=4097", "recipe.batch_size is 4097; use 1..4096"},
      {"image_resize=28", "recipe.image_resize is 28; use 29..2048"},
      {"image_pad=100", "recipe.image_pad is 100; use at least image_resize, 224"},
      {"image_pad=-1", "recipe.image_pad is -1; use 0..2048"},
      {"crop_padding=2", "recipe.crop_padding is 2 but image_pad is 0; set image_pad"},
      {"crop_padding=513", "recipe.crop_padding is 513; use 0..512"},
      {"scale=[0.5]", "recipe.scale has 1 values; use two"},
      {"scale=[0.9, 0.5]", "recipe.scale is [0.9, 0.5]; use two rising numbers in 0.0001..1"},
      {"scale=[0.5, 1.5]", "recipe.scale is [0.5, 1.5]"},
      {"ratio=[0, 1]", "recipe.ratio is [0, 1]; use two rising numbers in 0.01..100"},
      {"hflip=1.5", "recipe.hflip is 1.5; use 0..1"},
      {"vflip=-1", "recipe.vflip is -1; use 0..1"},
      {"color_jitter=2", "recipe.color_jitter is 2; use 0..1"},
      {"interpolation=nearest", "recipe.interpolation is \"nearest\"; use bilinear, bicubic"},
      {"auto_augment=randaug-m9",
       "recipe.auto_augment is randaug-m9; not supported yet: auto_augment. Leave it out"},
      {"aug_splits=3", "not supported yet: aug_splits"},
      {"aug_repeats=3", "not supported yet: aug_repeats"},
      {"re_prob=2", "recipe.re_prob is 2; use 0..1"},
      {"re_scale=[1]", "recipe.re_scale has 1 values"},
      {"re_ratio=[0.001, 1]", "recipe.re_ratio is [0.001, 1]"},
      {"re_value=noise", "recipe.re_value is \"noise\"; use a number or \"random\""},
      {"re_max_attempts=0", "recipe.re_max_attempts is 0"},
      {"mean=[1, 2]", "recipe.mean has 2 values; in_channels is 3"},
      {"std=[1]", "recipe.std has 1 values; in_channels is 3"},
      {"mean=[1, 2, 256]", "recipe.mean is 256; use 0..255"},
      {"std=[1, 2, 0]", "recipe.std is 0; use 0.001..255"},
      {"crop_pct=0", "recipe.crop_pct is 0; use 0.1..1"},
      {"mixup=0.8", "recipe.mixup is 0.8; not supported yet: mixup. Set it to 0"},
      {"cutmix=1.0", "recipe.cutmix is 1; not supported yet: cutmix"},
      {"compat=keras", "recipe.compat is \"keras\"; use timm, mindcv"},
      // Model.
      {"model=pvt_v2_b6",
       "recipe.model is \"pvt_v2_b6\"; use pvt_v2_b0, pvt_v2_b1, pvt_v2_b2, pvt_v2_b2_li, "
       "pvt_v2_b3, pvt_v2_b4, pvt_v2_b5"},
      {"num_classes=-1", "recipe.num_classes is -1"},
      {"in_channels=2", "recipe.in_channels is 2; pictures have 1 or 3"},
      {"drop_rate=0.1", "not supported yet: drop_rate"},
      {"drop_path_rate=1", "recipe.drop_path_rate is 1; use 0..0.99"},
      {"resume_opt=True", "recipe.resume_opt is True but ckpt_path is empty; set ckpt_path"},
      {"keep_checkpoint_max=0", "recipe.keep_checkpoint_max is 0"},
      {"ckpt_save_interval=0", "recipe.ckpt_save_interval is 0"},
      {"ckpt_save_policy=best", "recipe.ckpt_save_policy is \"best\"; use latest_k, top_k, none"},
      {"ckpt_format=onnx", "recipe.ckpt_format is \"onnx\"; use pyramid, mindspore, safetensors"},
      {"epoch_size=0", "recipe.epoch_size is 0; use 1..100000"},
      {"ema=True", "not supported yet: ema"},
      {"clip_value=0", "recipe.clip_value is 0"},
      {"layer_decay=0.7", "not supported yet: layer_decay"},
      {"gradient_accumulation_steps=0", "recipe.gradient_accumulation_steps is 0"},
      {"keep_global_batch=True", "not supported yet: keep_global_batch"},
      // Optimizer, schedule, loss.
      {"opt=lion", "recipe.opt is lion; not supported yet: opt. Use adamw"},
      {"opt=adamwww", "recipe.opt is \"adamwww\"; use adamw, "},
      {"weight_decay=-1", "recipe.weight_decay is -1; use 0..10"},
      {"weight_decay_filter=some",
       "recipe.weight_decay_filter is \"some\"; use disable, norm_and_bias, auto"},
      {"scheduler=step_decay", "not supported yet: scheduler"},
      {"scheduler=cosine", "recipe.scheduler is \"cosine\"; use constant, cosine_decay"},
      {"lr=-0.1", "recipe.lr is -0.1; use 0..100"},
      {"min_lr=-0.1", "recipe.min_lr is -0.1; use 0..100"},
      {"warmup_epochs=-1", "recipe.warmup_epochs is -1"},
      {"warmup_factor=2", "recipe.warmup_factor is 2; use 0..1"},
      {"decay_epochs=0", "recipe.decay_epochs is 0"},
      {"num_cycles=0", "recipe.num_cycles is 0"},
      {"cycle_decay=2", "recipe.cycle_decay is 2; use 0..1"},
      {"lr_scaling=square", "recipe.lr_scaling is \"square\"; use none, linear"},
      {"lr_scaling=linear", "not supported yet: lr_scaling"},
      {"loss=bce", "not supported yet: loss. Use CE"},
      {"loss=mse", "recipe.loss is \"MSE\"; use CE, BCE"},
      {"label_smoothing=1", "recipe.label_smoothing is 1; use 0..0.999"},
      {"aux_factor=0.4", "not supported yet: aux_factor"},
      {"reduction=sum", "not supported yet: reduction"},
  };
  for (const auto& [override_text, message] : cases) {
    const std::vector<std::string> overrides = {override_text};
    EXPECT_THAT(ParseRecipe("", overrides),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)))
        << override_text;
  }
  const std::vector<std::string> fp16 = {"amp_level=O2", "amp_dtype=fp16"};
  EXPECT_THAT(ParseRecipe("", fp16),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("not supported yet: amp_dtype. Use bf16, or amp_level O0")));
}

TEST(RecipeTest, TextThatIsNoRecipeIsRefused) {
  const auto refused = [](absl::string_view yaml, absl::string_view message) {
    EXPECT_THAT(ParseRecipe(yaml),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(std::string(message))))
        << yaml;
  };
  refused("lr: [1, 2", "recipe: not YAML: ");
  refused("- 1\n- 2\n", "recipe: not a YAML map");
  refused("just text", "recipe: not a YAML map");
  refused("lr: 1\nlr: 2\n", "recipe.lr stands twice");
  refused("[1, 2]: 3", "recipe: a key is not a word");
  refused("{}: 3", "recipe: a key is not a word");
  refused("lr: {a: 1}", "use a number");
  refused("model: {a: 1}", "use a text");
  refused(std::string((1 << 20) + 1, '#'), "recipe: over 1 MiB of YAML");
  refused(std::string(100'000, '['), "recipe: not YAML: ");
  const std::vector<std::string> no_value = {"lr"};
  EXPECT_THAT(ParseRecipe("", no_value),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"lr\" is not key=value")));
  const std::vector<std::string> broken = {"lr=[1"};
  EXPECT_THAT(ParseRecipe("", broken),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not YAML")));
}

TEST(RecipeTest, WhatItWritesItReads) {
  Recipe recipe;
  recipe.mean = {72.94};
  recipe.std = {90.02};
  recipe.in_channels = 1;
  recipe.lr = 1.0 / 3.0;
  recipe.min_lr = 1e-7;
  recipe.seed = (int64_t{1} << 62) + 1;
  recipe.data_dir = "C:\\data # not a comment: \"x\"\n";
  recipe.re_value = "0";
  recipe.owner = "None of your business";
  recipe.num_samples = 1000;
  recipe.drop_path_rate = 0.1;
  const std::string yaml = RecipeToYaml(recipe);
  ASSERT_OK_AND_ASSIGN(const ParsedRecipe parsed, ParseRecipe(yaml));
  EXPECT_EQ(RecipeToYaml(parsed.recipe), yaml);
  EXPECT_EQ(parsed.recipe.lr, recipe.lr);
  EXPECT_EQ(parsed.recipe.seed, recipe.seed);
  EXPECT_EQ(parsed.recipe.data_dir, recipe.data_dir);
  EXPECT_EQ(parsed.recipe.owner, recipe.owner);
}

TEST(RecipeTest, ATextThatReadsNoneSurvivesWritingAndReading) {
  Recipe recipe;
  recipe.data_dir = "None";
  ASSERT_OK_AND_ASSIGN(const ParsedRecipe parsed, ParseRecipe(RecipeToYaml(recipe)));
  EXPECT_EQ(parsed.recipe.data_dir, "None");
}

TEST(RecipeTest, EveryKeyIsListedOnce) {
  std::vector<std::string> names;
  for (const RecipeKey& key : RecipeKeys()) names.push_back(key.name);
  EXPECT_GE(names.size(), 90u);
  EXPECT_EQ(std::set<std::string>(names.begin(), names.end()).size(), names.size());
  for (const RecipeKey& key : RecipeKeys()) {
    EXPECT_THAT(key.type, ::testing::AnyOf("bool", "int", "float", "text", "list"));
    const std::string yaml = absl::StrCat(key.name, ": ", key.default_value);
    EXPECT_OK(ParseRecipe(yaml)) << yaml;
  }
}

TEST(RecipeTest, SchedulesThatSurpriseAreWarnedAbout) {
  const auto warnings = [](const std::string& yaml) {
    auto parsed = ParseRecipe(yaml);
    EXPECT_OK(parsed);
    return parsed.ok() ? parsed->warnings : std::vector<std::string>();
  };
  EXPECT_THAT(
      warnings("epoch_size: 500\nwarmup_epochs: 10\ndecay_epochs: 490\nlr_epoch_stair: True\n"),
      ElementsAre(
          AllOf(HasSubstr("first epoch at learning rate 0"), HasSubstr("warmup_factor: 0.01"))));
  EXPECT_THAT(warnings("epoch_size: 500\nwarmup_epochs: 10\ndecay_epochs: 490\nlr_epoch_stair: "
                       "True\nwarmup_factor: 0.01\n"),
              IsEmpty());
  EXPECT_THAT(
      warnings("epoch_size: 50\nwarmup_epochs: 10\ndecay_epochs: 41\n"),
      ElementsAre(HasSubstr("warmup_epochs + decay_epochs is 51, more than epoch_size 50")));
  EXPECT_THAT(
      warnings("epoch_size: 50\nwarmup_epochs: 10\ndecay_epochs: 41\nscheduler: constant\n"),
      IsEmpty());
  EXPECT_THAT(warnings("epoch_size: 51\nwarmup_epochs: 10\ndecay_epochs: 41\nloss_scale: 1024\n"),
              ElementsAre(HasSubstr("loss scaling serves fp16 only")));
}

TEST(RecipeTest, MindCvsRecipesParseUpToWhatIsNotSupportedYet) {
  for (int b = 0; b <= 4; ++b) {
    const std::string yaml = Config(absl::StrCat("pvt_v2/pvt_v2_b", b, "_ascend.yaml"));
    EXPECT_THAT(ParseRecipe(yaml), StatusIs(absl::StatusCode::kInvalidArgument,
                                            HasSubstr("not supported yet: auto_augment")));
    const std::vector<std::string> without = {"auto_augment=None", "mixup=0", "cutmix=0"};
    ASSERT_OK_AND_ASSIGN(const ParsedRecipe parsed, ParseRecipe(yaml, without));
    const Recipe& r = parsed.recipe;
    EXPECT_EQ(r.model, absl::StrCat("pvt_v2_b", b));
    EXPECT_EQ(r.mode, "G");
    EXPECT_EQ(r.loss, "CE");
    EXPECT_EQ(r.amp_level, "O2");
    EXPECT_EQ(r.num_classes, 1000);
    EXPECT_EQ(r.lr, b >= 3 ? 0.002 : 0.001);
    EXPECT_EQ(r.min_lr, b >= 2 ? 1e-6 : 1e-5);
    EXPECT_EQ(r.lr_epoch_stair, b < 2);
    EXPECT_EQ(r.epoch_size, b >= 2 ? 550 : 500);
    EXPECT_EQ(r.epoch_size, r.warmup_epochs + r.decay_epochs);
    EXPECT_EQ(r.weight_decay_filter, "disable");
    EXPECT_EQ(r.re_value, "random");
    const v1::Preprocessing p = EvalPreprocessingOf(r);
    EXPECT_EQ(p.resize().side(), 248);
    EXPECT_EQ(p.resize().kernel(), "bicubic");
    EXPECT_EQ(p.crop(), 224);
  }
}

TEST(RecipeTest, TheQuickstartsRecipeParsesWithoutAWarning) {
  ASSERT_OK_AND_ASSIGN(const ParsedRecipe parsed, ParseRecipe(Config("fashion_mnist.yaml")));
  EXPECT_THAT(parsed.warnings, IsEmpty());
  EXPECT_EQ(parsed.recipe.workers, 2);
  EXPECT_EQ(parsed.recipe.global_batch(), int64_t{2} * parsed.recipe.batch_size);
  const v1::Preprocessing p = EvalPreprocessingOf(parsed.recipe);
  EXPECT_EQ(p.channels(), 1);
  EXPECT_EQ(p.resize().side(), 64);
  EXPECT_EQ(p.crop(), 64);
  EXPECT_NEAR(p.mean(0), 0.2860, 1e-4);
  EXPECT_NEAR(p.std(0), 0.3530, 1e-4);
}

TEST(RecipeTest, PretrainedAndAPathExcludeEachOther) {
  const std::vector<std::string> both = {"pretrained=True", "ckpt_path=a.ckpt"};
  EXPECT_THAT(ParseRecipe("", both),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("recipe.pretrained is True and ckpt_path")));
  const std::vector<std::string> one = {"pretrained=True", "ckpt_format=mindspore"};
  ASSERT_OK_AND_ASSIGN(const ParsedRecipe parsed, ParseRecipe("", one));
  EXPECT_TRUE(parsed.recipe.pretrained);
  EXPECT_EQ(parsed.recipe.ckpt_format, "mindspore");
}

TEST(RecipeTest, OriginAndNumericsNameTheirCompat) {
  EXPECT_EQ(CompatOf("mindcv", NumericsOf("timm")), "mindcv");
  EXPECT_EQ(CompatOf("official", NumericsOf("official")), "timm");
  EXPECT_EQ(CompatOf("timm", NumericsOf("mindcv")), "timm");
  EXPECT_EQ(CompatOf("pyramid", NumericsOf("mindcv")), "mindcv");
  EXPECT_EQ(CompatOf("pyramid", NumericsOf("timm")), "timm");
}

TEST(RecipeTest, NumericsAndPixelsHaveWords) {
  EXPECT_EQ(DescribeNumerics(NumericsOf("mindcv")), "padding same, GELU tanh, outer eps 1e-07");
  EXPECT_EQ(DescribePreprocessing({}), "none");
  Recipe recipe;
  EXPECT_EQ(DescribePreprocessing(EvalPreprocessingOf(recipe)),
            "resize to 256 (bilinear, antialias pillow), crop 224, EXIF apply");
  recipe.image_pad = 240;
  EXPECT_EQ(DescribePreprocessing(EvalPreprocessingOf(recipe)),
            "pad to 240 with 0, crop 224, EXIF apply");
}

TEST(RecipeTest, CompatDecidesNumericsAndResampling) {
  ASSERT_OK_AND_ASSIGN(ParsedRecipe parsed,
                       ParseRecipe("compat: mindcv\ncrop_pct: 0.9\ninterpolation: bicubic\n"));
  v1::NetworkConfig network = NetworkOf(parsed.recipe, 10);
  EXPECT_EQ(network.numerics().pad_style(), "same");
  EXPECT_EQ(network.numerics().gelu(), "tanh");
  EXPECT_EQ(network.numerics().eps_outer(), 1e-7);
  EXPECT_EQ(network.numerics().eps_block(), 1e-6);
  EXPECT_EQ(network.num_classes(), 10);
  EXPECT_EQ(EvalPreprocessingOf(parsed.recipe).resize().antialias(), "none");
  EXPECT_EQ(EvalPreprocessingOf(parsed.recipe).resize().other_side(), "floor");

  parsed.recipe.compat = "timm";
  parsed.recipe.num_classes = 7;
  network = NetworkOf(parsed.recipe, 10);
  EXPECT_EQ(network.numerics().pad_style(), "torch");
  EXPECT_EQ(network.numerics().gelu(), "erf");
  EXPECT_EQ(network.numerics().eps_outer(), 1e-5);
  EXPECT_EQ(network.num_classes(), 7);
  EXPECT_EQ(EvalPreprocessingOf(parsed.recipe).resize().antialias(), "pillow");
  EXPECT_THAT(EvalPreprocessingOf(parsed.recipe).mean(), ElementsAre(0.485, 0.456, 0.406));
}

}  // namespace
}  // namespace pyramid
