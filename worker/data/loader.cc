#include "worker/data/loader.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <opencv2/core.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "worker/data/order.h"
#include "worker/data/random.h"

namespace pyramid {

Loader::Loader(Planner planner, Filler filler, int threads, int queue)
    : planner_(std::move(planner)), filler_(std::move(filler)), slots_(std::max(2, queue)) {
  cv::setNumThreads(1);  // one thread a picture: the loader has its own
  for (int i = 0; i < std::max(1, threads); ++i) {
    threads_.emplace_back([this] {
      pthread_setname_np(pthread_self(), "loader");
      Work();
    });
  }
}

Loader::~Loader() {
  {
    absl::MutexLock lock(&mutex_);
    ended_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
}

bool Loader::MayPlan() const {
  return ended_ || slots_[planned_ % static_cast<int64_t>(slots_.size())].state == SlotState::kFree;
}

bool Loader::NextIsReady() const {
  return slots_[taken_ % static_cast<int64_t>(slots_.size())].state == SlotState::kReady;
}

void Loader::Work() {
  absl::MutexLock lock(&mutex_);
  while (true) {
    mutex_.Await(absl::Condition(this, &Loader::MayPlan));
    if (ended_) return;
    Slot& slot = slots_[planned_++ % static_cast<int64_t>(slots_.size())];
    std::optional<BatchPlan> plan = planner_();
    if (!plan.has_value()) {
      slot.end = true;
      slot.state = SlotState::kReady;
      ended_ = true;
      return;
    }
    slot.state = SlotState::kFilling;
    slot.batch.plan = *std::move(plan);
    mutex_.Unlock();
    // This thread alone has the slot while it is filled.
    const absl::Status status = filler_(slot.batch.plan, slot.batch);
    mutex_.Lock();
    slot.status = status;
    slot.state = SlotState::kReady;
    if (!status.ok()) ended_ = true;
  }
}

absl::StatusOr<const Batch*> Loader::Take() {
  absl::MutexLock lock(&mutex_);
  const int64_t size = static_cast<int64_t>(slots_.size());
  if (std::exchange(holding_, false)) slots_[(taken_ - 1) % size].state = SlotState::kFree;
  if (!NextIsReady()) {
    const absl::Time before = absl::Now();
    mutex_.Await(absl::Condition(this, &Loader::NextIsReady));
    waited_seconds_ += absl::ToDoubleSeconds(absl::Now() - before);
  }
  Slot& slot = slots_[taken_ % size];
  if (slot.end) return nullptr;  // stays so
  RETURN_IF_ERROR(slot.status);
  ++taken_;
  holding_ = true;
  return &slot.batch;
}

absl::Status BadPictures::Count(int64_t index, const absl::Status& why) {
  absl::MutexLock lock(&mutex_);
  if (std::find(seen_.begin(), seen_.end(), index) != seen_.end()) return absl::OkStatus();
  seen_.push_back(index);
  log::Warning("bad_picture", {{"count", seen_.size()}, {"limit", limit_}, {"why", why.message()}});
  if (static_cast<int64_t>(seen_.size()) <= limit_) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat(seen_.size(), " pictures can't be decoded, more than 0.1 % of the data (",
                   limit_, "); the last: ", why.message()));
}

int64_t BadPictures::count() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(seen_.size());
}

namespace {

// Walks through epochs, steps and micro-batches; one rank's part of each.
class TrainPlanner {
 public:
  TrainPlanner(const TrainLoaderOptions& options, int64_t pictures)
      : recipe_(options.recipe), rank_(options.rank), world_(options.world) {
    order_ = {.seed = static_cast<uint64_t>(recipe_.seed),
              .pictures = pictures,
              .num_samples = recipe_.num_samples,
              .shuffle = recipe_.shuffle};
    used_ = recipe_.num_samples > 0 ? std::min(recipe_.num_samples, pictures) : pictures;
    global_batch_ = int64_t{recipe_.batch_size} * world_ * recipe_.gradient_accumulation_steps;
    steps_per_epoch_ = StepsPerEpoch(used_, global_batch_, recipe_.drop_remainder);
    step_ = options.first_step;
  }

  std::optional<BatchPlan> operator()() {
    if (steps_per_epoch_ == 0) return std::nullopt;
    const int64_t epoch = step_ / steps_per_epoch_;
    if (epoch >= recipe_.epoch_size) return std::nullopt;
    if (epoch != indices_epoch_) {
      indices_ = EpochOrder(order_, epoch);
      indices_epoch_ = epoch;
    }
    const int64_t begin = step_ % steps_per_epoch_ * global_batch_;
    const int64_t count = std::min(global_batch_, used_ - begin);
    const IndexRange mine = PartOf(count, rank_, world_);
    BatchPlan plan;
    plan.epoch = epoch;
    plan.step_pictures = count;
    plan.weightless = mine.size() == 0;
    plan.first_in_batch = plan.weightless ? 0 : mine.begin + micro_ * recipe_.batch_size;
    const int64_t end =
        plan.weightless ? 1 : std::min(mine.end, plan.first_in_batch + recipe_.batch_size);
    plan.first_position = begin + plan.first_in_batch;
    plan.indices.assign(indices_.begin() + plan.first_position, indices_.begin() + begin + end);
    plan.last_of_step = plan.weightless || end == mine.end;
    micro_ = plan.last_of_step ? 0 : micro_ + 1;
    if (plan.last_of_step) ++step_;
    return plan;
  }

 private:
  Recipe recipe_;
  int rank_;
  int world_;
  OrderOptions order_;
  int64_t used_;
  int64_t global_batch_;
  int64_t steps_per_epoch_;
  int64_t step_;
  int64_t micro_ = 0;
  std::vector<int64_t> indices_;
  int64_t indices_epoch_ = -1;
};

// The picture at `index`, or a seeded other one where it can't be decoded; `index` becomes the one
// read.
absl::StatusOr<RgbImage> ReadOrSubstitute(const Dataset& dataset, const Recipe& recipe,
                                          int64_t epoch, int64_t position, BadPictures& bad,
                                          int64_t& index) {
  CounterRandom random(RandomStream::kSubstitute, recipe.seed, epoch, position);
  while (true) {
    absl::StatusOr<RgbImage> image = dataset.Read(index, recipe.in_channels, /*apply_exif=*/true);
    if (image.ok()) return image;
    RETURN_IF_ERROR(bad.Count(index, image.status()));
    index = random.Below(dataset.size());
  }
}

}  // namespace

std::unique_ptr<Loader> MakeTrainLoader(const Dataset& dataset, const TrainLoaderOptions& options,
                                        BadPictures& bad) {
  auto planner = std::make_shared<TrainPlanner>(options, dataset.size());
  auto augmenter = std::make_shared<Augmenter>(options.recipe);
  const Recipe& recipe = options.recipe;
  const int64_t floats = int64_t{recipe.in_channels} * recipe.image_resize * recipe.image_resize;
  auto fill = [&dataset, &bad, augmenter, floats, recipe](const BatchPlan& plan,
                                                          Batch& batch) -> absl::Status {
    batch.count = static_cast<int64_t>(plan.indices.size());
    batch.pixels.resize(batch.count * floats);
    batch.labels.resize(batch.count);
    batch.pictures.resize(batch.count);
    for (int64_t i = 0; i < batch.count; ++i) {
      const int64_t position = plan.first_position + i;
      int64_t index = plan.indices[i];
      ASSIGN_OR_RETURN(const RgbImage image,
                       ReadOrSubstitute(dataset, recipe, plan.epoch, position, bad, index));
      batch.labels[i] = dataset.label(index);
      batch.pictures[i] = index;
      const absl::Status status =
          augmenter->Apply(image, plan.epoch, position, &batch.pixels[i * floats]);
      if (!status.ok()) return Annotate(status, dataset.NameOf(index));
    }
    return absl::OkStatus();
  };
  return std::make_unique<Loader>([planner] { return (*planner)(); }, std::move(fill),
                                  options.threads, options.threads + 2);
}

std::unique_ptr<Loader> MakeEvalLoader(const Dataset& dataset, const EvalLoaderOptions& options,
                                       BadPictures& bad) {
  auto plan_next = [options, next = options.begin]() mutable -> std::optional<BatchPlan> {
    if (next >= options.end) return std::nullopt;
    BatchPlan plan;
    plan.first_position = next;
    for (; next < options.end && static_cast<int>(plan.indices.size()) < options.batch; ++next)
      plan.indices.push_back(next);
    return plan;
  };
  auto fill = [&dataset, &bad, options](const BatchPlan& plan, Batch& batch) -> absl::Status {
    const v1::Preprocessing& p = options.preprocessing;
    const int64_t floats = int64_t{p.channels()} * p.crop() * p.crop();
    batch.pixels.resize(plan.indices.size() * floats);
    batch.labels.clear();
    batch.pictures.clear();
    for (const int64_t index : plan.indices) {
      absl::StatusOr<RgbImage> image = dataset.Read(index, p.channels(), p.exif() == "apply");
      if (!image.ok()) {
        RETURN_IF_ERROR(bad.Count(index, image.status()));
        continue;
      }
      absl::StatusOr<RgbImage> cropped = ResizeAndCrop(*image, p);
      if (!cropped.ok()) return Annotate(cropped.status(), dataset.NameOf(index));
      Normalise(*cropped, p, &batch.pixels[batch.labels.size() * floats]);
      batch.labels.push_back(dataset.label(index));
      batch.pictures.push_back(index);
    }
    batch.count = static_cast<int64_t>(batch.labels.size());
    batch.pixels.resize(batch.count * floats);
    return absl::OkStatus();
  };
  return std::make_unique<Loader>(std::move(plan_next), std::move(fill), options.threads,
                                  options.threads + 2);
}

int LoaderThreads(const Recipe& recipe, int local_world) {
  cpu_set_t set;
  const int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  return std::clamp(cores / std::max(1, local_world), 1, recipe.num_parallel_workers);
}

}  // namespace pyramid
