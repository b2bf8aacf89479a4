#include "simpoctl/job_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/simpoctl/test_jobs.h"

namespace simpo {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

v1::GetJobResponse Described(v1::Job job) {
  v1::GetJobResponse response;
  *response.mutable_job() = std::move(job);
  v1::Attempt& attempt = *response.add_attempts();
  attempt.set_number(1);
  attempt.mutable_start_time()->set_seconds(1769860805);
  attempt.set_log_dir("/out/first/logs/attempt-1");
  attempt.set_last_step(58);
  *response.add_events() = Event(1, "submitted", "submitted");
  *response.add_events() = Event(2, "rank_lost", "rank 1 \x1b[31mwas killed");
  response.add_advice("the margin is flat: raise beta");
  return response;
}

TEST(JobText, Table) {
  google::protobuf::Timestamp now;
  now.set_seconds(1769860800 + 3840);
  EXPECT_EQ(JobTable({RunningJob()}, now),
            "ID      NAME   STATE    STEP    LOSS   MARGIN  RANKS  AGE    USER  WHY\n"
            "ab12cd  first  RUNNING  58/120  0.512  0.83    2      1h04m  ada   attempt 1 runs on 2 ranks\n");
}

TEST(JobText, TableOfAJobThatHasDoneNothing) {
  v1::Job job;
  job.set_id("x");
  job.set_state(v1::JOB_STATE_QUEUED);
  EXPECT_THAT(JobTable({job}, {}), HasSubstr("x         QUEUED  -     -     -       0      0.0s"));
}

TEST(JobText, Nodes) {
  v1::NodeState node;
  node.set_name("box");
  node.set_slots(8);
  node.set_slots_taken(3);
  node.set_up(true);
  (*node.mutable_labels())["rack"] = "r1";
  v1::JobSlots& job = *node.add_jobs();
  job.set_job_id("ab12cd");
  job.set_slots(3);
  v1::NodeState lost;
  lost.set_name("lost");
  lost.set_slots(8);
  EXPECT_EQ(NodeTable({node, lost}),
            "NODE  STATE  SLOTS  TAKEN  LABELS   JOBS\n"
            "box   up     8      3      rack=r1  ab12cd (3)\n"
            "lost  down   8      0      -        -\n");
  lost.set_drain_reason("new disks");
  EXPECT_EQ(NodeTable({node, lost}),
            "NODE  STATE    SLOTS  TAKEN  LABELS   JOBS        WHY\n"
            "box   up       8      3      rack=r1  ab12cd (3)\n"
            "lost  drained  8      0      -        -           new disks\n");
  EXPECT_EQ(NodesToJson({node}).dump(),
            R"([{"name":"box","up":true,"drain_reason":"","slots":8,"slots_taken":3,"labels":{"rack":"r1"},)"
            R"("jobs":[{"job_id":"ab12cd","slots":3}]}])");
}

TEST(JobText, DescribeTellsAll) {
  const std::string text = DescribeText(Described(RunningJob()), "simpoctl --address h:1", "127.0.0.1:7078");
  for (const char* part :
       {"RUNNING", "attempt 1 runs on 2 ranks", "step 58 of 120", "1m14s to go", "loss 0.512", "/out/first",
        "/out/first/logs/attempt-1", "2026-01-31 12:00:05Z", "the margin is flat", "rank_lost",
        "simpoctl --address h:1 watch ab12cd", "simpoctl --address h:1 cancel ab12cd", "http://127.0.0.1:7078/"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
  EXPECT_THAT(text, Not(HasSubstr("\x1b")));
  EXPECT_THAT(text, Not(HasSubstr("/final")));
}

TEST(JobText, DescribeOfAnEndedJob) {
  const std::string text = DescribeText(Described(EndedJob(v1::JOB_STATE_SUCCEEDED)), "simpoctl", "");
  EXPECT_THAT(text, AllOf(HasSubstr("/out/first/final"), HasSubstr("simpoctl metrics ab12cd"),
                          Not(HasSubstr("cancel ab12cd")), Not(HasSubstr("http://"))));
}

TEST(JobText, LogsThatMayNotBeThereAreProposedLast) {
  v1::Job job = EndedJob(v1::JOB_STATE_FAILED);
  EXPECT_THAT(NextCommands(job, "simpoctl", ""),
              AllOf(HasSubstr("metrics"), HasSubstr("what rank 0 said\n"), HasSubstr("what the launcher said\n")));
  for (const char* phase : {"", "prepare"}) {
    job.mutable_progress()->set_phase(phase);
    EXPECT_THAT(NextCommands(job, "simpoctl", ""),
                AllOf(StartsWith("  simpoctl logs ab12cd --rank -1"), HasSubstr("what rank 0 said, if it began\n"),
                      Not(HasSubstr("metrics"))));
  }
  job.set_attempt(0);  // cancelled while it waited
  EXPECT_THAT(NextCommands(job, "simpoctl", ""), Not(HasSubstr("logs")));
}

TEST(JobText, Json) {
  const nlohmann::ordered_json json = DescriptionToJson(Described(RunningJob()));
  EXPECT_EQ(json["state"], "RUNNING");
  EXPECT_EQ(json["progress"]["step"], 58);
  EXPECT_EQ(json["progress"]["metrics"]["rewards/margins"], 0.83);
  EXPECT_EQ(json["create_time"], "2026-01-31T12:00:00Z");
  EXPECT_EQ(json["end_time"], "");
  EXPECT_TRUE(json["attempts"][0]["exit_code"].is_null());
  EXPECT_EQ(json["events"][1]["type"], "rank_lost");
  EXPECT_EQ(json["advice"][0], "the margin is flat: raise beta");
}

TEST(JobText, EndSummary) {
  const TerminalLook plain;
  const std::string good = EndSummary(EndedJob(v1::JOB_STATE_SUCCEEDED), "simpoctl", plain);
  EXPECT_THAT(good, StartsWith("Job ab12cd (first) SUCCEEDED after 5m00s, 120 of 120 steps\n"));
  EXPECT_THAT(good, HasSubstr("/out/first/final"));
  const std::string bad = EndSummary(EndedJob(v1::JOB_STATE_FAILED), "simpoctl", plain);
  EXPECT_THAT(bad, AllOf(HasSubstr("simpoctl describe ab12cd"), Not(HasSubstr("/final"))));
}

}  // namespace
}  // namespace simpo
