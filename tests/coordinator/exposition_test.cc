#include "coordinator/exposition.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <netinet/in.h>
#include <prometheus/text_serializer.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <random>
#include <set>
#include <sstream>
#include <system_error>
#include <thread>

#include "common/metric_names.h"
#include "coordinator/http_server.h"
#include "coordinator/moment.h"
#include "testing.h"

namespace simpo {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::string Text(const ExpositionSnapshot& snapshot) {
  return prometheus::TextSerializer().Serialize(CollectFamilies(snapshot));
}

std::shared_ptr<JobView> RunningJob() {
  auto view = std::make_shared<JobView>();
  view->job.set_id("job1");
  view->job.set_name("a \"quoted\"\nname");
  view->job.set_state(v1::JOB_STATE_RUNNING);
  view->job.set_slots(2);
  view->info.model = "model";
  v1::JobProgress& progress = *view->job.mutable_progress();
  progress.set_step(12);
  progress.set_steps_planned(100);
  for (const MetricName& name : MetricNames()) (*progress.mutable_metrics())[std::string(name.key)] = 0.1;
  (*progress.mutable_metrics())["rewards/margins"] = -1.0 / 3;
  (*progress.mutable_eval_metrics())["eval_rewards/margins"] = 2.5;
  view->step_seconds.Add(0.3);
  for (int rank = 0; rank < 3; ++rank) {
    v1::RankState& state = view->ranks.emplace_back();
    state.set_rank(rank);
    *state.mutable_heard_time() = ToTimestamp(std::array{3000, 1000, 2000}[rank]);
    state.set_busy_seconds(std::array{0.5, 0.75, 0.25}[rank]);
    state.set_memory_peak_bytes(1024 * (rank + 1));
  }
  return view;
}

TEST(ExpositionTest, ValuesOfAJob) {
  const std::string text = Text({.now_ms = 10'000, .jobs = {RunningJob()}, .slots_total = 4, .version = "1.2.3"});
  for (const char* line : {
           "# TYPE simpo_job_reward_margin gauge\n",
           "simpo_job_reward_margin{job=\"job1\",split=\"train\"} -0.333333333333333",
           "simpo_job_reward_margin{job=\"job1\",split=\"eval\"} 2.5\n",
           "simpo_job_reward{job=\"job1\",response=\"chosen\",split=\"train\"} 0.1\n",
           "simpo_job_logps{job=\"job1\",response=\"rejected\",split=\"train\"} 0.1\n",
           "simpo_job_step{job=\"job1\"} 12\n",
           "simpo_job_steps_planned{job=\"job1\"} 100\n",
           "# TYPE simpo_job_tokens_total counter\n",
           "simpo_job_state{job=\"job1\",state=\"RUNNING\"} 1\n",
           "simpo_job_state{job=\"job1\",state=\"QUEUED\"} 0\n",
           "name=\"a \\\"quoted\\\"\\nname\"",
           "simpo_job_rank_step_seconds{job=\"job1\",stat=\"min\"} 0.25\n",
           "simpo_job_rank_step_seconds{job=\"job1\",stat=\"max\"} 0.75\n",
           "simpo_job_slowest_rank{job=\"job1\"} 1\n",
           "simpo_job_memory_peak_bytes{job=\"job1\",stat=\"median\"} 2048\n",
           "simpo_job_step_duration_seconds_bucket{job=\"job1\",le=\"0.25\"} 0\n",
           "simpo_job_step_duration_seconds_bucket{job=\"job1\",le=\"0.5\"} 1\n",
           "simpo_job_step_duration_seconds_bucket{job=\"job1\",le=\"+Inf\"} 1\n",
           "simpo_job_last_heartbeat_timestamp_seconds{job=\"job1\",stat=\"median\"} 2\n",
           "simpo_coordinator_slots{state=\"taken\"} 2\n",
           "simpo_coordinator_slots{state=\"free\"} 2\n",
           "simpo_coordinator_jobs{state=\"RUNNING\"} 1\n",
           "simpo_coordinator_build_info{version=\"1.2.3\"} 1\n",
       }) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

TEST(ExpositionTest, EveryMetricOfTheTableIsThereAndEveryFamilyOnce) {
  const std::string text = Text({.jobs = {RunningJob()}, .slots_total = 4});
  for (const MetricName& name : MetricNames()) {
    if (name.prometheus.empty()) continue;
    EXPECT_THAT(text, HasSubstr("\n" + std::string(name.prometheus) + "{"));
  }
  std::set<std::string> seen;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("# TYPE ", 0) != 0) continue;
    EXPECT_TRUE(seen.insert(line).second) << line;
  }
}

TEST(ExpositionTest, NumbersKeepTheirDigits) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 2000; ++i) {
    const double value = std::ldexp(std::uniform_real_distribution<double>(-1, 1)(random),
                                    std::uniform_int_distribution<int>(-60, 60)(random));
    const auto view = RunningJob();
    (*view->job.mutable_progress()->mutable_metrics())["loss"] = value;
    const std::string text = Text({.jobs = {view}});
    const std::string start = "\nsimpo_job_loss{job=\"job1\",split=\"train\"} ";
    const size_t at = text.find(start);
    ASSERT_NE(at, std::string::npos);
    const double read = std::stod(text.substr(at + start.size()));
    EXPECT_LE(std::abs(read - value), 1e-15 * std::abs(value)) << value;
  }
}

TEST(ExpositionTest, AnEndedJobLeavesAfterAWhile) {
  const auto view = RunningJob();
  view->job.set_state(v1::JOB_STATE_SUCCEEDED);
  *view->job.mutable_end_time() = ToTimestamp(100'000);
  ExpositionSnapshot snapshot{.now_ms = 160'000, .jobs = {view}, .keep_ended_ms = 60'000};
  EXPECT_THAT(Text(snapshot), HasSubstr("simpo_job_loss"));
  snapshot.now_ms = 160'001;
  EXPECT_THAT(Text(snapshot), Not(HasSubstr("simpo_job_")));
  EXPECT_THAT(Text(snapshot), HasSubstr("simpo_coordinator_jobs{state=\"SUCCEEDED\"} 1\n"));
}

TEST(ExpositionTest, RestartsByHowTheyEnded) {
  const auto view = RunningJob();
  view->job.set_attempt(4);
  view->attempts.resize(4);
  for (int i = 0; i < 4; ++i) view->attempts[i].set_number(i + 1);
  view->attempts[0].set_fault(v1::FAULT_KIND_JOB);
  view->attempts[0].set_exit_code(137);
  view->attempts[1].set_fault(v1::FAULT_KIND_MACHINE);
  view->attempts[2].set_preempted(true);
  const std::string text = Text({.jobs = {view}});
  EXPECT_THAT(text, HasSubstr("simpo_job_restarts_total{job=\"job1\",reason=\"exit_137\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("simpo_job_restarts_total{job=\"job1\",reason=\"lost\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("simpo_job_preemptions_total{job=\"job1\"} 1\n"));
}

TEST(ExpositionTest, AJobWithoutAStepHasNoStepValues) {
  const auto view = RunningJob();
  view->job.clear_progress();
  const std::string text = Text({.jobs = {view}});
  EXPECT_THAT(text, Not(HasSubstr("simpo_job_loss")));
  EXPECT_THAT(text, Not(HasSubstr("simpo_job_step{")));
}

TEST(HttpServerTest, Pages) {
  const CoordinatorCollectable source([] { return ExpositionSnapshot{.slots_total = 3, .version = "9"}; });
  std::atomic<bool> healthy = true;
  const HttpServer::Options options{
      .host = "127.0.0.1", .title = "simpo-coordinator 9", .source = &source, .problem = [&] {
        return std::string(healthy ? "" : "the database cannot be written");
      }};
  auto server = ValueOf(HttpServer::Start(options));
  httplib::Client client("127.0.0.1", server->port());
  const auto metrics = client.Get("/metrics");
  ASSERT_TRUE(metrics);
  EXPECT_THAT(metrics->get_header_value("Content-Type"), HasSubstr("text/plain; version=0.0.4"));
  EXPECT_THAT(metrics->body, HasSubstr("simpo_coordinator_slots{state=\"free\"} 3\n"));
  EXPECT_EQ(client.Get("/healthz")->status, 200);
  healthy = false;
  EXPECT_EQ(client.Get("/healthz")->status, 503);
  EXPECT_THAT(client.Get("/")->body, HasSubstr("href=\"/metrics\""));
  EXPECT_EQ(client.Get("/nothing")->status, 404);

  HttpServer::Options taken = options;
  taken.port = server->port();
  EXPECT_EQ(HttpServer::Start(taken).status().code(), absl::StatusCode::kUnavailable);
}

// As at a limit of processes: the pages are served all the same.
TEST(HttpServerTest, WithoutAThreadToBeHadItServesOn) {
  const CoordinatorCollectable source([] { return ExpositionSnapshot{.version = "9"}; });
  const auto server = ValueOf(HttpServer::Start(
      {.host = "127.0.0.1", .title = "alone", .source = &source, .problem = [] { return std::string(); }}));
  pthread_attr_t usual, huge;
  ASSERT_EQ(pthread_getattr_default_np(&usual), 0);
  ASSERT_EQ(pthread_attr_init(&huge), 0);
  ASSERT_EQ(pthread_attr_setstacksize(&huge, size_t{1} << 50), 0);  // more than there are addresses
  ASSERT_EQ(pthread_setattr_default_np(&huge), 0);
  EXPECT_THROW(std::thread([] {}).join(), std::system_error);
  for (int i = 0; i < 3; ++i) {
    const auto page = httplib::Client("127.0.0.1", server->port()).Get("/healthz");
    EXPECT_TRUE(page && page->status == 200);
  }
  EXPECT_EQ(pthread_setattr_default_np(&usual), 0);
}

TEST(HttpServerTest, SlowClientsHoldUpNobody) {
  const CoordinatorCollectable source([] { return ExpositionSnapshot{.version = "9"}; });
  const auto server = ValueOf(HttpServer::Start(
      {.host = "127.0.0.1", .title = "slow", .source = &source, .problem = [] { return std::string(); }}));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(server->port()));
  std::vector<int> slow;
  for (int i = 0; i < 300; ++i) {
    slow.push_back(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(connect(slow.back(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    // Some begin to ask, some say nothing.
    const size_t begun = i % 2 == 0 ? 3 : 0;
    EXPECT_EQ(send(slow.back(), "GET", begun, MSG_NOSIGNAL), static_cast<ssize_t>(begun));
  }
  const auto begin = std::chrono::steady_clock::now();
  for (const char* path : {"/healthz", "/metrics", "/"}) {
    const auto page = httplib::Client("127.0.0.1", server->port()).Get(path);
    ASSERT_TRUE(page) << path;
    EXPECT_EQ(page->status, 200);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(4)) << "they waited for others";
  EXPECT_EQ(httplib::Client("127.0.0.1", server->port()).Post("/", "x", "text/plain")->status, 404);
  EXPECT_EQ(httplib::Client("127.0.0.1", server->port()).Get(("/" + std::string(20'000, 'a')).c_str())->status, 414);
  for (int fd : slow) {
    char byte = 0;
    EXPECT_LE(recv(fd, &byte, 1, 0), 0);  // hung up on
    close(fd);
  }
}

}  // namespace
}  // namespace simpo
