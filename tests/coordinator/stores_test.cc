#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sqlite3.h>

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
  EXPECT_EQ(jobs[0].job.config_yaml(), "beta: 2\n");
  EXPECT_EQ(jobs[0].request_digest, "digest-one");
  EXPECT_EQ(jobs[0].last_event, 2);
  ASSERT_EQ(jobs[0].attempts.size(), 1u);
  EXPECT_EQ(jobs[0].attempts[0].exit_code(), 75);
  EXPECT_EQ(jobs[1].job.id(), "two");
  EXPECT_EQ(jobs[1].last_event, 0);
}

TEST_F(StoresTest, AGroupIsWholeOrAbsent) {
  ASSERT_OK(stores_.jobs->InsertJob(MakeJob(1, "one")));
  ASSERT_OK(stores_.metrics->AddPoint(1, Report("train", 1, 1, 0.5)));
  EXPECT_TRUE(stores_.database->InTransaction());
  EXPECT_TRUE(stores_.jobs->LoadJobs()->empty()) << "readers must see only what is committed";
  Reopen();  // as a crash before the commit
  EXPECT_TRUE(stores_.jobs->LoadJobs()->empty());
  EXPECT_TRUE(stores_.metrics->ListPoints(1, "train", 0, 10)->empty());
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
  for (int step = 1; step <= 4; ++step) ASSERT_OK(stores_.metrics->AddPoint(1, Report("train", step, 1, 1.0)));
  for (int step = 3; step <= 5; ++step) ASSERT_OK(stores_.metrics->AddPoint(1, Report("train", step, 2, 2.0)));
  ASSERT_OK(stores_.metrics->AddPoint(1, Report("train", 5, 2, 9.0)));
  ASSERT_OK(stores_.metrics->AddPoint(1, Report("eval", 0, 1, 7.0)));
  ASSERT_OK(stores_.database->Commit());
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
  for (int i = 0; i < 6; ++i) ASSERT_OK(stores_.metrics->AddPoint(1, Report("train", i + 1, 1, values[i])));
  ASSERT_OK(stores_.database->Commit());
  Reopen();
  const auto points = ValueOf(stores_.metrics->ListPoints(1, "train", 0, 10));
  ASSERT_EQ(points.size(), 6u);
  for (int i = 0; i < 6; ++i) {
    const double value = points[i].values().at("loss");
    EXPECT_EQ(std::memcmp(&value, &values[i], sizeof(value)), 0) << i;
  }
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

}  // namespace
}  // namespace simpo
