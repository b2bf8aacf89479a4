#include "simpoctl/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/str_split.h"
#include "simpoctl/format.h"
#include "tests/simpoctl/test_jobs.h"

namespace simpo {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

v1::MetricPoint Point(int64_t step, double margin, double loss) {
  v1::MetricPoint point;
  point.set_step(step);
  point.set_split("train");
  (*point.mutable_values())["rewards/margins"] = margin;
  (*point.mutable_values())["loss"] = loss;
  return point;
}

TEST(ProgressBar, FillsFromLeftToRight) {
  EXPECT_EQ(ProgressBar(0, 10, 4, false), "[----]");
  EXPECT_EQ(ProgressBar(5, 10, 4, false), "[##--]");
  EXPECT_EQ(ProgressBar(9, 10, 4, false), "[###-]");
  EXPECT_EQ(ProgressBar(10, 10, 4, false), "[####]");
  EXPECT_EQ(ProgressBar(20, 10, 4, false), "[####]");
  EXPECT_EQ(ProgressBar(3, 0, 4, false), "[----]");
  EXPECT_EQ(ProgressBar(1, 2, 2, true), "[\xe2\x96\x88\xe2\x96\x91]");
}

TEST(Sparkline, HighestAndLowest) {
  EXPECT_EQ(Sparkline({0, 1}, 10, false), ".#");
  EXPECT_EQ(Sparkline({5, 5, 5}, 10, true), "▄▄▄");
  EXPECT_EQ(Sparkline({}, 10, true), "");
  EXPECT_EQ(Sparkline({std::nan("")}, 10, true), "");
  EXPECT_EQ(DisplayWidth(Sparkline(std::vector<double>(1000, 1.0), 30, true)), 30);
}

TEST(Chart, RisesToTheRight) {
  EXPECT_THAT(Chart({0, 1, 2, 3}, 40, 2, false), ElementsAre("         3 |  .#",  //
                                                             "         0 |.|##"));
}

TEST(Chart, BearsAnyValue) {
  EXPECT_THAT(Chart({1}, 40, 3, true), IsEmpty());
  EXPECT_THAT(Chart({std::nan(""), 1}, 40, 3, true), IsEmpty());
  EXPECT_THAT(Chart({1, 2}, 5, 3, true), IsEmpty());
  const double inf = std::numeric_limits<double>::infinity();
  for (const std::vector<double>& values :
       {std::vector<double>{-1e308, 1e308}, {0, 0, 0}, {inf, 1, -inf, 2}, {5e-324, 0}}) {
    const std::vector<std::string> lines = Chart(values, 40, 3, true);
    ASSERT_EQ(lines.size(), 3u);
    for (const std::string& line : lines) EXPECT_LE(DisplayWidth(line), 40);
  }
}

TEST(ProgressBlock, NoLineIsWiderThanTheTerminal) {
  ProgressHistory history;
  for (int step = 1; step <= 500; ++step) history.Add(Point(step, std::sin(step / 50.0), 1.0 / step));
  v1::Job job = RunningJob();
  job.set_name(std::string(200, 'n'));
  job.set_reason(std::string(300, 'r'));
  for (const v1::JobState state : {v1::JOB_STATE_RUNNING, v1::JOB_STATE_QUEUED}) {
    job.set_state(state);
    for (const int width : {20, 30, 50, 80, 200}) {
      TerminalLook look{.is_terminal = true, .color = false, .utf8 = true, .width = width, .height = 24};
      for (const std::string& line : ProgressBlock(job, history, look))
        EXPECT_LT(DisplayWidth(line), width + 1) << line;
    }
  }
}

TEST(ProgressBlock, TellsBarRatesMetricsAndCurves) {
  ProgressHistory history;
  history.Add(Point(1, 0.1, 0.9));
  history.Add(Point(2, 0.83, 0.512));
  const TerminalLook look{.is_terminal = true, .color = false, .utf8 = false, .width = 80, .height = 24};
  const std::vector<std::string> lines = ProgressBlock(RunningJob(), history, look);
  EXPECT_EQ(lines[0], "first  RUNNING  train");
  EXPECT_THAT(lines[1], AllOf(HasSubstr("[##################---"), HasSubstr(" 48 %  58/120  epoch 0.48")));
  EXPECT_EQ(lines[2], "1.2s a step  820 tokens/s  ETA 1m14s");
  EXPECT_EQ(lines[3], "loss 0.512  margin 0.83  accuracy 75.0 %");
  EXPECT_THAT(lines, Contains(HasSubstr("0.83 |")));
  EXPECT_THAT(lines, Contains(HasSubstr("loss  #.")));
}

TEST(ProgressHistory, ALaterPointOfAStepWins) {
  ProgressHistory history;
  history.Add(Point(1, 0.1, 0.9));
  history.Add(Point(1, 0.2, 0.8));
  v1::MetricPoint eval = Point(1, 9, 9);
  eval.set_split("eval");
  history.Add(eval);
  EXPECT_EQ(history.margin, (std::map<int64_t, double>{{1, 0.2}}));
}

// What a display writes for a run of 100 steps.
std::string WholeRun(const TerminalLook& look) {
  std::string text;
  JobDisplay display([look] { return look; }, [&](std::string_view piece) { text += piece; });
  v1::WatchJobResponse response;
  *response.mutable_job() = RunningJob(0, 100);
  *response.add_events() = Event(1, "running", "attempt 1 runs");
  display.Update(response);
  for (int step = 1; step <= 100; ++step) {
    response.Clear();
    *response.mutable_job() = RunningJob(step, 100);
    *response.add_points() = Point(step, step * 0.01, 1.0 / step);
    display.Update(response);
  }
  response.Clear();
  *response.mutable_job() = EndedJob(v1::JOB_STATE_SUCCEEDED);
  *response.add_events() = Event(2, "succeeded", "done");
  display.Update(response);
  display.Finish();
  return text;
}

TEST(JobDisplay, PlainLinesWithoutControlCodes) {
  const std::string text = WholeRun(TerminalLook());
  for (const char c : text) EXPECT_TRUE(c == '\n' || static_cast<unsigned char>(c) >= 0x20) << static_cast<int>(c);
  const std::vector<std::string> lines = absl::StrSplit(text, '\n');
  EXPECT_EQ(lines[0], "12:00:01Z  running: attempt 1 runs");
  EXPECT_THAT(lines, Contains(HasSubstr("step 1/100")));
  EXPECT_THAT(lines, Contains(HasSubstr("step 100/100")));
  EXPECT_THAT(lines, Contains("12:00:02Z  succeeded: done"));
  const auto steps = std::count_if(lines.begin(), lines.end(), [](const auto& l) { return l.starts_with("step "); });
  EXPECT_GE(steps, 10);
  EXPECT_LE(steps, 25);
}

TEST(JobDisplay, RedrawsOnATerminal) {
  const std::string text = WholeRun({.is_terminal = true, .color = false, .utf8 = true, .width = 80, .height = 24});
  EXPECT_THAT(text, HasSubstr("\x1b[J"));
  EXPECT_THAT(text, Not(HasSubstr("\x1b[3")));  // no colours
  // The end is on the screen: the last block is the last state's.
  const std::string last = text.substr(text.rfind("\x1b[J"));
  EXPECT_THAT(last, AllOf(HasSubstr("12:00:02Z  succeeded: done\n"), HasSubstr("SUCCEEDED"), HasSubstr("120/120")));
  EXPECT_EQ(text.back(), '\n');
}

TEST(JobDisplay, ColoursWhereTheyAreWanted) {
  EXPECT_THAT(WholeRun({.is_terminal = true, .color = true, .utf8 = true, .width = 80, .height = 24}),
              HasSubstr("\x1b[32mSUCCEEDED\x1b[0m"));
}

TEST(JobDisplay, AStateThatChangesWithoutAnEventIsTold) {
  std::string text;
  JobDisplay display([] { return TerminalLook(); }, [&](std::string_view piece) { text += piece; });
  v1::WatchJobResponse response;
  response.mutable_job()->set_state(v1::JOB_STATE_QUEUED);
  for (const char* reason :
       {"waiting: 0 of 2 slots free", "waiting: 0 of 2 slots free", "waiting: 1 of 2 slots free"}) {
    response.mutable_job()->set_reason(reason);
    display.Update(response);
  }
  EXPECT_EQ(text, "QUEUED: waiting: 0 of 2 slots free\nQUEUED: waiting: 1 of 2 slots free\n");
}

TEST(JobDisplay, OfALongPastOnlyTheEndIsShown) {
  std::string text;
  JobDisplay display([] { return TerminalLook(); }, [&](std::string_view piece) { text += piece; });
  v1::WatchJobResponse response;
  *response.mutable_job() = RunningJob();
  for (int i = 1; i <= 150; ++i) *response.add_events() = Event(i, "checkpoint", std::to_string(i).c_str());
  display.Update(response);
  EXPECT_THAT(text, AllOf(HasSubstr("checkpoint: 150\n"), Not(HasSubstr("checkpoint: 140\n"))));
}

}  // namespace
}  // namespace simpo
