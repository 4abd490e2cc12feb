#include "server/serving/model_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "server/serving/route.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::testing::_;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;
using testing::StatusIs;

v1::ModelEvent Event(const std::string& actor) {
  v1::ModelEvent event;
  event.set_action("promote");
  event.set_actor(actor);
  event.set_version(3);
  return event;
}

std::vector<std::string> Actors(const std::vector<v1::ModelEvent>& events) {
  std::vector<std::string> actors;
  for (const v1::ModelEvent& event : events) actors.push_back(event.actor());
  return actors;
}

TEST(ModelStateTest, AStateIsReadAsItWasWritten) {
  const testing::TempFolder folder;
  v1::ModelState state;
  state.set_name("fashion");
  MoveAlias(state, kStableAlias, 3);
  MoveAlias(state, kStableAlias, 4);
  MoveAlias(state, "canary", 5);
  state.set_traffic_alias("canary");
  state.set_traffic_percent(12.5);
  (*state.mutable_dtypes())[5] = "bf16";
  ASSERT_OK(WriteModelState(folder.path(), state));
  ASSERT_OK_AND_ASSIGN(const v1::ModelState read, ReadModelState(folder.path()));
  EXPECT_EQ(VersionOfAlias(read, kStableAlias), 4);
  EXPECT_EQ(VersionOfAlias(read, "canary"), 5);
  EXPECT_THAT(read.earlier_stable(), ElementsAre(3));
  EXPECT_EQ(read.traffic_alias(), "canary");
  EXPECT_DOUBLE_EQ(read.traffic_percent(), 12.5);
  EXPECT_EQ(DtypeOf(read, 5), "bf16");
  EXPECT_EQ(DtypeOf(read, 4), "fp32");
  EXPECT_EQ(read.format_version(), 1);
  EXPECT_FALSE(std::filesystem::exists(folder / "state.json.tmp"));
}

TEST(ModelStateTest, ErrorsOfReadingKeepTheirCodes) {
  const testing::TempFolder folder;
  EXPECT_THAT(ReadModelState(folder.path()), StatusIs(absl::StatusCode::kNotFound, _));
  ASSERT_OK(WriteFileAtomically(folder / "state.json", "{\"aliases\": 3"));
  EXPECT_THAT(ReadModelState(folder.path()), StatusIs(absl::StatusCode::kDataLoss, _));
  ASSERT_OK(WriteFileAtomically(folder / "state.json", "{\"format_version\": 2}"));
  EXPECT_THAT(ReadModelState(folder.path()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("format_version 2")));
  ASSERT_OK(WriteFileAtomically(folder / "state.json", "{\"name\": \"a\", \"added_later\": 1}"));
  EXPECT_EQ(ReadModelState(folder.path())->name(), "a");
}

TEST(ModelStateTest, EventsComeBackInOrderAndTheNewestCount) {
  const testing::TempFolder folder;
  EXPECT_THAT(*ReadModelEvents(folder.path(), 10), IsEmpty());
  for (const char* actor : {"ann", "bob", "cem"}) {
    ASSERT_OK(AppendModelEvent(folder.path(), Event(actor)));
  }
  EXPECT_THAT(Actors(*ReadModelEvents(folder.path(), 10)), ElementsAre("ann", "bob", "cem"));
  EXPECT_THAT(Actors(*ReadModelEvents(folder.path(), 2)), ElementsAre("bob", "cem"));
  EXPECT_EQ(ReadModelEvents(folder.path(), 1)->front().version(), 3);
  EXPECT_THAT(*ReadModelEvents(folder.path(), 0), IsEmpty());
}

TEST(ModelStateTest, ALineCutShortDoesntSpoilTheNext) {
  const testing::TempFolder folder;
  ASSERT_OK(AppendModelEvent(folder.path(), Event("ann")));
  std::ofstream(folder / "promotions.jsonl", std::ios::app) << "{\"actor\":\"bo";
  ASSERT_OK(AppendModelEvent(folder.path(), Event("cem")));
  EXPECT_THAT(Actors(*ReadModelEvents(folder.path(), 10)), ElementsAre("ann", "cem"));
}

TEST(ModelStateTest, ALineThatCantBeWrittenWholeIsTakenBack) {
  const testing::TempFolder folder;
  const auto path = folder / std::string(kEventsFileName);
  ASSERT_OK(AppendModelEvent(folder.path(), Event("ann")));
  const auto size = std::filesystem::file_size(path);
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit tight = before;
  tight.rlim_cur = size + 10;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &tight), 0);
  const absl::Status full = AppendModelEvent(folder.path(), Event("bob"));
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_FALSE(full.ok());
  EXPECT_EQ(std::filesystem::file_size(path), size);
}

TEST(ModelStateTest, AListNamesSomeAndCountsTheRest) {
  EXPECT_EQ(Listed(std::vector<std::string>{}), "none");
  EXPECT_EQ(Listed(std::vector<std::string>{"a", "b"}), "a, b");
  EXPECT_THAT(Listed(std::vector<std::string>(25, "a")), HasSubstr("a, a and 5 more"));
  std::map<int64_t, v1::Manifest> versions;
  EXPECT_EQ(Listed(versions), "none");
  for (int i = 1; i <= 20; ++i) versions[i] = {};
  EXPECT_THAT(Listed(versions), AllOf(StartsWith("1, 2, "), EndsWith(", 20")));
  versions[21] = {};
  EXPECT_THAT(Listed(versions), AllOf(StartsWith("2, 3, "), EndsWith(", 21 and 1 older")));
}

TEST(ModelStateTest, AnAliasThatIsntThereNamesSomeThatAre) {
  v1::ModelState state;
  for (int i = 0; i < 300; ++i) MoveAlias(state, absl::StrCat("alias", i), 1);
  const absl::Status unknown = CheckAlias(state, "canary");
  EXPECT_THAT(unknown, StatusIs(absl::StatusCode::kNotFound, HasSubstr(" and 280 more")));
}

TEST(ModelStateTest, AnActorCantForgeALine) {
  const testing::TempFolder folder;
  ASSERT_OK(AppendModelEvent(folder.path(), Event("eve\"}\n{\"actor\":\"root")));
  EXPECT_THAT(Actors(*ReadModelEvents(folder.path(), 10)),
              ElementsAre("eve\"}\n{\"actor\":\"root"));
}

TEST(ModelStateTest, OfALongLogTheEndIsRead) {
  const testing::TempFolder folder;
  v1::ModelEvent event = Event("long");
  event.set_error(std::string(1000, 'x'));
  std::string text;
  for (int i = 0; i < 6000; ++i)
    absl::StrAppend(&text, "{\"actor\":\"n\",\"error\":\"", event.error(), "\"}\n");
  ASSERT_OK(WriteFileAtomically(folder / "promotions.jsonl", text));
  ASSERT_OK(AppendModelEvent(folder.path(), Event("last")));
  ASSERT_OK_AND_ASSIGN(const auto events, ReadModelEvents(folder.path(), 10'000));
  EXPECT_GT(events.size(), 3000u);
  EXPECT_LT(events.size(), 6000u);
  EXPECT_EQ(events.back().actor(), "last");
}

TEST(ModelStateTest, AFolderThatIsntThereIsAnError) {
  EXPECT_FALSE(AppendModelEvent("/nonexistent/folder", Event("ann")).ok());
  EXPECT_FALSE(WriteModelState("/nonexistent/folder", {}).ok());
}

TEST(ModelStateTest, WhatWasStableIsRememberedOnceEach) {
  v1::ModelState state;
  for (const int64_t version : {1, 2, 3, 2, 2}) MoveAlias(state, kStableAlias, version);
  EXPECT_EQ(VersionOfAlias(state, kStableAlias), 2);
  EXPECT_THAT(state.earlier_stable(), ElementsAre(1, 3));
  for (int64_t version = 10; version < 60; ++version) MoveAlias(state, kStableAlias, version);
  EXPECT_EQ(state.earlier_stable_size(), 32);
  EXPECT_EQ(state.earlier_stable(31), 58);
}

TEST(ModelStateTest, OtherAliasesHaveNoHistory) {
  v1::ModelState state;
  MoveAlias(state, "canary", 1);
  MoveAlias(state, "canary", 2);
  EXPECT_THAT(state.earlier_stable(), IsEmpty());
}

TEST(ModelStateTest, GoingBackSkipsWhatIsGoneAndForgetsWhatFailed) {
  v1::ModelState state;
  for (const int64_t version : {1, 2, 3, 4}) MoveAlias(state, kStableAlias, version);
  EXPECT_EQ(GoBack(state, {1, 2, 4}), 2);
  EXPECT_EQ(VersionOfAlias(state, kStableAlias), 2);
  EXPECT_EQ(GoBack(state, {1, 2, 4}), 1);
  EXPECT_EQ(GoBack(state, {1, 2, 4}), 0);
  EXPECT_EQ(VersionOfAlias(state, kStableAlias), 1);
}

TEST(ModelStateTest, SharingEndsWhenTheCanaryBecomesStable) {
  v1::ModelState state;
  MoveAlias(state, kStableAlias, 1);
  MoveAlias(state, "canary", 2);
  state.set_traffic_alias("canary");
  state.set_traffic_percent(10);
  MoveAlias(state, kStableAlias, 3);  // somebody else's
  EXPECT_DOUBLE_EQ(state.traffic_percent(), 10);
  MoveAlias(state, kStableAlias, 2);
  EXPECT_DOUBLE_EQ(state.traffic_percent(), 0);
  EXPECT_EQ(state.traffic_alias(), "");
}

TEST(ModelStateTest, NothingGoesToAnAliasThatIsGone) {
  v1::ModelState state;
  MoveAlias(state, "canary", 2);
  MoveAlias(state, "shadow", 3);
  state.set_traffic_alias("canary");
  state.set_traffic_percent(10);
  DropAlias(state, "shadow");
  EXPECT_EQ(state.traffic_alias(), "canary");
  DropAlias(state, "canary");
  EXPECT_EQ(state.traffic_alias(), "");
  EXPECT_DOUBLE_EQ(state.traffic_percent(), 0);
  EXPECT_EQ(VersionOfAlias(state, "canary"), 0);
  EXPECT_THAT(CheckAlias(state, "canary"), StatusIs(absl::StatusCode::kNotFound, _));
}

}  // namespace
}  // namespace pyramid
