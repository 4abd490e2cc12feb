// Jobs, attempts and events on disk: SQLite, WAL, synchronous=FULL. Every function that changes
// something returns after the change is committed.
//
// Thread-safe; one process at a time (the server locks its data folder). A disk that is full is
// ResourceExhausted, a damaged file DataLoss, anything else Internal. After an error nothing of
// that call is in the file.
#ifndef PYRAMID_SERVER_TRAINING_JOB_STORE_H_
#define PYRAMID_SERVER_TRAINING_JOB_STORE_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "proto/training.pb.h"
#include "proto/worker.pb.h"

struct sqlite3;

namespace pyramid {

// What a worker of an attempt was answered for good.
struct StoredWorker {
  int64_t epoch = 0;
  int rank = 0;
  int64_t sequence = 0;                     // of the newest report with something to keep
  std::optional<v1::FinishRequest> finish;  // once set it stays
};

struct StoredJob {
  v1::Job job;
  std::vector<StoredWorker> workers;  // of the newest attempt
};

struct JobChange {
  const v1::Job* job = nullptr;      // the job and its newest attempt are written
  std::vector<v1::JobEvent> events;  // numbered here
  std::vector<StoredWorker> workers;
  std::optional<int64_t> next_epoch;
};

class JobStore {
 public:
  static constexpr int kVersion = 1;          // of the schema
  static constexpr int kKeptLogLines = 2000;  // per job, the newest

  // Makes the file if there is none.
  //   FailedPrecondition  a newer version wrote it; both are named
  //   DataLoss            it is damaged
  static absl::StatusOr<std::unique_ptr<JobStore>> Open(const std::filesystem::path& file);
  ~JobStore();
  JobStore(const JobStore&) = delete;
  JobStore& operator=(const JobStore&) = delete;

  // All jobs, oldest first. DataLoss: a record can't be read.
  absl::StatusOr<std::vector<StoredJob>> LoadJobs();
  // The epoch that the next attempt gets; starts at 1.
  absl::StatusOr<int64_t> NextEpoch();

  // Looks for a job with this request id. nullopt: there is none.
  //   AlreadyExists  there is, with another hash
  absl::StatusOr<std::optional<std::string>> FindRequest(absl::string_view request_id,
                                                         absl::string_view hash);

  struct Inserted {
    std::string id;
    bool existed = false;
  };
  // One transaction: the request id is looked up and, if new, the job stored under a new id with
  // its first event. AlreadyExists: as for FindRequest.
  absl::StatusOr<Inserted> Insert(v1::Job job, absl::string_view hash);

  // One transaction. NotFound: no such job.
  absl::Status Commit(const JobChange& change);

  // Stored events after `after`, oldest first. Old log lines are gone; numbers keep growing.
  absl::StatusOr<std::vector<v1::JobEvent>> EventsAfter(absl::string_view job_id, int64_t after,
                                                        int limit, bool no_logs);

 private:
  explicit JobStore(sqlite3* database, std::filesystem::path file);
  absl::Status Prepare() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<Inserted> InsertLocked(v1::Job& job, absl::string_view hash)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CommitLocked(const JobChange& change) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<std::optional<std::string>> FindRequestLocked(absl::string_view request_id,
                                                               absl::string_view hash)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  absl::Mutex mutex_;
  sqlite3* const database_ ABSL_PT_GUARDED_BY(mutex_);
  const std::filesystem::path file_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_JOB_STORE_H_
