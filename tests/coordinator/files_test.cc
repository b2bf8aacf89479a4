// What is read from attempts' files, and the addresses and settings that people write.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <cmath>

#include "coordinator/attempt_output.h"
#include "coordinator/listen_address.h"
#include "coordinator/log_reader.h"
#include "coordinator/server_options.h"
#include "testing.h"

namespace simpo {
namespace {

using ::testing::HasSubstr;

TEST(LogReaderTest, WholeLinesAndTheLastOneWhenItIsComplete) {
  TempDir dir;
  int64_t offset = 0;
  EXPECT_FALSE(ReadLines(dir / "log", false, &offset));
  WriteText(dir / "log", "one\ntwo\nthr");
  EXPECT_EQ(ReadLines(dir / "log", false, &offset), "one\ntwo\n");
  EXPECT_EQ(ReadLines(dir / "log", false, &offset), "");
  EXPECT_EQ(offset, 8);
  EXPECT_EQ(ReadLines(dir / "log", true, &offset), "thr");
  EXPECT_EQ(ReadLines(dir / "log", true, &offset), "");
  WriteText(dir / "log", "anew\n");
  EXPECT_EQ(ReadLines(dir / "log", false, &offset), "anew\n") << "it was cut";
  EXPECT_EQ(offset, 5);
}

TEST(LogReaderTest, LongFilesComeInPiecesWithoutLossOrRepetition) {
  TempDir dir;
  std::string text;
  for (int i = 0; i < 20'000; ++i) absl::StrAppend(&text, "line ", i, "\n");
  text += std::string(200'000, 'x') + "\nend\n";
  WriteText(dir / "log", text);
  std::string all;
  for (int64_t offset = 0;;) {
    const std::string piece = ReadLines(dir / "log", false, &offset).value();
    if (piece.empty()) break;
    all += piece;
  }
  EXPECT_EQ(all, text);
}

TEST(LogReaderTest, Tail) {
  TempDir dir;
  EXPECT_EQ(TailOffset(dir / "log", 3), 0);
  std::string text;
  for (int i = 0; i < 30'000; ++i) absl::StrAppend(&text, "line ", i, "\n");
  WriteText(dir / "log", text);
  EXPECT_EQ(text.substr(TailOffset(dir / "log", 2)), "line 29998\nline 29999\n");
  const std::string many = text.substr(TailOffset(dir / "log", 20'000));
  EXPECT_EQ(std::count(many.begin(), many.end(), '\n'), 20'000);
  EXPECT_EQ(TailOffset(dir / "log", 30'000), 0);
  WriteText(dir / "open", "one\ntwo\nthr");
  EXPECT_EQ(TailOffset(dir / "open", 2), 4) << "an open last line counts";
}

TEST(LogReaderTest, OfAFileWithoutLinesOnlyTheEndIsLookedAt) {
  TempDir dir;
  WriteText(dir / "log", "begin\n");
  std::filesystem::resize_file(dir / "log", int64_t{1} << 40);
  EXPECT_EQ(TailOffset(dir / "log", 2), (int64_t{1} << 40) - (64 << 20));
}

// A job may put anything in the place of its files, and the threads that read them are those of all jobs.
TEST(AttemptOutputTest, APipeOrALinkIsAsIfNothingWereThere) {
  TempDir dir;
  WriteText(dir / "elsewhere", "simpo-worker: a secret\n{\"step\":5,\"loss\":1}\n");
  const auto expect_nothing = [&] {
    int64_t offset = 0;
    EXPECT_FALSE(ReadLines(dir / "rank-0.log", true, &offset));
    EXPECT_EQ(TailOffset(dir / "rank-0.log", 1), 0);
    EXPECT_EQ(LastWords(dir.path(), 1), "");
    EXPECT_TRUE(ReadMetricsFile(dir / "metrics.jsonl", "train", 1, 0).empty());
  };
  const auto names = {"rank-0.log", "launcher.log", "metrics.jsonl"};
  for (const char* name : names) ASSERT_EQ(mkfifo((dir / name).c_str(), 0600), 0);
  expect_nothing();
  for (const char* name : names) {
    std::filesystem::remove(dir / name);
    std::filesystem::create_symlink(dir / "elsewhere", dir / name);
  }
  expect_nothing();
}

TEST(AttemptOutputTest, LastWords) {
  TempDir dir;
  EXPECT_EQ(LastWords(dir.path(), 2), "");
  WriteText(dir / "launcher.log", "mpirun noticed that process rank 1 exited on signal 9 (Killed).\n-----\n");
  EXPECT_EQ(LastWords(dir.path(), 2), "process rank 1 exited on signal 9 (Killed).");
  WriteText(dir / "rank-1.log",
            "simpo-worker: first\nsimpo-worker: rank 1: bad\n  detail\n2024-01-01T00:00:00.000Z I x\n");
  EXPECT_EQ(LastWords(dir.path(), 2), "rank 1: bad\n  detail");
}

TEST(AttemptOutputTest, MetricsFile) {
  TempDir dir;
  EXPECT_TRUE(ReadMetricsFile(dir / "metrics.jsonl", "train", 1, 0).empty());
  WriteText(dir / "metrics.jsonl",
            "{\"step\":1,\"loss\":1}\n{\"step\":2,\"loss\":0.1,\"name\":\"x\"}\nnonsense\n[1]\n{\"step\":\"3\"}\n"
            "{\"step\":4,\"loss\":\"-Infinity\"}\n{\"step\":5,\"loss\":1");
  const auto points = ReadMetricsFile(dir / "metrics.jsonl", "train", 7, 1);
  ASSERT_EQ(points.size(), 2u);
  EXPECT_EQ(points[0].step(), 2);
  EXPECT_EQ(points[0].attempt(), 7);
  EXPECT_EQ(points[0].values_size(), 1);
  EXPECT_EQ(points[0].values().at("loss"), 0.1);
  EXPECT_EQ(points[1].values().at("loss"), -INFINITY);
}

TEST(AttemptOutputTest, ALongMetricsFileIsReadFromItsEndAndSoFar) {
  TempDir dir;
  std::string text;
  for (int step = 1; step <= 100'000; ++step) absl::StrAppend(&text, "{\"step\":", step, ",\"loss\":0.25}\n");
  WriteText(dir / "metrics.jsonl", text + "{\"step\":100001");
  const auto steps_after = [&](int64_t after_step) {
    std::vector<int64_t> steps;
    for (const auto& point : ReadMetricsFile(dir / "metrics.jsonl", "train", 1, after_step))
      steps.push_back(point.step());
    return steps;
  };
  EXPECT_THAT(steps_after(99'998), ::testing::ElementsAre(99'999, 100'000));
  EXPECT_THAT(steps_after(100'000), ::testing::IsEmpty());
  for (const auto& [after_step, first] : {std::pair(90'000, 90'001), std::pair(0, 50'001)}) {
    const std::vector<int64_t> steps = steps_after(after_step);
    ASSERT_EQ(steps.size(), 100'001u - first);
    EXPECT_EQ(steps.front(), first);
    EXPECT_EQ(steps.back(), 100'000);
    EXPECT_TRUE(std::is_sorted(steps.begin(), steps.end()));
  }
  // What earlier points are is not even looked at.
  WriteText(dir / "metrics.jsonl", "{\"step\":9}\n{\"step\":3}\n{\"step\":4}\n");
  EXPECT_THAT(steps_after(3), ::testing::ElementsAre(4));
}

TEST(ListenAddressTest, Forms) {
  const auto parse = [](const std::string& text) { return ParseListenAddress("--listen", text); };
  EXPECT_EQ(parse("127.0.0.1:7077")->ToString(), "127.0.0.1:7077");
  EXPECT_EQ(parse("[::1]:0")->host, "::1");
  EXPECT_EQ(parse("[::1]:0")->Reachable(5), "[::1]:5");
  EXPECT_EQ(parse("0.0.0.0:1")->Reachable(5), "127.0.0.1:5");
  EXPECT_TRUE(parse("localhost:1")->IsLoopback());
  EXPECT_TRUE(parse("127.1.2.3:1")->IsLoopback());
  EXPECT_FALSE(parse("0.0.0.0:1")->IsLoopback());
  EXPECT_FALSE(parse("192.168.0.1:1")->IsLoopback());
  for (const char* bad : {"", "7077", ":7077", "host:", "host:port", "host:70777", "host:-1", "::1:7077"}) {
    EXPECT_EQ(parse(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

class ServerOptionsTest : public ::testing::Test {
 protected:
  absl::Status Parse(std::vector<std::string> flags, const std::string& config) {
    CLI::App app;
    AddServerFlags(app, &options_);
    std::reverse(flags.begin(), flags.end());
    app.parse(flags);
    WriteText(dir_ / "coordinator.yaml", config);
    return ReadServerConfig(app, dir_ / "coordinator.yaml", &options_);
  }
  absl::Status Complete() {
    WriteText(dir_ / "worker", "");
    std::filesystem::permissions(dir_ / "worker", std::filesystem::perms::owner_all);
    if (options_.worker.empty()) options_.worker = dir_ / "worker";
    options_.mpirun = dir_ / "worker";
    return CompleteServerOptions(&options_);
  }
  TempDir dir_;
  ServerOptions options_;
};

TEST_F(ServerOptionsTest, FlagsWinOverTheFile) {
  ASSERT_OK(Parse({"--slots", "3"}, "slots: 5\ndata_dir: /from/file\ninsecure: true\nrestart_pause_s: 0.5\n"));
  EXPECT_EQ(options_.slots, 3);
  EXPECT_EQ(options_.data_dir, "/from/file");
  EXPECT_TRUE(options_.insecure);
  EXPECT_EQ(options_.restart_pause_s, 0.5);
}

TEST_F(ServerOptionsTest, EveryMistakeOfTheFileWithItsLine) {
  const absl::Status status = Parse({}, "slots: many\nlissten: 127.0.0.1:1\ninsecure: perhaps\n");
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  for (const char* part :
       {"coordinator.yaml:1: slots", "coordinator.yaml:2: unknown key 'lissten'", "coordinator.yaml:3: insecure"}) {
    EXPECT_THAT(std::string(status.message()), HasSubstr(part));
  }
  EXPECT_FALSE(Parse({}, "slots: [1\n").ok());
  EXPECT_FALSE(Parse({}, "- slots\n").ok());
  ASSERT_OK(Parse({}, ""));
}

// What runs below it is found by its path, also by a coordinator that was given the other name.
TEST_F(ServerOptionsTest, ADataFolderHasOneNameAndItIsUtf8) {
  std::filesystem::create_directories(dir_ / "real");
  std::filesystem::create_symlink(dir_ / "real", dir_ / "link");
  for (const char* name : {"real/data", "link/data", "link/./data/", "real/x/../data"}) {
    options_.data_dir = dir_ / name;
    ASSERT_OK(Complete());
    EXPECT_EQ(options_.data_dir, (dir_ / "real/data").string()) << name;
  }
  options_.data_dir = dir_ / "\xff";
  EXPECT_THAT(std::string(Complete().message()), AllOf(HasSubstr("--data-dir"), HasSubstr("UTF-8")));
}

TEST_F(ServerOptionsTest, AWrongValueIsShownWithItsRemedy) {
  for (const auto& [config, part] : std::map<std::string, std::string>{
           {"a: 1\ndata_dir:\n", ":2: data_dir: must be text, not nothing"},
           {"listen: ~\n", ":1: listen: must be text, not nothing"},
           {"allowed_roots:\n", ":1: allowed_roots: must be a list, not nothing"},
           {"slots: 4\nslots: 5\n", ":2: slots is in line 1 already"},
           {"tls: {cert: a}\ntls_cert: b\n", ":2: tls_cert is in line 1 already"},
           {"heartbeat_timeout_s: 5m\n", ":1: heartbeat_timeout_s: must be a number, not '5m'"},
           {"heartbeat_timeout_s: 0\n", ":1: heartbeat_timeout_s must be 1 to 1e9, not 0"},
           {"step_timeout_s: 0\n", ":1: step_timeout_s must be above 0 and at most 1e9, not 0"},
           {"starvation_minutes: -3\n", ":1: starvation_minutes must be 0 to 1e9, not -3"},
           {"slots: [1]\n", ":1: slots: must be a whole number, not a list or map"},
           {"tls: a.pem\n", ":1: tls: must be as {cert: FILE"},
           {"slot: 4\n", "unknown key 'slot'; did you mean slots?"},
           {"data-dir: d\n", "unknown key 'data-dir'; did you mean data_dir?"},
           {"wholly_other: d\n", "known are nodes, quotas"}}) {
    options_ = {};
    EXPECT_THAT(std::string(Parse({}, config).message()), HasSubstr(part)) << config;
  }
  options_ = {};
  ASSERT_OK(Parse({}, "starvation_minutes: 0\nrestart_pause_s: 0\nheartbeat_timeout_s: 1\n"));
}

TEST_F(ServerOptionsTest, TheQueueIsSetUpInTheFile) {
  ASSERT_OK(Parse({},
                  "data_dir: d\npreemption: true\nstarvation_minutes: 5\n"
                  "nodes: [{name: box, slots: 6, labels: {rack: r1}}]\n"
                  "quotas: {users: {alice: 4, '*': 2}, labels: {team=red: 3}}\n"));
  ASSERT_OK(Complete());
  EXPECT_TRUE(options_.preemption);
  EXPECT_EQ(options_.starvation_minutes, 5);
  EXPECT_EQ(options_.slots, 6);
  EXPECT_EQ(options_.nodes[0].name, "box");
  EXPECT_EQ(options_.nodes[0].labels.at("rack"), "r1");
  EXPECT_EQ(options_.user_quotas.at("*"), 2);
  EXPECT_EQ(options_.label_quotas.at("team=red"), 3);
  for (const auto& [config, part] :
       std::map<std::string, std::string>{{"nodes: box\n", "nodes: must be a list"},
                                          {"nodes: [box]\n", "nodes: must be a list"},
                                          {"nodes: [{name: box}]\n", "each needs a name and 1 to"},
                                          {"nodes: [{name: box, slots: some}]\n", "wrong type"},
                                          {"quotas: {users: {alice: x}}\n", "'alice' must be 0 slots or more, not 'x'"},
                                          {"quotas: {users: {a: 1, a: 2}}\n", "'a' is there twice"},
                                          {"nodes: [{name: box, slots: 2, gpus: 1}]\n", "unknown key 'gpus'"},
                                          {"nodes: [{name: a, slots: 2}, {name: a, slots: 2}]\n", "'a' is there twice"},
                                          {"quotas: 4\n", "quotas: must be as"},
                                          {"quotas: {groups: {a: 1}}\n", "unknown key 'groups'"},
                                          {"quotas: {users: {a: -1}}\n", "'a' must be 0 slots or more"},
                                          {"quotas: {labels: {red: 1}}\n", "'red' must be a label and its value"}}) {
    options_ = {};
    EXPECT_THAT(std::string(Parse({}, config).message()), HasSubstr(part)) << config;
  }
}

TEST_F(ServerOptionsTest, WhatCannotWorkIsRefusedBeforeTheStart) {
  const auto refused = [&](ServerOptions options, const char* part) {
    options_ = options;
    const absl::Status status = Complete();
    EXPECT_FALSE(status.ok()) << part;
    EXPECT_THAT(std::string(status.message()), HasSubstr(part));
  };
  refused({}, "--data-dir is missing");
  refused({.data_dir = "d", .listen = "0.0.0.0:7077"}, "add --insecure");
  refused({.data_dir = "d", .http = "192.168.0.1:80"}, "--http 192.168.0.1:80");
  refused({.data_dir = "d", .slots = -1}, "--slots is -1");
  refused({.data_dir = "d", .worker = "/no/such/worker"}, "the trainer /no/such/worker is not there");
  refused({.data_dir = "d", .stop_grace_s = -3}, "--stop-grace-s must be 0");
  refused({.data_dir = "d", .heartbeat_timeout_s = 0}, "--heartbeat-timeout-s must be 1 to 1e9, not 0");
  refused({.data_dir = "d", .slots = 4, .nodes = {{.name = "a", .slots = 2}}}, "--slots is 4, but nodes gives 2 to a");
  refused({.data_dir = "d", .nodes = {{.name = "a", .slots = 2}, {.name = "b", .slots = 2}}}, "nodes names 2 machines");
  options_ = {.data_dir = "d", .listen = "0.0.0.0:7077", .insecure = true};
  ASSERT_OK(Complete());
  EXPECT_GE(options_.slots, 1);
  EXPECT_TRUE(std::filesystem::path(options_.data_dir).is_absolute());
}

}  // namespace
}  // namespace simpo
