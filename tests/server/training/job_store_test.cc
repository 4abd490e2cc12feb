#include "server/training/job_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sqlite3.h>
#include <sys/mount.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TempFolder;
using ::testing::AllOf;
using ::testing::HasSubstr;

v1::Job NewJob(const std::string& request_id) {
  v1::Job job;
  job.set_name("job");
  job.set_state(v1::QUEUED);
  job.set_request_id(request_id);
  return job;
}

v1::JobEvent Log(const std::string& text) {
  v1::JobEvent event;
  event.mutable_log()->set_text(text);
  return event;
}

class JobStoreTest : public ::testing::Test {
 protected:
  void SetUp() override { Open(); }
  void Open() {
    store_.reset();
    absl::StatusOr<std::unique_ptr<JobStore>> store = JobStore::Open(file());
    ASSERT_OK(store);
    store_ = *std::move(store);
  }
  std::filesystem::path file() const { return folder_.path() / "jobs.sqlite"; }
  v1::Job Insert(const std::string& request_id) {
    v1::Job job = NewJob(request_id);
    const auto inserted = store_->Insert(job, "hash");
    EXPECT_OK(inserted);
    job.set_id(inserted->id);
    return job;
  }
  void Sql(const std::string& sql) {
    sqlite3* database = nullptr;
    ASSERT_EQ(sqlite3_open(file().c_str(), &database), SQLITE_OK);
    EXPECT_EQ(sqlite3_exec(database, sql.c_str(), nullptr, nullptr, nullptr), SQLITE_OK)
        << sqlite3_errmsg(database);
    sqlite3_close(database);
  }

  TempFolder folder_;
  std::unique_ptr<JobStore> store_;
};

TEST_F(JobStoreTest, IdsAreShortAndGrow) {
  EXPECT_EQ(Insert("").id(), "j-000001");
  EXPECT_EQ(Insert("").id(), "j-000002");
  Open();
  EXPECT_EQ(Insert("").id(), "j-000003");
}

TEST_F(JobStoreTest, WhatIsCommittedIsThereAfterReopening) {
  v1::Job job = Insert("r1");
  job.set_state(v1::STARTING);
  job.add_attempts()->set_epoch(5);
  v1::FinishRequest finish;
  finish.set_succeeded(true);
  ASSERT_OK(store_->Commit({.job = &job, .events = {Log("a")}, .next_epoch = 6}));
  job.mutable_attempts(0)->set_cause("done");
  ASSERT_OK(
      store_->Commit({.job = &job,
                      .workers = {{.epoch = 5, .rank = 1, .sequence = 7},
                                  {.epoch = 5, .rank = 0, .sequence = 3, .finish = finish}}}));
  Open();
  ASSERT_OK_AND_ASSIGN(const std::vector<StoredJob> jobs, store_->LoadJobs());
  ASSERT_EQ(jobs.size(), 1u);
  EXPECT_EQ(jobs[0].job.SerializeAsString(), job.SerializeAsString());
  ASSERT_EQ(jobs[0].workers.size(), 2u);
  EXPECT_TRUE(jobs[0].workers[0].finish->succeeded());
  EXPECT_EQ(jobs[0].workers[1].sequence, 7);
  EXPECT_FALSE(jobs[0].workers[1].finish.has_value());
  ASSERT_OK_AND_ASSIGN(const int64_t epoch, store_->NextEpoch());
  EXPECT_EQ(epoch, 6);
}

TEST_F(JobStoreTest, AFinishOnceToldStays) {
  v1::Job job = Insert("");
  job.add_attempts()->set_epoch(1);
  v1::FinishRequest first, second;
  first.set_message("first");
  second.set_message("second");
  ASSERT_OK(
      store_->Commit({.job = &job, .workers = {{.epoch = 1, .sequence = 9, .finish = first}}}));
  ASSERT_OK(
      store_->Commit({.job = &job, .workers = {{.epoch = 1, .sequence = 4, .finish = second}}}));
  ASSERT_OK_AND_ASSIGN(const std::vector<StoredJob> jobs, store_->LoadJobs());
  EXPECT_EQ(jobs[0].workers[0].finish->message(), "first");
  EXPECT_EQ(jobs[0].workers[0].sequence, 9);
}

TEST_F(JobStoreTest, AttemptsComeBackInOrder) {
  v1::Job job = Insert("");
  for (int64_t epoch = 1; epoch <= 12; ++epoch) {
    job.add_attempts()->set_epoch(epoch);
    ASSERT_OK(store_->Commit({.job = &job}));
  }
  ASSERT_OK_AND_ASSIGN(const std::vector<StoredJob> jobs, store_->LoadJobs());
  ASSERT_EQ(jobs[0].job.attempts_size(), 12);
  for (int i = 0; i < 12; ++i) EXPECT_EQ(jobs[0].job.attempts(i).epoch(), i + 1);
}

TEST_F(JobStoreTest, TheSameRequestGivesTheSameJobAndAnotherOneIsRefused) {
  ASSERT_OK_AND_ASSIGN(const JobStore::Inserted first, store_->Insert(NewJob("r"), "h1"));
  ASSERT_OK_AND_ASSIGN(const JobStore::Inserted again, store_->Insert(NewJob("r"), "h1"));
  EXPECT_FALSE(first.existed);
  EXPECT_TRUE(again.existed);
  EXPECT_EQ(first.id, again.id);
  EXPECT_THAT(
      store_->Insert(NewJob("r"), "h2"),
      StatusIs(absl::StatusCode::kAlreadyExists, AllOf(HasSubstr("\"r\""), HasSubstr("j-000001"))));
  EXPECT_THAT(store_->FindRequest("r", "h2").status(),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("another recipe")));
  ASSERT_OK_AND_ASSIGN(const std::optional<std::string> found, store_->FindRequest("r", "h1"));
  EXPECT_EQ(found, "j-000001");
  ASSERT_OK_AND_ASSIGN(const std::optional<std::string> none, store_->FindRequest("q", "h1"));
  EXPECT_EQ(none, std::nullopt);
}

TEST_F(JobStoreTest, ThreadsThatRaceWithOneRequestIdMakeOneJob) {
  std::vector<std::thread> threads;
  std::atomic<int> made{0};
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      const auto inserted = store_->Insert(NewJob("same"), "h");
      if (inserted.ok() && !inserted->existed) ++made;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(made, 1);
  ASSERT_OK_AND_ASSIGN(const std::vector<StoredJob> jobs, store_->LoadJobs());
  EXPECT_EQ(jobs.size(), 1u);
}

TEST_F(JobStoreTest, EventsAreNumberedAndReadByCursor) {
  v1::Job job = Insert("");
  v1::JobEvent checkpoint;
  checkpoint.mutable_checkpoint()->set_id("step-1");
  ASSERT_OK(store_->Commit({.job = &job, .events = {Log("a"), checkpoint, Log("b")}}));
  ASSERT_OK_AND_ASSIGN(std::vector<v1::JobEvent> events,
                       store_->EventsAfter(job.id(), 1, 100, false));
  ASSERT_EQ(events.size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(events[i].number(), i + 2);
  ASSERT_OK_AND_ASSIGN(events, store_->EventsAfter(job.id(), 1, 2, false));
  EXPECT_EQ(events.size(), 2u);
  ASSERT_OK_AND_ASSIGN(events, store_->EventsAfter(job.id(), 0, 100, true));
  ASSERT_EQ(events.size(), 2u);
  EXPECT_TRUE(events[0].has_job());
  EXPECT_EQ(events[1].checkpoint().id(), "step-1");
  ASSERT_OK_AND_ASSIGN(events, store_->EventsAfter(job.id(), 4, 100, false));
  EXPECT_TRUE(events.empty());
}

TEST_F(JobStoreTest, KeepsTheNewestLogLinesAndAllOtherEvents) {
  v1::Job job = Insert("");
  for (int batch = 0; batch < 30; ++batch) {
    JobChange change{.job = &job};
    for (int i = 0; i < 100; ++i) change.events.push_back(Log(absl::StrCat(batch * 100 + i)));
    ASSERT_OK(store_->Commit(change));
  }
  ASSERT_OK_AND_ASSIGN(const std::vector<v1::JobEvent> events,
                       store_->EventsAfter(job.id(), 0, 10000, false));
  ASSERT_EQ(events.size(), static_cast<size_t>(JobStore::kKeptLogLines) + 1);
  EXPECT_TRUE(events[0].has_job());
  EXPECT_EQ(events[1].log().text(), "1000");
  EXPECT_EQ(events.back().log().text(), "2999");
  EXPECT_EQ(events.back().number(), 3001);
}

TEST_F(JobStoreTest, AJobThatIsntThereCantBeChanged) {
  v1::Job job = NewJob("");
  job.set_id("j-000042");
  EXPECT_THAT(store_->Commit({.job = &job}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("j-000042")));
}

TEST_F(JobStoreTest, AFailedChangeLeavesNothingBehind) {
  v1::Job first = Insert("");
  v1::Job second = Insert("");
  first.add_attempts()->set_epoch(1);
  ASSERT_OK(store_->Commit({.job = &first}));
  second.add_attempts()->set_epoch(1);  // an epoch belongs to one attempt
  second.set_state(v1::STARTING);
  EXPECT_FALSE(store_->Commit({.job = &second, .events = {Log("x")}, .next_epoch = 9}).ok());
  ASSERT_OK_AND_ASSIGN(const std::vector<StoredJob> jobs, store_->LoadJobs());
  EXPECT_EQ(jobs[1].job.state(), v1::QUEUED);
  EXPECT_EQ(jobs[1].job.attempts_size(), 0);
  ASSERT_OK_AND_ASSIGN(const std::vector<v1::JobEvent> events,
                       store_->EventsAfter(second.id(), 0, 10, false));
  EXPECT_EQ(events.size(), 1u);
  ASSERT_OK_AND_ASSIGN(const int64_t epoch, store_->NextEpoch());
  EXPECT_EQ(epoch, 1);
}

TEST_F(JobStoreTest, ANewerVersionIsRefusedAndLeftAlone) {
  Insert("");
  store_.reset();
  Sql("PRAGMA user_version = 7");
  EXPECT_THAT(JobStore::Open(file()).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("has version 7"), HasSubstr("versions up to 1"))));
  Sql("PRAGMA user_version = 1");
  Open();
  ASSERT_OK_AND_ASSIGN(const std::vector<StoredJob> jobs, store_->LoadJobs());
  EXPECT_EQ(jobs.size(), 1u);
}

TEST_F(JobStoreTest, SomebodyElsesDatabaseIsRefused) {
  store_.reset();
  std::filesystem::remove(file());
  Sql("CREATE TABLE theirs (x)");
  EXPECT_THAT(JobStore::Open(file()).status(), StatusIs(absl::StatusCode::kFailedPrecondition,
                                                        HasSubstr("not one of this program")));
}

TEST_F(JobStoreTest, AFileThatIsNoDatabaseIsDataLoss) {
  store_.reset();
  std::ofstream(file()) << std::string(8192, 'x');
  EXPECT_THAT(JobStore::Open(file()).status(),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("jobs.sqlite")));
}

TEST_F(JobStoreTest, ADamagedDatabaseIsDataLoss) {
  for (int i = 0; i < 200; ++i) Insert(absl::StrCat("request ", i));
  store_.reset();
  const auto size = std::filesystem::file_size(file());
  ASSERT_GT(size, 16384u);
  std::fstream file_stream(file(), std::ios::in | std::ios::out | std::ios::binary);
  file_stream.seekp(4096);
  file_stream << std::string(size - 4096, '\x5a');
  file_stream.close();
  EXPECT_THAT(JobStore::Open(file()).status(),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("jobs.sqlite")));
}

TEST_F(JobStoreTest, ARecordThatCantBeReadIsDataLoss) {
  Insert("");
  store_.reset();
  Sql("UPDATE jobs SET payload = x'ffffffff'");
  Open();
  EXPECT_THAT(store_->LoadJobs().status(),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("pyramid.v1.Job")));
}

TEST_F(JobStoreTest, AFullDiskIsResourceExhaustedAndLosesNothing) {
  const std::filesystem::path disk = folder_ / "disk";
  std::filesystem::create_directory(disk);
  if (mount("tmpfs", disk.c_str(), "tmpfs", 0, "size=256k") != 0) {
    GTEST_SKIP() << "this user can't mount a tmpfs: " << std::strerror(errno);
  }
  {
    auto opened = JobStore::Open(disk / "jobs.sqlite");
    EXPECT_OK(opened);
    JobStore& store = **opened;
    int stored = 0;
    absl::Status status;
    while (status.ok() && stored < 1000) {
      v1::Job job = NewJob("");
      job.set_recipe(std::string(10000, 'r'));
      status = store.Insert(job, "h").status();
      if (status.ok()) ++stored;
    }
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("full")));
    EXPECT_GT(stored, 0);
    const auto jobs = store.LoadJobs();
    EXPECT_OK(jobs);
    EXPECT_EQ(jobs->size(), static_cast<size_t>(stored));
  }
  umount(disk.c_str());
}

}  // namespace
}  // namespace pyramid
