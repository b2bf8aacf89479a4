// Stories of the queue as text (tests/scenarios), told twice on simulated time: to the pure Scheduler, and to
// a Dispatcher with its stores and simulated gangs. A line is one event:
//
//   nodes 2x4                    two more nodes with 4 slots each; they are called n1, n2, ...
//   preemption on | starvation 10m | quota user alice 4 | quota label team=red 6
//   0s   submit a slots=3 runs=100s        also: nodes= (slots are of each), limit=, priority=, user=, label=
//   10s  priority a 5  |  cancel a  |  node n1 down  |  node n1 up
//   12s  expect running a b      these and no others hold slots and are not leaving; "-": none
//   12s  expect waiting c 2nd of 3 in the queue       the reason contains the text
//   12s  expect leaving d  |  expect done a  |  expect cancelled a  |  expect restarts a 1
//
// A gang that is asked to leave does so after 2 s and keeps its work; a lost one begins its work again.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>
#include <set>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "common/log.h"
#include "coordinator/placement.h"
#include "simulation.h"
#include "testing.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

constexpr char kScenarios[] = SIMPO_SOURCE_DIR "/tests/scenarios";
constexpr int64_t kBeginMs = 1'700'000'000'000;
constexpr int64_t kPauseMs = 1'000;  // after the first fault

struct SimulatedJob {
  std::string name;
  GangShape shape;
  int64_t runs_ms = 1'000'000'000;
  int64_t limit_ms = 0;
  int priority = 0;
  JobOwner owner;
};

// A coordinator's world in simulated time.
class World {
 public:
  virtual ~World() = default;
  virtual void SetTime(int64_t now_ms) = 0;
  virtual void Submit(const SimulatedJob& job) = 0;
  virtual void Cancel(const std::string& name) = 0;
  virtual void SetPriority(const std::string& name, int priority) = 0;
  virtual void SetNode(const std::string& node, bool up) = 0;
  // Whatever is due by now happens, and the queue is looked at.
  virtual void Settle() = 0;
  // waiting, running, leaving, done, cancelled
  virtual std::map<std::string, std::string> States() = 0;
  virtual std::string Reason(const std::string& name) = 0;
  virtual int Restarts(const std::string& name) = 0;
};

class SchedulerWorld final : public World {
 public:
  explicit SchedulerWorld(const Scheduler::Options& options) : scheduler_(options) {}

  void SetTime(int64_t now_ms) override { now_ms_ = now_ms; }
  void Submit(const SimulatedJob& job) override {
    const int64_t sequence = static_cast<int64_t>(jobs_.size()) + 1;
    by_name_[job.name] = sequence;
    jobs_[sequence] = {.job = job, .state = "waiting", .left_ms = job.runs_ms, .since_ms = now_ms_};
    Queue(sequence);
  }
  void Cancel(const std::string& name) override {
    Job& job = Find(name);
    if (job.state == "waiting") Finish(by_name_.at(name), "cancelled");
    if (job.state != "running") return;
    job.then = "cancelled";
    AskToLeave(by_name_.at(name), "cancelled on request");
  }
  void SetPriority(const std::string& name, int priority) override {
    Find(name).job.priority = priority;
    Queue(by_name_.at(name));
  }
  void SetNode(const std::string& node, bool up) override {
    EXPECT_TRUE(scheduler_.SetNodeUp(node, up)) << node;
    if (up) return;
    const int lost = scheduler_.cluster().by_name().at(node);
    for (auto& [sequence, job] : jobs_) {
      for (const NodeShare& share : job.where) {
        if (share.node == lost && (job.state == "running" || job.state == "leaving")) job.lost = true;
      }
    }
  }
  void Settle() override {
    const int64_t now_ms = now_ms_;
    for (auto& [sequence, job] : jobs_) {
      if (job.state != "running" && job.state != "leaving") continue;
      if (job.lost) {
        const bool preempted = job.state == "leaving";
        job.lost = false;
        if (job.then == "cancelled") {
          Finish(sequence, "cancelled");
          continue;
        }
        if (!preempted) job.not_before_ms = now_ms + (kPauseMs << job.restarts++);
        Requeue(sequence);
      } else if (now_ms >= job.started_ms + job.left_ms) {
        Finish(sequence, "done");
      } else if (job.state == "leaving" && now_ms >= job.leaves_ms) {
        job.left_ms -= now_ms - job.started_ms;
        if (job.then == "cancelled") {
          Finish(sequence, "cancelled");
        } else {
          Requeue(sequence);
        }
      }
    }
    const PlacementDecision decision = scheduler_.Decide(now_ms);
    for (const auto& start : decision.start) {
      Job& job = jobs_.at(start.sequence);
      job.state = "running";
      job.where = start.where;
      job.started_ms = now_ms;
      job.gain = start.gain;
    }
    for (const auto& [victim, winner] : decision.preempt) {
      const SimulatedJob& job = jobs_.at(winner).job;
      AskToLeave(victim, absl::StrCat("pre-empted by job ", job.name, " (priority ", job.priority, ")"));
    }
    scheduler_.Explain(now_ms, 1'000'000, 1, 0,
                       [&](int64_t sequence, std::string reason) { jobs_.at(sequence).reason = std::move(reason); });
  }
  std::map<std::string, std::string> States() override {
    std::map<std::string, std::string> states;
    for (const auto& [sequence, job] : jobs_) states[job.job.name] = job.state;
    return states;
  }
  std::string Reason(const std::string& name) override { return Find(name).reason; }
  int Restarts(const std::string& name) override { return Find(name).restarts; }

 private:
  struct Job {
    SimulatedJob job;
    std::string state;
    int64_t left_ms = 0;
    int64_t since_ms = 0;
    int64_t not_before_ms = 0;
    int64_t started_ms = 0;
    int64_t leaves_ms = 0;
    int gain = 0;
    NodeShares where;
    bool lost = false;
    std::string then;  // what it becomes once it has left
    std::string reason;
    int restarts = 0;
  };
  Job& Find(const std::string& name) { return jobs_.at(by_name_.at(name)); }
  void Finish(int64_t sequence, const std::string& state) {
    jobs_.at(sequence).state = state;
    scheduler_.Remove(sequence);
  }
  void Requeue(int64_t sequence) {
    Job& job = jobs_.at(sequence);
    job.state = "waiting";
    job.since_ms = now_ms_;
    Queue(sequence);
  }
  void AskToLeave(int64_t sequence, const std::string& why) {
    Job& job = jobs_.at(sequence);
    job.reason = why;
    job.state = "leaving";
    job.leaves_ms = now_ms_ + SimulatedLauncher::kCheckpointMs;
    Queue(sequence);
  }
  void Queue(int64_t sequence) {
    const Job& job = jobs_.at(sequence);
    if (job.state == "waiting") {
      scheduler_.Wait({.sequence = sequence,
                       .id = job.job.name,
                       .owner = job.job.owner,
                       .priority = job.job.priority,
                       .shape = job.job.shape,
                       .time_left_ms = job.job.limit_ms,
                       .waiting_since_ms = job.since_ms,
                       .not_before_ms = job.not_before_ms});
    } else if (job.state == "running" || job.state == "leaving") {
      scheduler_.Run({.sequence = sequence,
                      .id = job.job.name,
                      .priority = job.job.priority + job.gain,
                      .started_ms = job.started_ms,
                      .ends_by_ms = job.job.limit_ms > 0 ? job.started_ms + job.job.limit_ms : kNever,
                      .leaving = job.state == "leaving",
                      .where = job.where},
                     job.job.owner);
    }
  }

  Scheduler scheduler_;
  int64_t now_ms_ = kBeginMs;
  std::map<int64_t, Job> jobs_;
  std::map<std::string, int64_t> by_name_;
};

class DispatcherWorld final : public World {
 public:
  explicit DispatcherWorld(const Scheduler::Options& options) {
    Dispatcher::Options all;
    all.queue = options;
    all.outputs_dir = dir_ / "outputs";
    all.liveness.attach = all.liveness.heartbeat = std::chrono::hours(100);
    all.restart.first_pause = std::chrono::milliseconds(kPauseMs);
    all.restart.jitter = 0;
    dispatcher_.emplace(all, *stores_.database, *stores_.jobs, *stores_.metrics, views_);
    EXPECT_TRUE(dispatcher_->Load(Now()).ok());
    dispatcher_->Adopt(launcher_, Now());
  }

  void SetTime(int64_t now_ms) override { now_ms_ = now_ms; }
  void Submit(const SimulatedJob& job) override {
    Submission submission = SimulatedSubmission(job.name, job.shape.nodes, job.shape.slots_per_node);
    submission.config.time_limit_s = job.limit_ms / 1000;
    submission.job.set_priority(job.priority);
    submission.job.set_user(job.owner.user);
    submission.job.mutable_labels()->insert(job.owner.labels.begin(), job.owner.labels.end());
    ASSERT_TRUE(dispatcher_->Prepare(submission).ok());
    dispatcher_->Submit(submission, "", Now(), [&](const auto& answer) {
      ASSERT_TRUE(answer.ok()) << answer.status();
      ids_[job.name] = answer->job().id();
    });
    // It may start at once.
    launcher_.SetWork(job.runs_ms);
    Flush();
    launcher_.SetWork(ids_.at(job.name), job.runs_ms);
  }
  void Cancel(const std::string& name) override {
    dispatcher_->Cancel(ids_.at(name), Now(), [](const auto& answer) { EXPECT_TRUE(answer.ok()); });
    Flush();
  }
  void SetPriority(const std::string& name, int priority) override {
    dispatcher_->SetPriority(ids_.at(name), priority, Now(), [](const auto& answer) { EXPECT_TRUE(answer.ok()); });
    Flush();
  }
  void SetNode(const std::string& node, bool up) override {
    EXPECT_TRUE(dispatcher_->SetNodeUp(node, up)) << node;
    if (!up) launcher_.LoseNode(node);
  }
  void Settle() override {
    dispatcher_->Tick(Now());
    Flush();
  }
  std::map<std::string, std::string> States() override {
    std::map<std::string, std::string> states;
    for (const auto& [name, id] : ids_) {
      const v1::JobState state = views_.FindById(id)->job.state();
      states[name] = WaitsForSlots(state)                                                     ? "waiting"
                     : state == v1::JOB_STATE_LAUNCHING || state == v1::JOB_STATE_RUNNING     ? "running"
                     : state == v1::JOB_STATE_PREEMPTING || state == v1::JOB_STATE_CANCELLING ? "leaving"
                     : state == v1::JOB_STATE_SUCCEEDED                                       ? "done"
                     : state == v1::JOB_STATE_CANCELLED                                       ? "cancelled"
                                                                                              : "failed";
    }
    return states;
  }
  std::string Reason(const std::string& name) override {
    std::string reason = views_.FindById(ids_.at(name))->job.reason();
    for (const auto& [other, id] : ids_) reason = absl::StrReplaceAll(reason, {{id, other}});
    return reason;
  }
  int Restarts(const std::string& name) override {
    const v1::Job& job = views_.FindById(ids_.at(name))->job;
    return job.restarts() + job.machine_faults();
  }

 private:
  Moment Now() const { return {.steady = SteadyTime(std::chrono::milliseconds(now_ms_)), .unix_ms = now_ms_}; }
  void Flush() {
    ASSERT_OK(dispatcher_->FlushAll(Now()));
    for (const GangRequest& gang : launcher_.TakeStarted()) {
      for (int rank = 0; rank < gang.ranks; ++rank) {
        dispatcher_->Attach(HelloOf(gang, rank), std::make_shared<SimulatedRank>(launcher_, gang.job_id, gang.attempt),
                            Now());
      }
      dispatcher_->Receive({gang.job_id, gang.attempt, 0}, StepMessage(gang.attempt), Now());
    }
    ASSERT_OK(dispatcher_->FlushAll(Now()));
  }

  TempDir dir_;
  Stores stores_ = Stores::Open(dir_ / "test.db");
  int64_t now_ms_ = kBeginMs;
  SimulatedLauncher launcher_{[this] { return now_ms_; }};
  JobViews views_;
  std::optional<Dispatcher> dispatcher_;
  std::map<std::string, std::string> ids_;  // by name
};

// "90", "90s", "10m", "2h"
int64_t Milliseconds(const std::string& text) {
  int64_t number = 0;
  const char unit = text.empty() ? ' ' : text.back();
  const bool has_unit = unit == 's' || unit == 'm' || unit == 'h';
  EXPECT_TRUE(absl::SimpleAtoi(has_unit ? text.substr(0, text.size() - 1) : text, &number)) << text;
  return number * (unit == 'h' ? 3'600'000 : unit == 'm' ? 60'000 : 1'000);
}

// Reads one scenario and tells it to a world, line by line.
class Scenario {
 public:
  explicit Scenario(bool pure) : pure_(pure) {}

  void Tell(const fs::path& file) {
    std::istringstream text(ReadText(file));
    std::string line;
    for (int number = 1; std::getline(text, line); ++number) {
      std::istringstream words(line.substr(0, line.find('#')));
      std::string first;
      if (!(words >> first)) continue;
      SCOPED_TRACE(absl::StrCat(file.filename().string(), ":", number, ": ", line));
      Line(first, words);
      if (::testing::Test::HasFatalFailure()) return;
    }
    EXPECT_GT(expectations_, 0) << "a scenario that expects nothing cannot fail";
  }

 private:
  void Line(const std::string& first, std::istringstream& words) {
    if (Setting(first, words)) return;
    if (!world_) {
      if (pure_) {
        world_ = std::make_unique<SchedulerWorld>(options_);
      } else {
        world_ = std::make_unique<DispatcherWorld>(options_);
      }
    }
    const int64_t until_ms = kBeginMs + Milliseconds(first);
    ASSERT_GE(until_ms, now_ms_) << "time goes forward only";
    for (; now_ms_ < until_ms; now_ms_ += 1'000) {
      world_->SetTime(now_ms_);
      world_->Settle();
    }
    world_->SetTime(now_ms_);
    std::string verb;
    words >> verb;
    if (verb == "expect") {
      world_->Settle();
      return Expect(words);
    }
    Event(verb, words);
  }
  bool Setting(const std::string& first, std::istringstream& words) {
    std::string value;
    if (first == "nodes") {
      int count = 0, slots = 0;
      char x = 0;
      words >> count >> x >> slots;
      for (int i = 0; i < count; ++i) {
        options_.nodes.push_back({.name = absl::StrCat("n", options_.nodes.size() + 1), .slots = slots});
      }
      return true;
    }
    if (first == "preemption") return options_.preemption = true;
    if (first == "starvation") {
      words >> value;
      options_.starvation_ms = Milliseconds(value);
      return true;
    }
    if (first != "quota") return false;
    std::string kind;
    int slots = 0;
    words >> kind >> value >> slots;
    (kind == "user" ? options_.user_quotas : options_.label_quotas)[value] = slots;
    return true;
  }
  void Event(const std::string& verb, std::istringstream& words) {
    std::string name, value;
    words >> name;
    if (verb == "submit") return Submit(name, words);
    if (verb == "cancel") return world_->Cancel(name);
    words >> value;
    if (verb == "node") return world_->SetNode(name, value == "up");
    ASSERT_EQ(verb, "priority") << "unknown event";
    world_->SetPriority(name, std::stoi(value));
  }
  void Submit(const std::string& name, std::istringstream& words) {
    SimulatedJob job{.name = name};
    std::string word;
    while (words >> word) {
      const std::pair<std::string, std::string> pair = absl::StrSplit(word, absl::MaxSplits('=', 1));
      const auto& [key, value] = pair;
      if (key == "slots")
        job.shape.slots_per_node = std::stoi(value);
      else if (key == "nodes")
        job.shape.nodes = std::stoi(value);
      else if (key == "runs")
        job.runs_ms = Milliseconds(value);
      else if (key == "limit")
        job.limit_ms = Milliseconds(value);
      else if (key == "priority")
        job.priority = std::stoi(value);
      else if (key == "user")
        job.owner.user = value;
      else if (key == "label")
        job.owner.labels.insert(absl::StrSplit(value, '='));
      else
        FAIL() << "unknown key " << key;
    }
    world_->Submit(job);
  }
  void Expect(std::istringstream& words) {
    ++expectations_;
    std::string what, name, rest;
    words >> what;
    std::map<std::string, std::string> states = world_->States();
    if (what == "running") {
      std::set<std::string> wanted, running;
      while (words >> name) {
        if (name != "-") wanted.insert(name);
      }
      for (const auto& [job, state] : states) {
        if (state == "running") running.insert(job);
      }
      EXPECT_EQ(absl::StrJoin(running, " "), absl::StrJoin(wanted, " "));
      return;
    }
    words >> name;
    std::getline(words >> std::ws, rest);
    if (what == "restarts") {
      EXPECT_EQ(world_->Restarts(name), std::stoi(rest));
      return;
    }
    EXPECT_EQ(states[name], what);
    while (!rest.empty() && rest.back() == ' ') rest.pop_back();
    EXPECT_THAT(world_->Reason(name), ::testing::HasSubstr(rest));
  }

  const bool pure_;
  Scheduler::Options options_;
  std::unique_ptr<World> world_;
  int64_t now_ms_ = kBeginMs;
  int expectations_ = 0;
};

class ScenarioTest : public ::testing::TestWithParam<std::tuple<std::string, bool>> {};

TEST_P(ScenarioTest, HappensAsTold) {
  SetLogLevel(LogLevel::kWarning);
  const auto& [name, pure] = GetParam();
  Scenario(pure).Tell(fs::path(kScenarios) / (name + ".txt"));
  SetLogLevel(LogLevel::kInfo);
}

std::vector<std::string> ScenarioNames() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(kScenarios)) names.push_back(entry.path().stem().string());
  std::sort(names.begin(), names.end());
  return names;
}

INSTANTIATE_TEST_SUITE_P(All, ScenarioTest, ::testing::Combine(::testing::ValuesIn(ScenarioNames()), ::testing::Bool()),
                         [](const auto& info) {
                           return std::get<0>(info.param) + (std::get<1>(info.param) ? "_pure" : "_dispatcher");
                         });

// 15,000 jobs of many shapes, users and priorities on 1,000 nodes, with nodes that go and come back, each
// rule in force. Everything ends, slots are never given twice, and a decision is quick.
TEST(GeneratedScenario, FifteenThousandJobsOnAThousandNodes) {
  constexpr int kJobs = 15'000, kNodes = 1'000, kSlots = 8;
  Scheduler::Options options;
  options.preemption = true;
  options.starvation_ms = 600'000;
  options.user_quotas = {{"*", kNodes * kSlots / 4}};
  for (int i = 0; i < kNodes; ++i) options.nodes.push_back({.name = absl::StrCat("n", i), .slots = kSlots});
  Scheduler scheduler(options);
  std::mt19937 random(11);
  const auto draw = [&](int from, int to) { return std::uniform_int_distribution<int>(from, to)(random); };
  std::vector<SimulatedJob> jobs(kJobs);
  for (SimulatedJob& job : jobs) {
    job.shape = {draw(0, 9) == 0 ? draw(2, 32) : 1, draw(1, kSlots)};
    job.runs_ms = draw(20, 400) * 1000;
    job.limit_ms = draw(0, 2) == 0 ? 0 : job.runs_ms + draw(0, 200) * 1000;
    job.priority = draw(0, 19) == 0 ? 5 : draw(0, 2);
    job.owner.user = absl::StrCat("user", draw(0, 9));
  }
  using Clock = std::chrono::steady_clock;
  double worst_ms = 0, total_ms = 0, explain_ms = 0;
  int decisions = 0, preempted = 0, submitted = 0, done = 0;
  std::map<int64_t, std::pair<int64_t, NodeShares>> running;  // when it ends, and where
  std::multimap<int64_t, int64_t> ends;
  std::vector<int> taken(kNodes, 0);
  std::vector<int64_t> left(kJobs), begun(kJobs);
  for (int i = 0; i < kJobs; ++i) left[i] = jobs[i].runs_ms;
  const auto wait = [&](int i, int64_t now_ms) {
    scheduler.Wait({.sequence = i,
                    .id = absl::StrCat("j", i),
                    .owner = jobs[i].owner,
                    .priority = jobs[i].priority,
                    .shape = jobs[i].shape,
                    .time_left_ms = jobs[i].limit_ms,
                    .waiting_since_ms = now_ms});
  };
  const auto free_slots = [&](int64_t sequence) {
    for (const NodeShare& share : running.at(sequence).second) taken[share.node] -= share.slots;
    running.erase(sequence);
    scheduler.Remove(sequence);
  };
  int64_t now_ms = 0;
  for (; done < kJobs && now_ms < 100'000'000; now_ms += 1'000) {
    for (int i = 0; i < 500 && submitted < kJobs; ++i) wait(submitted++, now_ms);
    while (!ends.empty() && ends.begin()->first <= now_ms) {
      const int64_t sequence = ends.begin()->second;
      const int64_t due_ms = ends.begin()->first;
      ends.erase(ends.begin());
      if (!running.contains(sequence) || running[sequence].first != due_ms) continue;  // it was interrupted
      free_slots(sequence);
      ++done;
    }
    if (now_ms % 60'000 == 0) scheduler.SetNodeUp(absl::StrCat("n", draw(0, kNodes - 1)), false);
    if (now_ms % 60'000 == 30'000) {
      for (int i = 0; i < kNodes; ++i) scheduler.SetNodeUp(absl::StrCat("n", i), true);
    }
    const auto begin = Clock::now();
    const PlacementDecision decision = scheduler.Decide(now_ms);
    const double ms = std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
    worst_ms = std::max(worst_ms, ms);
    total_ms += ms;
    ++decisions;
    for (const auto& start : decision.start) {
      ASSERT_FALSE(running.contains(start.sequence));
      running[start.sequence] = {now_ms + left[start.sequence], start.where};
      ends.insert({now_ms + left[start.sequence], start.sequence});
      begun[start.sequence] = now_ms;
      for (const NodeShare& share : start.where) {
        taken[share.node] += share.slots;
        ASSERT_LE(taken[share.node], kSlots);
      }
    }
    for (const auto& [victim, winner] : decision.preempt) {
      ASSERT_LT(jobs[victim].priority, jobs[winner].priority);
      left[victim] -= now_ms - begun[victim];
      free_slots(victim);
      wait(static_cast<int>(victim), now_ms);
      ++preempted;
    }
    const auto explain = Clock::now();
    scheduler.Explain(now_ms, 64, 1, 300, [](int64_t, const std::string& reason) { ASSERT_FALSE(reason.empty()); });
    explain_ms += std::chrono::duration<double, std::milli>(Clock::now() - explain).count();
  }
  EXPECT_EQ(done, kJobs) << "somebody starves";
  EXPECT_GT(preempted, 0);
  std::printf(
      "%d jobs on %d nodes: %.0f s simulated, %d decisions, mean %.2f ms, worst %.1f ms, reasons %.2f ms each; "
      "%d pre-emptions\n",
      kJobs, kNodes, static_cast<double>(now_ms) / 1000, decisions, total_ms / decisions, worst_ms,
      explain_ms / decisions, preempted);
}

}  // namespace
}  // namespace simpo
