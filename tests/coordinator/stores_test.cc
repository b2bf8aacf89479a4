#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sqlite3.h>

#include <atomic>
#include <cmath>
#include <limits>

#include "testing.h"

namespace simpo {
namespace {

using ::testing::HasSubstr;

StoredJob MakeJob(int64_t sequence, const std::string& id) {
  StoredJob stored{.sequence = sequence, .request_digest = "digest-" + id};
  stored.job.set_id(id);
  stored.job.set_request_id("request-" + id);
  stored.job.set_state(v1::JOB_STATE_QUEUED);
  stored.job.set_config_yaml("beta: 2\n");
  return stored;
}

v1::StepReport Report(const std::string& split, int64_t step, int attempt, double loss) {
  v1::StepReport report;
  report.set_steps_planned(10);
  report.mutable_point()->set_split(split);
  report.mutable_point()->set_step(step);
  report.mutable_point()->set_attempt(attempt);
  (*report.mutable_point()->mutable_values())["loss"] = loss;
  return report;
}

v1::JobEvent Event(int64_t sequence, const std::string& type) {
  v1::JobEvent event;
  event.set_sequence(sequence);
  event.set_type(type);
  return event;
}

class StoresTest : public ::testing::Test {
 protected:
  void Reopen() {
    stores_ = {};
    stores_ = Stores::Open(dir_ / "test.db");
  }
  TempDir dir_;
  Stores stores_ = Stores::Open(dir_ / "test.db");
};

TEST_F(StoresTest, WhatIsCommittedIsThereAfterReopening) {
  ASSERT_OK(stores_.jobs->InsertJob(MakeJob(1, "one")));
  ASSERT_OK(stores_.jobs->InsertJob(MakeJob(2, "two")));
  v1::Job job = MakeJob(1, "one").job;
  job.set_state(v1::JOB_STATE_RUNNING);
  ASSERT_OK(stores_.jobs->UpdateJob(1, job));
  v1::Attempt attempt;
  attempt.set_number(1);
  attempt.set_log_dir("/logs");
  ASSERT_OK(stores_.jobs->PutAttempt(1, attempt));
  attempt.set_exit_code(75);
  ASSERT_OK(stores_.jobs->PutAttempt(1, attempt));
  ASSERT_OK(stores_.jobs->AddEvent(1, Event(1, "submitted"), 0));
  ASSERT_OK(stores_.jobs->AddEvent(1, Event(2, "launched"), 0));
  ASSERT_OK(stores_.database->Commit());
  Reopen();

  const auto jobs = ValueOf(stores_.jobs->LoadJobs());
  ASSERT_EQ(jobs.size(), 2u);
  EXPECT_EQ(jobs[0].job.id(), "one");
  EXPECT_EQ(jobs[0].job.state(), v1::JOB_STATE_RUNNING);
  EXPECT_EQ(jobs[0].job.config_yaml(), "") << "may be large, and is read when it is asked for";
  EXPECT_EQ(ValueOf(stores_.jobs->ConfigYaml(1)), "beta: 2\n");
  EXPECT_EQ(stores_.jobs->ConfigYaml(3).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(jobs[0].request_digest, "digest-one");
  EXPECT_EQ(jobs[0].last_event, 2);
  ASSERT_EQ(jobs[0].attempts.size(), 1u);
  EXPECT_EQ(jobs[0].attempts[0].exit_code(), 75);
  EXPECT_EQ(jobs[1].job.id(), "two");
  EXPECT_EQ(jobs[1].last_event, 0);
}

TEST_F(StoresTest, AGroupIsWholeOrAbsent) {
  ASSERT_OK(stores_.jobs->InsertJob(MakeJob(1, "one")));
  ASSERT_OK(stores_.jobs->AddEvent(1, Event(1, "submitted"), 0));
  EXPECT_TRUE(stores_.database->InTransaction());
  EXPECT_TRUE(stores_.jobs->LoadJobs()->empty()) << "readers must see only what is committed";
  Reopen();  // as a crash before the commit
  EXPECT_TRUE(stores_.jobs->LoadJobs()->empty());
  EXPECT_TRUE(stores_.jobs->EventsAfter(1, 0, 10)->empty());
}

TEST_F(StoresTest, RequestIdsAreUnique) {
  ASSERT_OK(stores_.jobs->InsertJob(MakeJob(1, "one")));
  StoredJob again = MakeJob(2, "two");
  again.job.set_request_id("request-one");
  EXPECT_FALSE(stores_.jobs->InsertJob(again).ok());
}

TEST_F(StoresTest, EventsComeInOrderAndByCursor) {
  ASSERT_OK(stores_.jobs->InsertJob(MakeJob(1, "one")));
  for (int i = 1; i <= 5; ++i) ASSERT_OK(stores_.jobs->AddEvent(1, Event(i, "e"), 10 * i));
  ASSERT_OK(stores_.database->Commit());
  const auto after = ValueOf(stores_.jobs->EventsAfter(1, 2, 2));
  ASSERT_EQ(after.size(), 2u);
  EXPECT_EQ(after[0].sequence(), 3);
  EXPECT_EQ(after[1].sequence(), 4);
  const auto last = ValueOf(stores_.jobs->LastEvents(1, 2));
  ASSERT_EQ(last.size(), 2u);
  EXPECT_EQ(last[0].sequence(), 4);
  EXPECT_EQ(*stores_.jobs->LastPointBefore(1, 3), 30);
  EXPECT_EQ(*stores_.jobs->LastPointBefore(1, 99), 0);
}

TEST_F(StoresTest, LatestAttemptWinsAndRepeatsChangeNothing) {
  ASSERT_OK(stores_.jobs->InsertJob(MakeJob(1, "one")));
  for (int step = 1; step <= 4; ++step) stores_.metrics->Add(1, Report("train", step, 1, 1.0));
  for (int step = 3; step <= 5; ++step) stores_.metrics->Add(1, Report("train", step, 2, 2.0));
  stores_.metrics->Add(1, Report("train", 5, 2, 9.0));
  stores_.metrics->Add(1, Report("eval", 0, 1, 7.0));
  ASSERT_OK(stores_.metrics->Sync());
  const int64_t last = stores_.metrics->last_sequence();

  std::string steps;
  for (const v1::MetricPoint& point : ValueOf(stores_.metrics->ListPoints(1, "train", 0, 100))) {
    absl::StrAppend(&steps, point.step(), ":", point.values().at("loss"), " ");
  }
  EXPECT_EQ(steps, "1:1 2:1 3:2 4:2 5:2 ");
  EXPECT_EQ(stores_.metrics->ListPoints(1, "train", 3, 100)->size(), 2u);
  EXPECT_EQ(stores_.metrics->ListPoints(1, "train", 0, 2)->size(), 2u);
  EXPECT_EQ(stores_.metrics->ListPoints(1, "eval", -1, 9)->size(), 1u);
  EXPECT_TRUE(stores_.metrics->ListPoints(1, "eval", 0, 9)->empty());

  EXPECT_EQ((*stores_.metrics->LastReport(1, "train", 1))->point().step(), 4);
  EXPECT_EQ((*stores_.metrics->LastReport(1, "train", 0))->point().step(), 5);
  EXPECT_FALSE(stores_.metrics->LastReport(1, "train", 3)->has_value());

  int64_t cursor = 0;
  EXPECT_EQ(stores_.metrics->PointsSince(1, &cursor, 100)->size(), 8u);
  EXPECT_EQ(cursor, last);
  Reopen();
  EXPECT_EQ(stores_.metrics->last_sequence(), last);
}

TEST_F(StoresTest, ValuesKeepEveryBit) {
  ASSERT_OK(stores_.jobs->InsertJob(MakeJob(1, "one")));
  const double values[] = {0.1,
                           1e-300,
                           -0.0,
                           std::nextafter(1.0, 2.0),
                           std::numeric_limits<double>::infinity(),
                           std::numeric_limits<double>::quiet_NaN()};
  for (int i = 0; i < 6; ++i) stores_.metrics->Add(1, Report("train", i + 1, 1, values[i]));
  Reopen();
  const auto points = ValueOf(stores_.metrics->ListPoints(1, "train", 0, 10));
  ASSERT_EQ(points.size(), 6u);
  for (int i = 0; i < 6; ++i) {
    const double value = points[i].values().at("loss");
    EXPECT_EQ(std::memcmp(&value, &values[i], sizeof(value)), 0) << i;
  }
}

std::vector<int64_t> Steps(MetricStore& metrics, int64_t job, const std::string& split = "train") {
  std::vector<int64_t> steps;
  for (const v1::MetricPoint& point : ValueOf(metrics.ListPoints(job, split, -1, 10'000)))
    steps.push_back(point.step());
  return steps;
}

TEST_F(StoresTest, PointsAreStoredInGroupsAndTold) {
  std::atomic<int> told = 0;
  stores_.metrics->SetListener([&] { ++told; });
  for (int step = 1; step <= 500; ++step) stores_.metrics->Add(1, Report("train", step, 1, 1.0));
  EXPECT_TRUE(Eventually([&] { return stores_.metrics->stored_sequence() == 500; }));
  EXPECT_EQ(Steps(*stores_.metrics, 1).size(), 500u);
  ASSERT_OK(stores_.metrics->Sync());
  EXPECT_GE(told, 1);
  EXPECT_LT(told, 100);
}

TEST_F(StoresTest, PointsThatCannotBeWrittenAreSaid) {
  stores_ = {};
  // A table that takes no step above 4 stands for a disk that takes no more.
  {
    Sqlite db = ValueOf(Sqlite::Open(dir_ / kMetricsFile, /*read_only=*/false));
    ASSERT_OK(
        db.Execute("DROP TABLE points; CREATE TABLE points (sequence INTEGER PRIMARY KEY, job INTEGER, split TEXT, "
                   "step INTEGER CHECK (step < 5), attempt INTEGER, report BLOB, UNIQUE (job, split, step, attempt))"));
  }
  stores_ = Stores::Open(dir_ / "test.db");
  for (int step = 1; step <= 9; ++step) stores_.metrics->Add(1, Report("train", step, 1, 1.0));
  EXPECT_FALSE(stores_.metrics->Sync().ok());
  EXPECT_FALSE(stores_.metrics->status().ok());
  EXPECT_TRUE(Steps(*stores_.metrics, 1).empty()) << "a group is whole or absent";
}

TEST_F(StoresTest, PointsOfJobsThatAreNotKnownAreDroppedAndNumbersAreNotGivenAgain) {
  for (int job = 1; job <= 3; ++job) stores_.metrics->Add(job, Report("train", 1, 1, 1.0));
  ASSERT_OK(stores_.metrics->Sync());
  Reopen();
  ASSERT_OK(stores_.metrics->Reconcile(/*last_job=*/2, /*last_point=*/70));
  EXPECT_EQ(Steps(*stores_.metrics, 2).size(), 1u);
  EXPECT_TRUE(Steps(*stores_.metrics, 3).empty());
  stores_.metrics->Add(3, Report("train", 5, 1, 1.0));
  EXPECT_EQ(stores_.metrics->last_sequence(), 71);
  ASSERT_OK(stores_.metrics->Sync());
  EXPECT_EQ(Steps(*stores_.metrics, 3).size(), 1u);
}

TEST(ThinningTest, KeepsEveryNthTheFirstAndTheLast) {
  for (const int64_t steps : {1001, 1999, 2000, 54'321, 1'000'000}) {
    const int64_t every = Thinning::Every(1, steps, 1000);
    Thinning thinning(1, steps, every);
    int64_t kept = 0;
    for (int64_t step = 1; step <= steps; ++step) {
      const bool keep = thinning.Keep(step);
      kept += keep;
      EXPECT_EQ(keep, (step - 1) % every == 0 || step == steps) << step;
      EXPECT_FALSE(thinning.Keep(step)) << "an older attempt's";
    }
    EXPECT_LE(kept, 1001);
    EXPECT_GE(kept, 500);
  }
  EXPECT_EQ(Thinning::Every(0, 999, 1000), 1);
}

// What stays is the same when it is done again, as after a crash in the middle.
TEST(ThinningTest, AgainChangesNothing) {
  std::vector<int64_t> steps;
  for (int64_t step = 7; step < 90'000; step += 13) steps.push_back(step);
  std::vector<int64_t> once, twice;
  for (std::vector<int64_t>* kept : {&once, &twice}) {
    Thinning thinning(steps.front(), steps.back(), Thinning::Every(steps.front(), steps.back(), 1000));
    for (int64_t step : steps) {
      if (thinning.Keep(step)) kept->push_back(step);
    }
    steps = *kept;
  }
  EXPECT_EQ(once, twice);
  EXPECT_LE(once.size(), 1001u);
}

TEST_F(StoresTest, OldPointsAreThinnedOnce) {
  for (int step = 1; step <= 3500; ++step) stores_.metrics->Add(1, Report("train", step, 1, 1.0));
  for (int step = 3000; step <= 3500; ++step) stores_.metrics->Add(1, Report("train", step, 2, 2.0));
  for (int step = 0; step <= 3500; step += 100) stores_.metrics->Add(1, Report("eval", step, 1, 1.0));
  for (int step = 1; step <= 1000; ++step) stores_.metrics->Add(2, Report("train", step, 1, 1.0));
  ASSERT_OK(stores_.metrics->Sync());
  stores_.metrics->Thin(1, 1'700'000'000'000);
  stores_.metrics->Thin(2, 1'700'000'000'000);
  ASSERT_TRUE(Eventually([&] { return stores_.metrics->chores_waiting() == 0; }));

  const std::vector<int64_t> steps = Steps(*stores_.metrics, 1);
  EXPECT_EQ(steps.size(), 876u);
  EXPECT_EQ(steps[1], 5);
  EXPECT_EQ(steps.back(), 3500);
  EXPECT_EQ(ValueOf(stores_.metrics->ListPoints(1, "train", 3100, 1))[0].attempt(), 2);
  int64_t cursor = 0;
  EXPECT_EQ(ValueOf(stores_.metrics->PointsSince(1, &cursor, 10'000)).size(), 876u + 36u) << "older attempts' go";
  EXPECT_EQ(Steps(*stores_.metrics, 1, "eval").size(), 36u);
  EXPECT_EQ(Steps(*stores_.metrics, 2).size(), 1000u);
  const auto thinned = ValueOf(stores_.metrics->FindThinned(1, "train"));
  ASSERT_TRUE(thinned);
  EXPECT_EQ(thinned->every, 4);
  EXPECT_EQ(thinned->time_ms, 1'700'000'000'000);
  EXPECT_FALSE(ValueOf(stores_.metrics->FindThinned(1, "eval")));
  EXPECT_FALSE(ValueOf(stores_.metrics->FindThinned(2, "train")));

  Reopen();
  stores_.metrics->Thin(1, 1'800'000'000'000);
  ASSERT_TRUE(Eventually([&] { return stores_.metrics->chores_waiting() == 0; }));
  EXPECT_EQ(Steps(*stores_.metrics, 1), steps);
  EXPECT_EQ(ValueOf(stores_.metrics->FindThinned(1, "train"))->time_ms, 1'700'000'000'000);
}

TEST_F(StoresTest, ForgottenPointsAreGoneAndOthersComeMeanwhile) {
  for (int step = 1; step <= 2000; ++step) stores_.metrics->Add(1, Report("train", step, 1, 1.0));
  ASSERT_OK(stores_.metrics->Sync());
  stores_.metrics->Forget(1);
  for (int step = 1; step <= 100; ++step) stores_.metrics->Add(2, Report("train", step, 1, 1.0));
  std::vector<int64_t> forgotten;
  ASSERT_TRUE(Eventually([&] {
    for (int64_t job : stores_.metrics->TakeForgotten()) forgotten.push_back(job);
    return !forgotten.empty();
  }));
  ASSERT_OK(stores_.metrics->Sync());
  EXPECT_EQ(forgotten, std::vector<int64_t>{1});
  EXPECT_TRUE(Steps(*stores_.metrics, 1).empty());
  EXPECT_EQ(Steps(*stores_.metrics, 2).size(), 100u);
}

TEST_F(StoresTest, AJobIsDeletedWithAllThatIsItsOwn) {
  for (int job = 1; job <= 2; ++job) {
    ASSERT_OK(stores_.jobs->InsertJob(MakeJob(job, absl::StrCat("job", job))));
    ASSERT_OK(stores_.jobs->AddEvent(job, Event(1, "submitted"), 40 + job));
    v1::Attempt attempt;
    attempt.set_number(1);
    ASSERT_OK(stores_.jobs->PutAttempt(job, attempt));
  }
  ASSERT_OK(stores_.jobs->DeleteJob(1));
  ASSERT_OK(stores_.database->Commit());
  Reopen();
  const auto jobs = ValueOf(stores_.jobs->LoadJobs());
  ASSERT_EQ(jobs.size(), 1u);
  EXPECT_EQ(jobs[0].job.id(), "job2");
  EXPECT_EQ(jobs[0].last_point, 42);
  EXPECT_EQ(jobs[0].attempts.size(), 1u);
  EXPECT_TRUE(ValueOf(stores_.jobs->LastEvents(1, 10)).empty());
}

TEST_F(StoresTest, DrainedNodes) {
  ASSERT_OK(stores_.jobs->PutDrained("a", "disks"));
  ASSERT_OK(stores_.jobs->PutDrained("b", "fans"));
  ASSERT_OK(stores_.jobs->PutDrained("a", "new disks"));
  ASSERT_OK(stores_.jobs->PutDrained("b", ""));
  ASSERT_OK(stores_.database->Commit());
  Reopen();
  EXPECT_EQ(ValueOf(stores_.jobs->LoadDrained()), (std::map<std::string, std::string>{{"a", "new disks"}}));
}

// The tables as simpo-coordinator made them while points lay beside jobs.
constexpr char kSchema1[] = R"(
CREATE TABLE jobs (sequence INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, request_id TEXT NOT NULL UNIQUE,
  request_digest TEXT NOT NULL, state TEXT NOT NULL, job BLOB NOT NULL, config_yaml TEXT NOT NULL);
CREATE TABLE attempts (job INTEGER NOT NULL REFERENCES jobs(sequence), number INTEGER NOT NULL,
  attempt BLOB NOT NULL, PRIMARY KEY (job, number)) WITHOUT ROWID;
CREATE TABLE events (job INTEGER NOT NULL REFERENCES jobs(sequence), sequence INTEGER NOT NULL,
  last_point INTEGER NOT NULL, event BLOB NOT NULL, PRIMARY KEY (job, sequence)) WITHOUT ROWID;
CREATE TABLE points (sequence INTEGER PRIMARY KEY AUTOINCREMENT, job INTEGER NOT NULL REFERENCES jobs(sequence),
  split TEXT NOT NULL, step INTEGER NOT NULL, attempt INTEGER NOT NULL, report BLOB NOT NULL,
  UNIQUE (job, split, step, attempt));
CREATE INDEX points_of_job ON points (job, sequence);
PRAGMA user_version=1;
)";

class OldSchemaTest : public ::testing::Test {
 protected:
  OldSchemaTest() {
    Sqlite db = ValueOf(Sqlite::Open(dir_ / "test.db", /*read_only=*/false));
    EXPECT_TRUE(db.Execute(kSchema1).ok());
    SqliteStatement job = ValueOf(db.Prepare("INSERT INTO jobs VALUES (1, 'one', 'r', 'd', 'RUNNING', ?, 'beta: 2')"));
    v1::Job message;
    message.set_id("one");
    message.set_state(v1::JOB_STATE_RUNNING);
    const std::string job_bytes = message.SerializeAsString();
    EXPECT_TRUE(job.Reset().BindBlob(job_bytes).Run().ok());
    SqliteStatement event = ValueOf(db.Prepare("INSERT INTO events VALUES (1, 1, 3, ?)"));
    const std::string event_bytes = Event(1, "submitted").SerializeAsString();
    EXPECT_TRUE(event.Reset().BindBlob(event_bytes).Run().ok());
    SqliteStatement add =
        ValueOf(db.Prepare("INSERT INTO points (job, split, step, attempt, report) VALUES (1, ?, ?, 1, ?)"));
    for (int step = 1; step <= 5; ++step) {
      const std::string bytes = Report("train", step, 1, step).SerializeAsString();
      EXPECT_TRUE(add.Reset().Bind(std::string("train")).Bind(step).BindBlob(bytes).Run().ok());
    }
  }
  void ExpectAllIsThere() {
    Stores stores = Stores::Open(dir_ / "test.db");
    EXPECT_EQ(ValueOf(stores.jobs->LoadJobs()).at(0).job.id(), "one");
    EXPECT_EQ(Steps(*stores.metrics, 1), (std::vector<int64_t>{1, 2, 3, 4, 5}));
    int64_t cursor = ValueOf(stores.jobs->LastPointBefore(1, 1));
    const auto points = ValueOf(stores.metrics->PointsSince(1, &cursor, 10));
    ASSERT_EQ(points.size(), 2u) << "cursors hold";
    EXPECT_EQ(points[0].step(), 4);
    EXPECT_EQ(points[0].values().at("loss"), 4.0);
    stores.metrics->Add(1, Report("train", 6, 1, 6));
    EXPECT_EQ(stores.metrics->last_sequence(), 6);
    EXPECT_FALSE(stores.database->reader().Prepare("SELECT * FROM points").ok());
    EXPECT_TRUE(ValueOf(stores.jobs->LoadDrained()).empty());
  }
  TempDir dir_;
};

TEST_F(OldSchemaTest, PointsMoveToTheirOwnFile) { ExpectAllIsThere(); }

TEST_F(OldSchemaTest, ACrashBeforeTheOldOnesWereDroppedIsMadeUpFor) {
  {
    // Moved, and two of them at that: then the power went.
    ASSERT_OK(MetricStore::MakeFile(dir_ / kMetricsFile));
    Sqlite db = ValueOf(Sqlite::Open(dir_ / "test.db", /*read_only=*/false));
    ASSERT_OK(db.Execute(absl::StrCat("ATTACH '", (dir_ / kMetricsFile).string(),
                                      "' AS metrics; INSERT INTO metrics.points SELECT * FROM main.points LIMIT 2")));
  }
  ExpectAllIsThere();
}

TEST_F(StoresTest, AFileThatIsNoDatabaseIsRefusedByName) {
  WriteText(dir_ / "other.db", std::string(4096, 'x'));
  const auto status = Database::Open(dir_ / "other.db").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("other.db"));
}

TEST_F(StoresTest, ADatabaseOfANewerVersionIsRefused) {
  ASSERT_OK(stores_.database->writer().Execute("PRAGMA user_version=99"));
  stores_ = {};
  const auto status = Database::Open(dir_ / "test.db").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("newer"));
}

TEST_F(StoresTest, MetricsOfANewerVersionAreRefused) {
  stores_ = {};
  ASSERT_OK(ValueOf(Sqlite::Open(dir_ / kMetricsFile, /*read_only=*/false)).Execute("PRAGMA user_version=99"));
  const auto status = MetricStore::Open(dir_ / kMetricsFile).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("metrics.db"));
}

}  // namespace
}  // namespace simpo
