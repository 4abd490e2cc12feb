#include "server/training/job_store.h"

#include <sqlite3.h>

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr char kSchema[] = R"sql(
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('next_epoch', 1), ('next_job', 1);
CREATE TABLE jobs (
  number INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  request_id TEXT UNIQUE,            -- NULL: the client chose none
  spec_hash TEXT NOT NULL,
  state INTEGER NOT NULL,
  last_event INTEGER NOT NULL,
  payload BLOB NOT NULL              -- pyramid.v1.Job without attempts
);
CREATE TABLE attempts (
  job_id TEXT NOT NULL REFERENCES jobs(id),
  epoch INTEGER NOT NULL UNIQUE,
  payload BLOB NOT NULL,             -- pyramid.v1.Attempt
  PRIMARY KEY (job_id, epoch)
) WITHOUT ROWID;
CREATE TABLE workers (
  job_id TEXT NOT NULL,
  epoch INTEGER NOT NULL,
  rank INTEGER NOT NULL,
  sequence INTEGER NOT NULL,
  finish BLOB,                       -- pyramid.v1.FinishRequest
  PRIMARY KEY (job_id, epoch, rank),
  FOREIGN KEY (job_id, epoch) REFERENCES attempts(job_id, epoch)
) WITHOUT ROWID;
CREATE TABLE events (
  job_id TEXT NOT NULL REFERENCES jobs(id),
  number INTEGER NOT NULL,
  time INTEGER NOT NULL,             -- seconds since 1970
  log INTEGER NOT NULL,              -- 1: a line of a worker's log
  payload BLOB NOT NULL,             -- pyramid.v1.JobEvent
  PRIMARY KEY (job_id, number)
) WITHOUT ROWID;
CREATE INDEX log_events ON events(job_id, number) WHERE log = 1;
PRAGMA user_version = 1;
)sql";

absl::Status ErrorOf(sqlite3* database, const std::filesystem::path& file) {
  const std::string message =
      absl::StrCat("job store ", file.string(), ": ", sqlite3_errmsg(database));
  switch (sqlite3_errcode(database) & 0xff) {
    case SQLITE_FULL:
      return absl::ResourceExhaustedError(message);
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
      return absl::DataLossError(message);
    case SQLITE_CANTOPEN:
    case SQLITE_READONLY:
    case SQLITE_PERM:
      return absl::PermissionDeniedError(message);
    case SQLITE_BUSY:
      return absl::UnavailableError(message);
    default:
      return absl::InternalError(message);
  }
}

// A prepared statement with its bound values. Errors are remembered and come out of Step.
class Statement {
 public:
  Statement(sqlite3* database, const std::filesystem::path& file, const char* sql)
      : database_(database), file_(file) {
    code_ = sqlite3_prepare_v2(database, sql, -1, &statement_, nullptr);
  }
  ~Statement() { sqlite3_finalize(statement_); }
  Statement(const Statement&) = delete;
  Statement& operator=(const Statement&) = delete;

  Statement& Bind(int64_t value) {
    if (code_ == SQLITE_OK) code_ = sqlite3_bind_int64(statement_, ++bound_, value);
    return *this;
  }
  Statement& BindText(absl::string_view text) {
    if (code_ == SQLITE_OK) {
      code_ = sqlite3_bind_text(statement_, ++bound_, text.data(), static_cast<int>(text.size()),
                                SQLITE_TRANSIENT);
    }
    return *this;
  }
  Statement& BindNull() {
    if (code_ == SQLITE_OK) code_ = sqlite3_bind_null(statement_, ++bound_);
    return *this;
  }
  Statement& BindMessage(const google::protobuf::MessageLite& message) {
    const std::string bytes = message.SerializeAsString();
    if (code_ == SQLITE_OK) {
      // An empty message is an empty blob, not NULL.
      code_ = sqlite3_bind_blob(statement_, ++bound_, bytes.empty() ? "" : bytes.data(),
                                static_cast<int>(bytes.size()), SQLITE_TRANSIENT);
    }
    return *this;
  }

  // True: there is a row.
  absl::StatusOr<bool> Step() {
    if (code_ == SQLITE_OK) code_ = sqlite3_step(statement_);
    if (code_ == SQLITE_ROW) {
      code_ = SQLITE_OK;
      return true;
    }
    if (code_ == SQLITE_DONE) return false;
    return ErrorOf(database_, file_);
  }
  absl::Status Run() {
    ASSIGN_OR_RETURN(const bool row, Step());
    (void)row;
    return absl::OkStatus();
  }

  int64_t Int(int column) { return sqlite3_column_int64(statement_, column); }
  bool IsNull(int column) { return sqlite3_column_type(statement_, column) == SQLITE_NULL; }
  std::string Text(int column) {
    const unsigned char* text = sqlite3_column_text(statement_, column);
    return text == nullptr ? "" : reinterpret_cast<const char*>(text);
  }
  absl::Status Message(int column, google::protobuf::MessageLite& message) {
    const void* bytes = sqlite3_column_blob(statement_, column);
    const int size = sqlite3_column_bytes(statement_, column);
    if (message.ParseFromArray(bytes, size)) return absl::OkStatus();
    return absl::DataLossError(absl::StrCat("job store ", file_.string(), ": a ",
                                            message.GetTypeName(), " of ", size,
                                            " bytes can't be read"));
  }

 private:
  sqlite3* database_;
  const std::filesystem::path& file_;
  sqlite3_stmt* statement_ = nullptr;
  int code_ = SQLITE_OK;
  int bound_ = 0;
};

absl::Status Execute(sqlite3* database, const std::filesystem::path& file, const char* sql) {
  if (sqlite3_exec(database, sql, nullptr, nullptr, nullptr) == SQLITE_OK) return absl::OkStatus();
  return ErrorOf(database, file);
}

// Rolls back unless committed.
class Transaction {
 public:
  Transaction(sqlite3* database, const std::filesystem::path& file)
      : database_(database), file_(file) {}
  ~Transaction() {
    // SQLite may have rolled back by itself (disk full).
    if (open_ && sqlite3_get_autocommit(database_) == 0) {
      sqlite3_exec(database_, "ROLLBACK", nullptr, nullptr, nullptr);
    }
  }
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;

  absl::Status Begin() {
    RETURN_IF_ERROR(Execute(database_, file_, "BEGIN IMMEDIATE"));
    open_ = true;
    return absl::OkStatus();
  }
  absl::Status Commit() {
    RETURN_IF_ERROR(Execute(database_, file_, "COMMIT"));
    open_ = false;
    return absl::OkStatus();
  }

 private:
  sqlite3* database_;
  const std::filesystem::path& file_;
  bool open_ = false;
};

absl::StatusOr<int64_t> OneInt(sqlite3* database, const std::filesystem::path& file,
                               const char* sql) {
  Statement statement(database, file, sql);
  ASSIGN_OR_RETURN(const bool row, statement.Step());
  if (!row) {
    return absl::DataLossError(absl::StrCat("job store ", file.string(), ": no row for ", sql));
  }
  return statement.Int(0);
}

absl::Status WriteEvent(sqlite3* database, const std::filesystem::path& file,
                        const std::string& job_id, const v1::JobEvent& event) {
  return Statement(database, file, "INSERT INTO events VALUES (?, ?, ?, ?, ?)")
      .BindText(job_id)
      .Bind(event.number())
      .Bind(event.time().seconds())
      .Bind(event.has_log() ? 1 : 0)
      .BindMessage(event)
      .Run();
}

}  // namespace

JobStore::JobStore(sqlite3* database, std::filesystem::path file)
    : database_(database), file_(std::move(file)) {}

JobStore::~JobStore() {
  absl::MutexLock lock(&mutex_);
  sqlite3_close(database_);
}

absl::StatusOr<std::unique_ptr<JobStore>> JobStore::Open(const std::filesystem::path& file) {
  sqlite3* database = nullptr;
  // Our own mutex serialises calls.
  const int code =
      sqlite3_open_v2(file.c_str(), &database,
                      SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX, nullptr);
  if (code != SQLITE_OK) {
    const absl::Status status = database == nullptr
                                    ? absl::InternalError("job store: out of memory")
                                    : ErrorOf(database, file);
    sqlite3_close(database);
    return status;
  }
  std::unique_ptr<JobStore> store(new JobStore(database, file));
  absl::MutexLock lock(&store->mutex_);
  RETURN_IF_ERROR(store->Prepare());
  return store;
}

absl::Status JobStore::Prepare() {
  sqlite3_extended_result_codes(database_, 1);
  sqlite3_busy_timeout(database_, 5000);
  // The version first: nothing may be written to a newer one's file.
  ASSIGN_OR_RETURN(const int64_t version, OneInt(database_, file_, "PRAGMA user_version"));
  if (version > kVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("job store ", file_.string(), " has version ", version,
                     "; this program knows versions up to ", kVersion,
                     ". Run the newer program, or use another data folder"));
  }
  RETURN_IF_ERROR(Execute(database_, file_,
                          "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA "
                          "foreign_keys=ON; PRAGMA journal_size_limit=16777216"));
  if (version == 0) {
    ASSIGN_OR_RETURN(const int64_t tables,
                     OneInt(database_, file_, "SELECT count(*) FROM sqlite_master"));
    if (tables != 0) {
      return absl::FailedPreconditionError(absl::StrCat(
          "job store ", file_.string(), " is an SQLite file, but not one of this program"));
    }
    Transaction transaction(database_, file_);
    RETURN_IF_ERROR(transaction.Begin());
    RETURN_IF_ERROR(Execute(database_, file_, kSchema));
    return transaction.Commit();
  }
  Statement check(database_, file_, "PRAGMA quick_check(1)");
  ASSIGN_OR_RETURN(const bool row, check.Step());
  if (!row || check.Text(0) != "ok") {
    return absl::DataLossError(
        absl::StrCat("job store ", file_.string(), " is damaged: ", row ? check.Text(0) : ""));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<StoredJob>> JobStore::LoadJobs() {
  absl::MutexLock lock(&mutex_);
  std::vector<StoredJob> jobs;
  Statement rows(database_, file_, "SELECT payload FROM jobs ORDER BY number");
  while (true) {
    ASSIGN_OR_RETURN(const bool row, rows.Step());
    if (!row) break;
    StoredJob stored;
    RETURN_IF_ERROR(rows.Message(0, stored.job));
    Statement attempts(database_, file_,
                       "SELECT payload FROM attempts WHERE job_id = ? ORDER BY epoch");
    attempts.BindText(stored.job.id());
    while (true) {
      ASSIGN_OR_RETURN(const bool attempt, attempts.Step());
      if (!attempt) break;
      RETURN_IF_ERROR(attempts.Message(0, *stored.job.add_attempts()));
    }
    if (stored.job.attempts_size() > 0) {
      const int64_t epoch = stored.job.attempts(stored.job.attempts_size() - 1).epoch();
      Statement workers(database_, file_,
                        "SELECT rank, sequence, finish FROM workers WHERE job_id = ? AND epoch = "
                        "? ORDER BY rank");
      workers.BindText(stored.job.id()).Bind(epoch);
      while (true) {
        ASSIGN_OR_RETURN(const bool found, workers.Step());
        if (!found) break;
        StoredWorker worker{
            .epoch = epoch, .rank = static_cast<int>(workers.Int(0)), .sequence = workers.Int(1)};
        if (!workers.IsNull(2)) RETURN_IF_ERROR(workers.Message(2, worker.finish.emplace()));
        stored.workers.push_back(std::move(worker));
      }
    }
    jobs.push_back(std::move(stored));
  }
  return jobs;
}

absl::StatusOr<int64_t> JobStore::NextEpoch() {
  absl::MutexLock lock(&mutex_);
  return OneInt(database_, file_, "SELECT value FROM meta WHERE key = 'next_epoch'");
}

absl::StatusOr<std::optional<std::string>> JobStore::FindRequest(absl::string_view request_id,
                                                                 absl::string_view hash) {
  absl::MutexLock lock(&mutex_);
  return FindRequestLocked(request_id, hash);
}

absl::StatusOr<std::optional<std::string>> JobStore::FindRequestLocked(absl::string_view request_id,
                                                                       absl::string_view hash) {
  if (request_id.empty()) return std::optional<std::string>();
  Statement find(database_, file_, "SELECT id, spec_hash FROM jobs WHERE request_id = ?");
  find.BindText(request_id);
  ASSIGN_OR_RETURN(const bool found, find.Step());
  if (!found) return std::optional<std::string>();
  if (find.Text(1) != hash) {
    return absl::AlreadyExistsError(
        absl::StrCat("request_id \"", request_id, "\" was used for ", find.Text(0),
                     " with another recipe or name; use a new request_id"));
  }
  return std::optional<std::string>(find.Text(0));
}

absl::StatusOr<JobStore::Inserted> JobStore::Insert(v1::Job job, absl::string_view hash) {
  absl::MutexLock lock(&mutex_);
  return InsertLocked(job, hash);
}

absl::StatusOr<JobStore::Inserted> JobStore::InsertLocked(v1::Job& job, absl::string_view hash) {
  Transaction transaction(database_, file_);
  RETURN_IF_ERROR(transaction.Begin());
  ASSIGN_OR_RETURN(const std::optional<std::string> known,
                   FindRequestLocked(job.request_id(), hash));
  if (known.has_value()) return Inserted{.id = *known, .existed = true};
  ASSIGN_OR_RETURN(const int64_t number,
                   OneInt(database_, file_, "SELECT value FROM meta WHERE key = 'next_job'"));
  job.set_id(absl::StrFormat("j-%06d", number));
  Statement insert(database_, file_, "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, 1, ?)");
  insert.Bind(number).BindText(job.id());
  if (job.request_id().empty()) {
    insert.BindNull();
  } else {
    insert.BindText(job.request_id());
  }
  RETURN_IF_ERROR(insert.BindText(hash).Bind(job.state()).BindMessage(job).Run());
  RETURN_IF_ERROR(Statement(database_, file_, "UPDATE meta SET value = ? WHERE key = 'next_job'")
                      .Bind(number + 1)
                      .Run());
  v1::JobEvent event;
  event.set_number(1);
  *event.mutable_time() = job.submitted();
  *event.mutable_job() = job;
  RETURN_IF_ERROR(WriteEvent(database_, file_, job.id(), event));
  RETURN_IF_ERROR(transaction.Commit());
  return Inserted{.id = job.id(), .existed = false};
}

absl::Status JobStore::Commit(const JobChange& change) {
  absl::MutexLock lock(&mutex_);
  return CommitLocked(change);
}

absl::Status JobStore::CommitLocked(const JobChange& change) {
  const v1::Job& job = *change.job;
  Transaction transaction(database_, file_);
  RETURN_IF_ERROR(transaction.Begin());

  Statement find(database_, file_, "SELECT last_event FROM jobs WHERE id = ?");
  find.BindText(job.id());
  ASSIGN_OR_RETURN(const bool found, find.Step());
  if (!found) return absl::NotFoundError(absl::StrCat("no job ", job.id()));
  int64_t last_event = find.Int(0);

  if (job.attempts_size() > 0) {
    const v1::Attempt& attempt = job.attempts(job.attempts_size() - 1);
    RETURN_IF_ERROR(Statement(database_, file_,
                              "INSERT INTO attempts VALUES (?, ?, ?) ON CONFLICT (job_id, epoch) "
                              "DO UPDATE SET payload = excluded.payload")
                        .BindText(job.id())
                        .Bind(attempt.epoch())
                        .BindMessage(attempt)
                        .Run());
  }
  for (const StoredWorker& worker : change.workers) {
    Statement write(database_, file_,
                    "INSERT INTO workers VALUES (?, ?, ?, ?, ?) ON CONFLICT (job_id, epoch, rank) "
                    "DO UPDATE SET sequence = max(sequence, excluded.sequence), finish = "
                    "coalesce(finish, excluded.finish)");
    write.BindText(job.id()).Bind(worker.epoch).Bind(worker.rank).Bind(worker.sequence);
    if (worker.finish.has_value()) {
      write.BindMessage(*worker.finish);
    } else {
      write.BindNull();
    }
    RETURN_IF_ERROR(write.Run());
  }
  bool logs = false;
  for (v1::JobEvent event : change.events) {
    event.set_number(++last_event);
    logs |= event.has_log();
    RETURN_IF_ERROR(WriteEvent(database_, file_, job.id(), event));
  }
  if (logs) {
    RETURN_IF_ERROR(
        Statement(database_, file_,
                  "DELETE FROM events WHERE job_id = ?1 AND log = 1 AND number <= (SELECT number "
                  "FROM events WHERE job_id = ?1 AND log = 1 ORDER BY number DESC LIMIT 1 OFFSET "
                  "?2)")
            .BindText(job.id())
            .Bind(kKeptLogLines)
            .Run());
  }
  v1::Job row = job;
  row.clear_attempts();
  RETURN_IF_ERROR(Statement(database_, file_,
                            "UPDATE jobs SET state = ?, last_event = ?, payload = ? WHERE id = ?")
                      .Bind(job.state())
                      .Bind(last_event)
                      .BindMessage(row)
                      .BindText(job.id())
                      .Run());
  if (change.next_epoch.has_value()) {
    RETURN_IF_ERROR(
        Statement(database_, file_, "UPDATE meta SET value = ? WHERE key = 'next_epoch'")
            .Bind(*change.next_epoch)
            .Run());
  }
  return transaction.Commit();
}

absl::StatusOr<std::vector<v1::JobEvent>> JobStore::EventsAfter(absl::string_view job_id,
                                                                int64_t after, int limit,
                                                                bool no_logs) {
  absl::MutexLock lock(&mutex_);
  std::vector<v1::JobEvent> events;
  Statement rows(database_, file_,
                 "SELECT payload FROM events WHERE job_id = ? AND number > ? AND log <= ? ORDER BY "
                 "number LIMIT ?");
  rows.BindText(job_id).Bind(after).Bind(no_logs ? 0 : 1).Bind(limit);
  while (true) {
    ASSIGN_OR_RETURN(const bool row, rows.Step());
    if (!row) break;
    RETURN_IF_ERROR(rows.Message(0, events.emplace_back()));
  }
  return events;
}

}  // namespace pyramid
