// What people and workers ask of the job manager. The thread is in job_manager_loop.cc.
#include "server/training/job_manager.h"

#include <algorithm>
#include <random>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "proto/base/time.h"
#include "server/training/checkpoints_on_disk.h"
#include "server/training/text.h"

namespace pyramid {
namespace {

constexpr int kListed = 100;  // without a limit
constexpr int kMostListed = 1000;
constexpr int kEventsARead = 256;
constexpr int kLogLinesAReport = 500;

std::string RandomId() {
  std::random_device random;
  return absl::StrFormat("%08x%08x%08x%08x", random(), random(), random(), random());
}

absl::Status NoJob(absl::string_view job_id) {
  return absl::NotFoundError(absl::StrCat("there is no job \"", job_id, "\""));
}

absl::Status Draining() {
  return absl::UnavailableError("the server is stopping; try again when it is back");
}

}  // namespace

absl::StatusOr<v1::JobEvent> JobWatch::Next(absl::Time deadline) {
  return manager_->NextEvent(*this, deadline);
}

std::filesystem::path JobManager::FolderOf(absl::string_view job_id) const {
  return options_.data / "jobs" / std::string(job_id);
}

absl::StatusOr<JobManager::Entry*> JobManager::Find(absl::string_view job_id) {
  const auto found = jobs_.find(std::string(job_id));
  if (found == jobs_.end()) return NoJob(job_id);
  return &found->second;
}

absl::Status JobManager::Apply(Entry& entry, v1::Job next, JobChange change) {
  if (dead_) return absl::UnavailableError("the server was killed");
  const v1::JobState from = entry.job.state();
  const bool moves = next.state() != from;
  if (moves) {
    if (!MayFollow(from, next.state())) {
      return absl::InternalError(absl::StrCat(next.id(), " may not go from ",
                                              v1::JobState_Name(from), " to ",
                                              v1::JobState_Name(next.state())));
    }
    *change.events.emplace_back().mutable_job() = next;
  }
  const absl::Time now = clock_.Now();
  for (v1::JobEvent& event : change.events) *event.mutable_time() = ToProto(now);
  change.job = &next;
  RETURN_IF_ERROR(store_->Commit(change));
  entry.job = std::move(next);
  entry.progress_stored = now;
  ++entry.version;
  if (!moves) return absl::OkStatus();
  log::Info("job_state", {{"job", entry.job.id()},
                          {"from", v1::JobState_Name(from)},
                          {"to", v1::JobState_Name(entry.job.state())},
                          {"reason", entry.job.reason()}});
  CountJobs();
  if (IsEnded(entry.job.state())) metrics_.DropJob(entry.job.id());
  return absl::OkStatus();
}

void JobManager::CountJobs() {
  std::map<v1::JobState, int> counts;
  for (const auto& [id, entry] : jobs_) ++counts[entry.job.state()];
  metrics_.SetJobs(counts);
}

absl::StatusOr<v1::SubmitJobResponse> JobManager::Submit(const v1::SubmitJobRequest& request) {
  ASSIGN_OR_RETURN(const JobSpec spec, ResolveJob(request));
  v1::SubmitJobResponse response;
  for (const std::string& warning : spec.warnings) response.add_warnings(warning);
  if (!request.validate_only()) {
    // A repeated request is answered even if its data folder has gone since.
    ASSIGN_OR_RETURN(const std::optional<std::string> known,
                     store_->FindRequest(request.request_id(), spec.hash));
    if (known.has_value()) {
      response.set_existed(true);
      ASSIGN_OR_RETURN(*response.mutable_job(), Get(*known));
      return response;
    }
  }
  RETURN_IF_ERROR(CheckOnServer(spec, options_.devices));
  v1::Job job = MakeJob(spec, request);

  absl::MutexLock lock(&mutex_);
  if (draining_ || dead_) return Draining();
  const absl::Time now = clock_.Now();
  if (request.validate_only()) {
    const std::string newest = "the newest of all";  // longer than any id: behind all others
    Snapshot snapshot{.pools = FreeDevices(), .waiting = WaitingJobs()};
    snapshot.waiting.push_back({.id = newest,
                                .priority = job.priority(),
                                .device = job.device(),
                                .workers = job.workers()});
    const LaunchPlan plan = Plan(snapshot, now);
    const auto reason = plan.reasons.find(newest);
    job.set_reason(reason == plan.reasons.end() ? "would start at once" : reason->second);
    *response.mutable_job() = std::move(job);
    return response;
  }
  if (job.request_id().empty()) job.set_request_id(RandomId());
  *job.mutable_submitted() = ToProto(now);
  ASSIGN_OR_RETURN(const JobStore::Inserted inserted, store_->Insert(job, spec.hash));
  response.set_existed(inserted.existed);
  Entry& entry = jobs_[inserted.id];
  if (!inserted.existed) {
    job.set_id(inserted.id);
    job.set_folder(FolderOf(inserted.id).string());
    entry.job = std::move(job);
    entry.not_before = absl::InfinitePast();
    log::Info("job_submitted", {{"job", inserted.id},
                                {"name", entry.job.name()},
                                {"workers", entry.job.workers()},
                                {"device", entry.job.device()}});
    CountJobs();
    wake_ = true;
  }
  *response.mutable_job() = entry.job;
  return response;
}

absl::StatusOr<v1::Job> JobManager::Get(absl::string_view job_id) {
  absl::MutexLock lock(&mutex_);
  ASSIGN_OR_RETURN(const Entry* entry, Find(job_id));
  return entry->job;
}

std::vector<v1::Job> JobManager::List(const v1::ListJobsRequest& request) {
  const size_t limit =
      static_cast<size_t>(request.limit() <= 0 ? kListed : std::min(request.limit(), kMostListed));
  absl::MutexLock lock(&mutex_);
  std::vector<v1::Job> jobs;
  for (auto it = jobs_.rbegin(); it != jobs_.rend() && jobs.size() < limit; ++it) {
    const v1::Job& job = it->second.job;
    const bool wanted = request.states().empty() ||
                        std::find(request.states().begin(), request.states().end(), job.state()) !=
                            request.states().end();
    if (wanted) jobs.push_back(job);
  }
  return jobs;
}

absl::StatusOr<std::unique_ptr<JobWatch>> JobManager::Watch(const v1::WatchJobRequest& request) {
  absl::MutexLock lock(&mutex_);
  RETURN_IF_ERROR(Find(request.job_id()).status());
  if (request.after_event() < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("after_event is ", request.after_event(), "; use 0 or an event's number"));
  }
  return std::unique_ptr<JobWatch>(new JobWatch(*this, request));
}

absl::StatusOr<v1::JobEvent> JobManager::NextEvent(JobWatch& watch, absl::Time deadline) {
  while (true) {
    if (!watch.buffer_.empty()) {
      v1::JobEvent event = std::move(watch.buffer_.front());
      watch.buffer_.pop_front();
      watch.cursor_ = event.number();
      if (event.has_job()) event.mutable_job()->set_folder(FolderOf(event.job().id()).string());
      return event;
    }
    int64_t version = 0;
    {
      absl::MutexLock lock(&mutex_);
      ASSIGN_OR_RETURN(const Entry* entry, Find(watch.request_.job_id()));
      version = entry->version;
    }
    // Read after `version`: whatever is committed later changes it.
    ASSIGN_OR_RETURN(std::vector<v1::JobEvent> stored,
                     store_->EventsAfter(watch.request_.job_id(), watch.cursor_, kEventsARead,
                                         watch.request_.no_logs()));
    if (!stored.empty()) {
      watch.buffer_.assign(std::make_move_iterator(stored.begin()),
                           std::make_move_iterator(stored.end()));
      continue;
    }
    absl::MutexLock lock(&mutex_);
    ASSIGN_OR_RETURN(const Entry* entry, Find(watch.request_.job_id()));
    if (entry->version != version) continue;
    if (IsEnded(entry->job.state())) return absl::OutOfRangeError("the job has ended");
    v1::JobEvent event;
    event.set_number(watch.cursor_);
    *event.mutable_time() = ToProto(clock_.Now());
    if (entry->reason_version > watch.seen_reason_) {
      watch.seen_reason_ = entry->reason_version;
      *event.mutable_job() = entry->job;
      return event;
    }
    if (entry->progress_version > watch.seen_progress_) {
      watch.seen_progress_ = entry->progress_version;
      *event.mutable_progress() = entry->job.progress();
      return event;
    }
    if (watch.request_.history_only()) return absl::OutOfRangeError("that is all so far");
    if (closed_ || dead_) return Draining();
    const auto changed = [this, entry, version]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return entry->version != version || closed_ || dead_;
    };
    if (!clock_.AwaitUntil(mutex_, absl::Condition(&changed), deadline)) {
      return absl::DeadlineExceededError("no news");
    }
  }
}

absl::StatusOr<v1::Job> JobManager::Cancel(const v1::CancelJobRequest& request) {
  absl::MutexLock lock(&mutex_);
  ASSIGN_OR_RETURN(Entry * entry, Find(request.job_id()));
  const v1::JobState state = entry->job.state();
  if (IsEnded(state)) {
    return absl::FailedPreconditionError(
        absl::StrCat(request.job_id(), " has ended: ", v1::JobState_Name(state)));
  }
  if (state == v1::STOPPING) return entry->job;
  const absl::Time now = clock_.Now();
  v1::Job next = entry->job;
  next.set_reason(request.reason().empty() ? "canceled"
                                           : absl::StrCat("canceled: ", request.reason()));
  if (IsWaiting(state)) {
    next.set_state(v1::CANCELED);
    *next.mutable_ended() = ToProto(now);
  } else {
    next.set_state(v1::STOPPING);
    next.set_stop_target(v1::CANCELED);
  }
  RETURN_IF_ERROR(Apply(*entry, std::move(next), {}));
  if (entry->live != nullptr) {
    const absl::Time terminate = now + options_.limits.stop_grace;
    entry->live->EndBy(terminate, terminate + options_.limits.kill_grace);
  }
  wake_ = true;
  return entry->job;
}

absl::StatusOr<v1::Job> JobManager::Save(absl::string_view job_id) {
  absl::MutexLock lock(&mutex_);
  ASSIGN_OR_RETURN(Entry * entry, Find(job_id));
  if (entry->job.state() != v1::RUNNING || entry->live == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(
        job_id, " is ", v1::JobState_Name(entry->job.state()), "; only a running job can save"));
  }
  // Two wishes before a save are one save.
  entry->live->saves_wanted = entry->live->saves_done + 1;
  return entry->job;
}

absl::StatusOr<std::filesystem::path> JobManager::CheckpointFolder(
    absl::string_view job_id, absl::string_view checkpoint_id) {
  v1::Checkpoint chosen;
  {
    absl::MutexLock lock(&mutex_);
    ASSIGN_OR_RETURN(const Entry* entry, Find(job_id));
    const v1::Checkpoint* newest = NewestCheckpoint(entry->job);
    if (newest == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(
          job_id, " (", v1::JobState_Name(entry->job.state()), ") has no checkpoint yet"));
    }
    chosen = *newest;
    if (!checkpoint_id.empty()) {
      const auto& all = entry->job.checkpoints();
      const auto found = std::find_if(
          all.begin(), all.end(), [&](const v1::Checkpoint& c) { return c.id() == checkpoint_id; });
      if (found == all.end()) {
        return absl::NotFoundError(absl::StrCat(job_id, " has no checkpoint \"", checkpoint_id,
                                                "\"; the newest is ", newest->id()));
      }
      chosen = *found;
    }
  }
  std::error_code error;
  if (!std::filesystem::is_directory(chosen.path(), error)) {
    return absl::NotFoundError(absl::StrCat("checkpoint ", chosen.id(), " of ", job_id,
                                            " isn't at ", chosen.path(),
                                            " any more; the oldest ones are removed, see "
                                            "recipe.keep_checkpoint_max"));
  }
  return std::filesystem::path(chosen.path());
}

absl::StatusOr<std::pair<JobManager::Entry*, LiveWorker*>> JobManager::FindWorker(
    const v1::WorkerId& id) {
  if (dead_) return absl::UnavailableError("the server was killed");
  const auto found = jobs_.find(id.job_id());
  if (found == jobs_.end()) {
    return absl::FailedPreconditionError(
        absl::StrCat("there is no job \"", id.job_id(), "\" here; the worker must exit"));
  }
  Entry& entry = found->second;
  if (entry.live == nullptr || entry.live->epoch != id.epoch()) {
    return absl::FailedPreconditionError(
        absl::StrCat("attempt ", id.epoch(), " of ", id.job_id(), " isn't live",
                     entry.live == nullptr ? "" : absl::StrCat(", ", entry.live->epoch, " is"),
                     "; the worker must exit"));
  }
  if (id.rank() < 0 || id.rank() >= static_cast<int>(entry.live->workers.size())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rank is ", id.rank(), "; ", id.job_id(), " has ", entry.live->workers.size(), " workers"));
  }
  return std::pair<Entry*, LiveWorker*>(&entry, &entry.live->workers[id.rank()]);
}

v1::Directive JobManager::DirectiveFor(const Entry& entry) const {
  const bool stop =
      draining_ || entry.job.state() == v1::STOPPING || entry.live->terminate_at <= clock_.Now();
  if (stop) return v1::STOP;
  return entry.live->saves_wanted > entry.live->saves_done ? v1::SAVE : v1::GO_ON;
}

absl::StatusOr<v1::RegisterResponse> JobManager::Register(const v1::RegisterRequest& request) {
  absl::MutexLock lock(&mutex_);
  ASSIGN_OR_RETURN(const auto found, FindWorker(request.worker()));
  auto [entry, worker] = found;
  worker->heard = true;
  worker->last_heard = clock_.Now();
  if (entry->job.state() == v1::STARTING && entry->live->AllHeard()) {
    v1::Job next = entry->job;
    next.set_state(v1::RUNNING);
    next.clear_reason();
    RETURN_IF_ERROR(Apply(*entry, std::move(next), {}));
  }
  v1::RegisterResponse response;
  response.set_directive(DirectiveFor(*entry));
  return response;
}

void JobManager::SetProgress(Entry& entry, v1::Job& next, const v1::Progress& progress) {
  const int64_t images_before = next.progress().images();
  *next.mutable_progress() = progress;
  if (!progress.has_time()) *next.mutable_progress()->mutable_time() = ToProto(clock_.Now());
  metrics_.ObserveProgress(entry.job.id(), progress, images_before);
}

void JobManager::AddCheckpoints(
    v1::Job& job, const google::protobuf::RepeatedPtrField<v1::Checkpoint>& checkpoints,
    JobChange& change) {
  for (const v1::Checkpoint& checkpoint : checkpoints) {
    const auto known =
        std::find_if(job.mutable_checkpoints()->begin(), job.mutable_checkpoints()->end(),
                     [&](const v1::Checkpoint& other) { return other.id() == checkpoint.id(); });
    if (known != job.mutable_checkpoints()->end()) {
      if (known->digest() == checkpoint.digest()) continue;
      *known = checkpoint;
    } else {
      *job.add_checkpoints() = checkpoint;
    }
    *change.events.emplace_back().mutable_checkpoint() = checkpoint;
    if (checkpoint.write_seconds() > 0) {
      metrics_.ObserveCheckpoint(absl::Seconds(checkpoint.write_seconds()), checkpoint.bytes());
    }
  }
  std::stable_sort(
      job.mutable_checkpoints()->begin(), job.mutable_checkpoints()->end(),
      [](const v1::Checkpoint& a, const v1::Checkpoint& b) { return a.step() < b.step(); });
}

absl::StatusOr<v1::ReportResponse> JobManager::Report(const v1::ReportRequest& request) {
  // The worker removes old checkpoints when it writes new ones; looked up without the lock.
  std::set<std::string> removed;
  if (request.new_checkpoints_size() > 0) {
    if (const absl::StatusOr<v1::Job> known = Get(request.worker().job_id()); known.ok()) {
      removed = RemovedCheckpoints(*known);
    }
  }
  const bool rank0 = request.worker().rank() == 0;

  absl::MutexLock lock(&mutex_);
  ASSIGN_OR_RETURN(const auto found, FindWorker(request.worker()));
  auto [entry, worker] = found;
  const absl::Time now = clock_.Now();
  worker->heard = true;
  worker->reports = true;
  worker->last_heard = now;
  if (rank0) entry->live->saves_done = std::max(entry->live->saves_done, request.saves_done());
  v1::ReportResponse response;
  response.set_directive(DirectiveFor(*entry));
  if (request.sequence() <= worker->last_sequence) return response;

  v1::Job next = entry->job;
  JobChange change;
  if (request.has_progress()) {
    worker->last_step = request.progress().step();
    if (rank0) SetProgress(*entry, next, request.progress());
  }
  DropCheckpoints(next, removed);
  AddCheckpoints(next, request.new_checkpoints(), change);
  const int lines = std::min(request.log_lines_size(), kLogLinesAReport);
  for (int i = request.log_lines_size() - lines; i < request.log_lines_size(); ++i) {
    v1::LogLine& line = *change.events.emplace_back().mutable_log();
    line.set_rank(request.worker().rank());
    line.set_attempt_epoch(request.worker().epoch());
    line.set_text(CleanLine(request.log_lines(i)));
  }
  if (next.state() == v1::STARTING && entry->live->AllHeard()) {
    next.set_state(v1::RUNNING);
    next.clear_reason();
  }
  const v1::Progress progress = next.progress();
  const bool keep = !change.events.empty() || next.state() != entry->job.state() ||
                    (rank0 && request.has_progress() &&
                     now - entry->progress_stored >= options_.progress_interval);
  if (keep) {
    change.workers.push_back({.epoch = request.worker().epoch(),
                              .rank = request.worker().rank(),
                              .sequence = request.sequence()});
    if (absl::Status status = Apply(*entry, std::move(next), std::move(change)); !status.ok()) {
      // The worker sends its checkpoints again; log lines aren't worth stopping a training for.
      if (request.new_checkpoints_size() > 0) return status;
      log::Warning("report_not_stored", {{"job", entry->job.id()}, {"error", status.message()}});
    }
  }
  worker->last_sequence = request.sequence();
  if (rank0 && request.has_progress()) {
    *entry->job.mutable_progress() = progress;
    entry->progress_version = ++entry->version;
  }
  return response;
}

absl::StatusOr<v1::FinishResponse> JobManager::Finish(const v1::FinishRequest& request) {
  std::set<std::string> removed;
  if (request.new_checkpoints_size() > 0) {
    if (const absl::StatusOr<v1::Job> known = Get(request.worker().job_id()); known.ok()) {
      removed = RemovedCheckpoints(*known);
    }
  }
  absl::MutexLock lock(&mutex_);
  if (const auto ended = jobs_.find(request.worker().job_id()); ended != jobs_.end()) {
    const auto& [epoch, ranks] = ended->second.finished;
    if (epoch == request.worker().epoch() && ranks.count(request.worker().rank()) > 0) {
      return v1::FinishResponse();
    }
  }
  ASSIGN_OR_RETURN(const auto found, FindWorker(request.worker()));
  auto [entry, worker] = found;
  worker->last_heard = clock_.Now();
  if (worker->end.finish.has_value()) return v1::FinishResponse();
  v1::Job next = entry->job;
  JobChange change;
  if (request.has_progress() && request.worker().rank() == 0) {
    SetProgress(*entry, next, request.progress());
  }
  DropCheckpoints(next, removed);
  AddCheckpoints(next, request.new_checkpoints(), change);
  change.workers.push_back({.epoch = request.worker().epoch(),
                            .rank = request.worker().rank(),
                            .sequence = worker->last_sequence,
                            .finish = request});
  RETURN_IF_ERROR(Apply(*entry, std::move(next), std::move(change)));
  worker->end.finish = request;
  worker->finished = clock_.Now();
  if (request.has_progress() && request.worker().rank() == 0) {
    entry->progress_version = entry->version;
  }
  wake_ = true;
  return v1::FinishResponse();
}

void JobManager::Drain(absl::Duration timeout) {
  absl::MutexLock lock(&mutex_);
  const absl::Time now = clock_.Now();
  draining_ = true;
  wake_ = true;
  for (auto& [id, entry] : jobs_) {
    if (entry.live != nullptr) entry.live->EndBy(now + timeout / 2, now + timeout);
  }
  const auto idle = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return dead_ || std::none_of(jobs_.begin(), jobs_.end(),
                                 [](const auto& job) { return job.second.live != nullptr; });
  };
  // A killed process takes a moment to be seen.
  if (!clock_.AwaitUntil(mutex_, absl::Condition(&idle),
                         now + timeout + options_.limits.kill_grace)) {
    log::Warning("workers_left", {{"after", absl::FormatDuration(timeout)}});
  }
  closed_ = true;
}

}  // namespace pyramid
