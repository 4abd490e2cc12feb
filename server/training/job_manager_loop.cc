// The job manager's thread and its start: launching, watching over processes, ending attempts,
// taking over what an earlier server started. Files and processes are touched without the lock.
#include <google/protobuf/util/json_util.h>
#include <pthread.h>

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "proto/base/time.h"
#include "server/training/checkpoints_on_disk.h"
#include "server/training/job.h"
#include "server/training/job_manager.h"
#include "server/training/scheduler.h"
#include "server/training/text.h"

namespace pyramid {
namespace {

constexpr int kTailLines = 20;
// A tick that comes so much too late means that this process (or the machine) was stopped, or the
// clock was set: the workers' silence meanwhile says nothing.
constexpr absl::Duration kLatestTick = absl::Seconds(5);

// Before something that the store refused (a full disk) is tried again.
constexpr absl::Duration kStorePause = absl::Seconds(1);

// The record that a worker writes before it exits. nullopt: none that can be used.
std::optional<v1::FinishRequest> ReadExitRecord(const std::filesystem::path& folder,
                                                const WorkerKey& key) {
  const std::filesystem::path path = WorkerExitPath(folder, key.epoch, key.rank);
  const absl::StatusOr<std::string> text = ReadFile(path, 1 << 20);
  if (!text.ok()) return std::nullopt;
  v1::FinishRequest record;
  google::protobuf::util::JsonParseOptions options;
  options.ignore_unknown_fields = true;
  const auto status = google::protobuf::util::JsonStringToMessage(*text, &record, options);
  if (!status.ok() || record.worker().job_id() != key.job_id ||
      record.worker().epoch() != key.epoch || record.worker().rank() != key.rank) {
    log::Warning("exit_record_unusable", {{"path", path.string()}});
    return std::nullopt;
  }
  return record;
}

v1::FailureClass ClassOfLaunchError(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kPermissionDenied:
      return v1::CONFIG;
    case absl::StatusCode::kResourceExhausted:
      return v1::DISK_FULL;
    default:
      return v1::NODE_LOST;
  }
}

}  // namespace

struct JobManager::SeenEnd {
  ProcessEnd end;
  std::optional<v1::FinishRequest> record;
  std::vector<std::string> last_lines;
};

JobManager::JobManager(Options options, std::unique_ptr<JobStore> store, Launcher& launcher,
                       Metrics& metrics, Clock& clock)
    : options_(std::move(options)),
      store_(std::move(store)),
      launcher_(launcher),
      metrics_(metrics),
      clock_(clock) {}

absl::StatusOr<std::unique_ptr<JobManager>> JobManager::Create(Options options, Launcher& launcher,
                                                               Metrics& metrics, Clock& clock) {
  std::error_code error;
  options.data = std::filesystem::absolute(options.data, error);
  if (error) return ErrnoStatus(error.value(), "can't find", options.data);
  RETURN_IF_ERROR(MakeFolders(options.data / "jobs"));
  ASSIGN_OR_RETURN(std::unique_ptr<JobStore> store, JobStore::Open(options.data / "jobs.sqlite"));
  std::unique_ptr<JobManager> manager(
      new JobManager(std::move(options), std::move(store), launcher, metrics, clock));
  RETURN_IF_ERROR(manager->Restore());
  return manager;
}

void JobManager::Start() {
  {
    absl::MutexLock lock(&mutex_);
    const absl::Time now = clock_.Now();
    for (auto& [id, entry] : jobs_) {
      if (entry.live != nullptr) entry.live->reattach_until = now + options_.reattach_window;
    }
  }
  thread_ = std::thread([this] { Loop(); });
}

JobManager::~JobManager() {
  {
    absl::MutexLock lock(&mutex_);
    stop_ = true;
    wake_ = true;
    closed_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

absl::Status JobManager::Restore() {
  absl::MutexLock lock(&mutex_);
  ASSIGN_OR_RETURN(next_epoch_, store_->NextEpoch());
  ASSIGN_OR_RETURN(std::vector<StoredJob> stored, store_->LoadJobs());
  for (StoredJob& item : stored) {
    Entry& entry = jobs_[item.job.id()];
    entry.job = std::move(item.job);
    entry.job.set_folder(FolderOf(entry.job.id()).string());
    if (entry.job.has_progress()) entry.progress_version = entry.version;
    if (LiveAttemptOf(entry.job) != nullptr) {
      Reattach(entry, item.workers);
      continue;
    }
    for (const StoredWorker& worker : item.workers) {
      if (!worker.finish.has_value()) continue;
      entry.finished.first = worker.epoch;
      entry.finished.second.insert(worker.rank);
    }
  }
  CountJobs();
  return absl::OkStatus();
}

void JobManager::Reattach(Entry& entry, const std::vector<StoredWorker>& stored) {
  const v1::Attempt& attempt = *LiveAttemptOf(entry.job);
  const absl::Time now = clock_.Now();
  auto live = std::make_unique<LiveAttempt>();
  live->epoch = attempt.epoch();
  live->launched = now;
  live->reattach_until = now + options_.reattach_window;
  live->workers.resize(static_cast<size_t>(entry.job.workers()));
  for (const v1::WorkerExit& known : attempt.workers()) {
    if (known.rank() < entry.job.workers()) live->workers[known.rank()].end.pid = known.pid();
  }
  for (const StoredWorker& known : stored) {
    if (known.rank >= entry.job.workers()) continue;
    LiveWorker& worker = live->workers[known.rank];
    worker.last_sequence = known.sequence;
    worker.end.finish = known.finish;
  }
  int gone = 0;
  int unlaunched = 0;
  bool anything_said = false;
  for (int rank = 0; rank < entry.job.workers(); ++rank) {
    LiveWorker& worker = live->workers[rank];
    worker.end.rank = rank;
    const WorkerKey key{entry.job.id(), attempt.epoch(), rank};
    if (absl::StatusOr<int64_t> pid = launcher_.Adopt(key, entry.job.folder()); pid.ok()) {
      worker.end.pid = *pid;
    } else {
      SeenEnd seen = LookAt({.key = key});
      worker.gone = true;
      worker.last_lines = std::move(seen.last_lines);
      if (!worker.end.finish.has_value()) worker.end.finish = std::move(seen.record);
      const bool recorded =
          std::filesystem::exists(WorkerPidPath(entry.job.folder(), attempt.epoch(), rank));
      unlaunched += worker.end.pid == 0 && !recorded ? 1 : 0;
      ++gone;
    }
    if (worker.end.finish.has_value()) {
      worker.finished = now;
      anything_said = true;
    }
  }
  if (unlaunched > 0) {
    live->verdict = EndVerdict{v1::COORDINATOR_RESTART,
                               absl::StrCat("the server ended when ", unlaunched, " of ",
                                            entry.job.workers(), " workers weren't launched yet")};
  } else if (gone == entry.job.workers() && !anything_said) {
    live->verdict =
        EndVerdict{v1::COORDINATOR_RESTART,
                   "the workers ended while the server was away and left no exit record"};
  }
  if (entry.job.state() == v1::STOPPING) {
    const absl::Time terminate = now + options_.limits.stop_grace;
    live->EndBy(terminate, terminate + options_.limits.kill_grace);
  }
  log::Info("attempt_found", {{"job", entry.job.id()},
                              {"epoch", attempt.epoch()},
                              {"running", entry.job.workers() - gone},
                              {"workers", entry.job.workers()}});
  entry.live = std::move(live);
}

void JobManager::Loop() {
  pthread_setname_np(pthread_self(), "job-manager");
  while (true) {
    Tick();
    absl::MutexLock lock(&mutex_);
    const auto awake = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return wake_; };
    clock_.AwaitUntil(mutex_, absl::Condition(&awake), clock_.Now() + options_.tick);
    wake_ = false;
    if (stop_ || dead_) return;
  }
}

bool JobManager::DiesAt(absl::string_view point) {
  if (!options_.dies_at || !options_.dies_at(point)) return false;
  absl::MutexLock lock(&mutex_);
  dead_ = true;
  return true;
}

void JobManager::Tick() {
  std::vector<SeenEnd> ends;
  for (const ProcessEnd& end : launcher_.Poll()) ends.push_back(LookAt(end));

  std::vector<std::pair<WorkerKey, int>> signals;
  std::vector<std::string> over;
  {
    absl::MutexLock lock(&mutex_);
    const absl::Time now = clock_.Now();
    const absl::Duration pause = now - last_tick_;
    const bool paused = last_tick_ != absl::InfinitePast() &&
                        (pause > kLatestTick + options_.tick || pause < absl::ZeroDuration());
    last_tick_ = now;
    if (paused) log::Warning("clock_jumped", {{"by", absl::FormatDuration(pause)}});
    for (SeenEnd& end : ends) Record(std::move(end));
    for (auto& [id, entry] : jobs_) {
      if (entry.live == nullptr) continue;
      if (paused) entry.live->Shift(pause);
      for (const SignalOrder& order : entry.live->Supervise(options_.limits, now)) {
        signals.push_back({{id, entry.live->epoch, order.rank}, order.signal});
      }
      if (entry.live->AllGone() && now >= entry.not_before) over.push_back(id);
    }
  }
  for (const auto& [key, signal] : signals) {
    const absl::Status status = launcher_.Signal(key, signal);
    log::Info("worker_signaled",
              {{"job", key.job_id}, {"rank", key.rank}, {"signal", signal}, {"ok", status.ok()}});
  }
  for (const std::string& id : over) EndAttempt(id);

  std::vector<GangLaunch> gangs;
  {
    absl::MutexLock lock(&mutex_);
    if (!draining_ && !stop_ && !dead_) gangs = PlanLaunches(clock_.Now());
  }
  for (const GangLaunch& gang : gangs) LaunchGang(gang);
}

JobManager::SeenEnd JobManager::LookAt(const ProcessEnd& end) const {
  const std::filesystem::path folder = FolderOf(end.key.job_id);
  return {.end = end,
          .record = ReadExitRecord(folder, end.key),
          .last_lines = LastLines(WorkerLogPath(folder, end.key.epoch, end.key.rank), kTailLines)};
}

void JobManager::Record(SeenEnd seen) {
  const auto found = jobs_.find(seen.end.key.job_id);
  if (found == jobs_.end() || found->second.live == nullptr ||
      found->second.live->epoch != seen.end.key.epoch) {
    return;
  }
  LiveWorker& worker = found->second.live->workers[seen.end.key.rank];
  worker.gone = true;
  worker.end.status_known = seen.end.status_known;
  worker.end.exit_code = seen.end.exit_code;
  worker.end.signal = seen.end.signal;
  worker.last_lines = std::move(seen.last_lines);
  if (!worker.end.finish.has_value() && seen.record.has_value()) {
    worker.end.finish = std::move(seen.record);
    worker.finished = clock_.Now();
  }
}

void JobManager::EndAttempt(const std::string& job_id) {
  std::vector<v1::Checkpoint> on_disk;
  if (options_.find_checkpoints) on_disk = options_.find_checkpoints(FolderOf(job_id));
  std::set<std::string> removed;
  if (const absl::StatusOr<v1::Job> known = Get(job_id); known.ok()) {
    removed = RemovedCheckpoints(*known);
  }

  absl::MutexLock lock(&mutex_);
  Entry& entry = jobs_.find(job_id)->second;
  if (entry.live == nullptr) return;
  const LiveAttempt& live = *entry.live;
  const absl::Time now = clock_.Now();
  const AttemptOutcome outcome = Judge(live.Ends(), live.verdict);
  const NextStep step = AfterAttempt(entry.job, outcome, draining_, options_.first_backoff);

  v1::Job next = entry.job;
  JobChange change;
  v1::Attempt& attempt = *next.mutable_attempts(next.attempts_size() - 1);
  *attempt.mutable_ended() = ToProto(now);
  attempt.set_failure(step.failure);
  attempt.set_cause(CleanLine(step.cause));
  attempt.clear_workers();
  for (const LiveWorker& worker : live.workers) {
    v1::WorkerExit& exit = *attempt.add_workers();
    exit.set_rank(worker.end.rank);
    exit.set_pid(worker.end.pid);
    exit.set_exited(worker.end.status_known);
    exit.set_exit_code(worker.end.exit_code);
    exit.set_signal(worker.end.signal);
    for (const std::string& line : worker.last_lines) exit.add_last_lines(line);
    // What came by exit record only, because the server was away.
    if (worker.end.finish.has_value() && worker.end.rank == 0) {
      if (worker.end.finish->has_progress()) {
        *next.mutable_progress() = worker.end.finish->progress();
      }
      AddCheckpoints(next, worker.end.finish->new_checkpoints(), change);
    }
  }
  DropCheckpoints(next, removed);
  AddCheckpoints(next, {on_disk.begin(), on_disk.end()}, change);
  next.set_state(step.state);
  next.set_reason(CleanLine(step.reason));
  if (IsEnded(step.state)) *next.mutable_ended() = ToProto(now);
  if (absl::Status status = Apply(entry, std::move(next), std::move(change)); !status.ok()) {
    log::Error("attempt_end_not_stored", {{"job", job_id}, {"error", status.message()}});
    entry.not_before = now + kStorePause;
    return;
  }
  entry.finished = {live.epoch, {}};
  for (const LiveWorker& worker : live.workers) {
    if (worker.end.finish.has_value()) entry.finished.second.insert(worker.end.rank);
  }
  entry.not_before = now + step.backoff;
  entry.live.reset();
  metrics_.CountAttemptEnd(step.failure);
  if (step.failure == v1::DISK_FULL) metrics_.CountCheckpointFailure(step.failure);
  log::Info("attempt_ended",
            {{"job", job_id}, {"failure", FailureName(step.failure)}, {"cause", step.cause}});
}

std::map<std::string, DevicePool> JobManager::FreeDevices() const {
  std::map<std::string, std::multiset<std::string>> used;
  for (const auto& [id, entry] : jobs_) {
    if (entry.live == nullptr) continue;
    const v1::Attempt& attempt = entry.job.attempts(entry.job.attempts_size() - 1);
    used[entry.job.device()].insert(attempt.devices().begin(), attempt.devices().end());
  }
  std::map<std::string, DevicePool> pools;
  for (const auto& [kind, count] : options_.devices) {
    DevicePool& pool = pools[kind];
    pool.total = count;
    std::multiset<std::string>& taken = used[kind];
    for (int i = 0; i < count; ++i) {
      const std::string name = kind == "cpu" ? kind : absl::StrCat(kind, ":", i);
      const auto found = taken.find(name);
      if (found != taken.end()) {
        taken.erase(found);
      } else {
        pool.free.push_back(name);
      }
    }
  }
  return pools;
}

std::vector<WaitingJob> JobManager::WaitingJobs() const {
  std::vector<WaitingJob> waiting;
  for (const auto& [id, entry] : jobs_) {
    if (!IsWaiting(entry.job.state())) continue;
    waiting.push_back({.id = id,
                       .priority = entry.job.priority(),
                       .device = entry.job.device(),
                       .workers = entry.job.workers(),
                       .not_before = entry.not_before});
  }
  return waiting;
}

std::vector<GangLaunch> JobManager::PlanLaunches(absl::Time now) {
  std::vector<GangLaunch> gangs;
  Snapshot snapshot{.waiting = WaitingJobs()};
  if (snapshot.waiting.empty()) return gangs;
  snapshot.pools = FreeDevices();
  const LaunchPlan plan = Plan(snapshot, now);
  for (const PlannedLaunch& launch : plan.launches) {
    Entry& entry = jobs_.find(launch.id)->second;
    absl::StatusOr<GangLaunch> gang = BeginAttempt(entry, launch.devices, now);
    if (!gang.ok()) {
      log::Error("launch_not_stored", {{"job", launch.id}, {"error", gang.status().message()}});
      entry.not_before = now + kStorePause;
      break;
    }
    gangs.push_back(*std::move(gang));
  }
  for (const auto& [id, reason] : plan.reasons) {
    Entry& entry = jobs_.find(id)->second;
    std::string text = reason;
    if (entry.job.attempts_size() > 0) {
      absl::StrAppend(
          &text, "; the last attempt: ", entry.job.attempts(entry.job.attempts_size() - 1).cause());
    }
    if (text == entry.job.reason()) continue;
    // Found anew after a restart, so it isn't stored.
    entry.job.set_reason(text);
    entry.reason_version = ++entry.version;
  }
  return gangs;
}

absl::StatusOr<GangLaunch> JobManager::BeginAttempt(Entry& entry,
                                                    const std::vector<std::string>& devices,
                                                    absl::Time now) {
  const bool first = entry.job.attempts_size() == 0;
  v1::Job next = entry.job;
  next.set_state(v1::STARTING);
  next.clear_reason();
  if (first) {
    *next.mutable_started() = ToProto(now);
  } else if (RuleOf(next.attempts(next.attempts_size() - 1).failure()).counted) {
    next.set_restarts(next.restarts() + 1);
  }
  const int64_t epoch = next_epoch_;
  v1::Attempt& attempt = *next.add_attempts();
  attempt.set_epoch(epoch);
  *attempt.mutable_started() = ToProto(now);
  for (const std::string& device : devices) attempt.add_devices(device);
  const v1::Checkpoint* newest = NewestCheckpoint(entry.job);
  if (newest != nullptr) attempt.set_resumed_step(newest->step());
  RETURN_IF_ERROR(Apply(entry, std::move(next), {.next_epoch = epoch + 1}));
  next_epoch_ = epoch + 1;
  if (first) {
    metrics_.ObserveQueueWait(now - FromProto(entry.job.submitted()));
  } else {
    metrics_.CountRestart();
  }

  auto live = std::make_unique<LiveAttempt>();
  live->epoch = epoch;
  live->launching = true;
  live->launched = now;
  live->workers.resize(devices.size());
  const int slots = options_.devices.at(entry.job.device());
  GangLaunch gang{.job_id = entry.job.id(),
                  .epoch = epoch,
                  .folder = entry.job.folder(),
                  .recipe = entry.job.recipe()};
  std::vector<std::string> environment;
  if (options_.worker_environment) environment = options_.worker_environment(gang.job_id, epoch);
  for (size_t rank = 0; rank < devices.size(); ++rank) {
    live->workers[rank].end.rank = static_cast<int>(rank);
    gang.workers.push_back({.key = {gang.job_id, epoch, static_cast<int>(rank)},
                            .world = static_cast<int>(devices.size()),
                            .device = devices[rank],
                            .threads = std::max(1, options_.cores / std::max(1, slots)),
                            .program = options_.worker_program,
                            .server_file = options_.data / "server.json",
                            .folder = gang.folder,
                            .config = gang.folder / "recipe.yaml",
                            .environment = environment});
  }
  entry.live = std::move(live);
  return gang;
}

void JobManager::LaunchGang(const GangLaunch& gang) {
  if (DiesAt("after-commit-before-launch")) return;
  absl::Status status = MakeFolders(AttemptFolder(gang.folder, gang.epoch));
  if (status.ok()) status = WriteFileAtomically(gang.folder / "recipe.yaml", gang.recipe);
  std::vector<int64_t> pids(gang.workers.size(), 0);
  for (size_t rank = 0; status.ok() && rank < gang.workers.size(); ++rank) {
    const absl::StatusOr<int64_t> pid = launcher_.Launch(gang.workers[rank]);
    if (pid.ok()) {
      pids[rank] = *pid;
    } else {
      status = Annotate(pid.status(), absl::StrCat("launching rank ", rank));
    }
    if (rank == 0 && DiesAt("after-first-launch")) return;
  }
  if (DiesAt("after-launch-before-record")) return;

  absl::MutexLock lock(&mutex_);
  Entry& entry = jobs_.find(gang.job_id)->second;
  LiveAttempt& live = *entry.live;
  live.launching = false;
  live.launched = clock_.Now();
  v1::Job next = entry.job;
  v1::Attempt& attempt = *next.mutable_attempts(next.attempts_size() - 1);
  attempt.clear_workers();
  for (size_t rank = 0; rank < pids.size(); ++rank) {
    live.workers[rank].end.pid = pids[rank];
    live.workers[rank].gone = pids[rank] == 0;
    v1::WorkerExit& exit = *attempt.add_workers();
    exit.set_rank(static_cast<int>(rank));
    exit.set_pid(pids[rank]);
  }
  if (!status.ok()) {
    live.verdict = EndVerdict{ClassOfLaunchError(status), std::string(status.message())};
    wake_ = true;
  }
  log::Info("attempt_launched", {{"job", gang.job_id},
                                 {"epoch", gang.epoch},
                                 {"workers", pids.size()},
                                 {"resumed_step", attempt.resumed_step()},
                                 {"ok", status.ok()}});
  // The pid records say the same, so a failure here loses nothing.
  if (absl::Status stored = Apply(entry, std::move(next), {}); !stored.ok()) {
    log::Warning("pids_not_stored", {{"job", gang.job_id}, {"error", stored.message()}});
  }
}

}  // namespace pyramid
