// What simpoctl makes of a connection that breaks before, after and in the answer of every call of TrainingService.
#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "cut_proxy.h"
#include "tests/coordinator/cardboard_service.h"
#include "tests/simpoctl/run_simpoctl.h"

namespace simpo {
namespace {

using ::testing::HasSubstr;

constexpr CutAt kPlaces[] = {CutAt::kRequest, CutAt::kDelivered, CutAt::kAnswer, CutAt::kEnd};

std::string PathOf(const std::string& method) { return absl::StrCat("/simpo.v1.TrainingService/", method); }

class UserCallsTest : public ::testing::Test {
 protected:
  // `arguments` are of the shell.
  Outcome Simpoctl(const std::string& arguments) { return RunSimpoctl(proxy_.address(), arguments); }
  std::string JobFile() {
    WriteText(service_.dir / "job.yaml", JobYaml());
    return (service_.dir / "job.yaml").string();
  }
  // A job of one rank that reports `steps` steps, with an event after each hundredth, and then ends well.
  std::string EndedJob(int steps) {
    const std::string id = service_.NewJob();
    Report(id, 1, steps);
    service_.launcher.End(id, 1, 0);
    EXPECT_TRUE(service_.Reaches(id, v1::JOB_STATE_SUCCEEDED));
    return id;
  }
  void Report(const std::string& id, int from, int to, int pause_ms = 0) {
    CardboardRank rank(service_, id);
    for (int step = from; step <= to; ++step) {
      rank.Say(StepMessage(step));
      if (step % 100 == 0 || pause_ms > 0) rank.Say(EventMessage("advice", absl::StrCat("after step ", step), step));
      if (pause_ms > 0) std::this_thread::sleep_for(std::chrono::milliseconds(pause_ms));
    }
    EXPECT_TRUE(Eventually([&] { return service_.Job(id).progress().step() == to; }));
  }

  // What is done and looked at for one method; false: there is no such case.
  bool Try(const std::string& method);

  // Runs it with a call of the method cut at each place, once and twice. `check` gets what came out.
  void AtEachPlace(const std::string& method, const std::function<std::string()>& arguments,
                   const std::function<void(const Outcome&)>& check, int messages = 1) {
    for (const CutAt at : kPlaces) {
      for (int message = 0; message < (at == CutAt::kAnswer ? messages : 1); ++message) {
        for (int times = 1; times <= (at == CutAt::kDelivered ? 2 : 1); ++times) {
          SCOPED_TRACE(absl::StrCat(method, ", cut at place ", static_cast<int>(at), ", message ", message, ", ", times,
                                    " times"));
          const std::string command = arguments();
          proxy_.Arm(PathOf(method), at, times, message);
          const Outcome outcome = Simpoctl(command);
          EXPECT_EQ(proxy_.cuts(), times);
          EXPECT_EQ(outcome.code, 0) << outcome.err;
          check(outcome);
        }
      }
    }
  }
  // Reads: what is answered is as without any cut.
  void Read(const std::string& method, const std::string& arguments, int messages = 1) {
    const Outcome undisturbed = Simpoctl(arguments);
    ASSERT_EQ(undisturbed.code, 0) << undisturbed.err;
    ASSERT_FALSE(undisturbed.out.empty());
    AtEachPlace(
        method, [&] { return arguments; },
        [&](const Outcome& outcome) {
          EXPECT_TRUE(outcome.out == undisturbed.out) << outcome.out << "\n--- undisturbed\n" << undisturbed.out;
        },
        messages);
  }

  void TrySubmitJob();
  void TryCancelJob();
  void TrySetPriority();
  void TryCheckpointJob();
  void TryDrainNode(const std::string& method);
  void TryWatchJob();
  void TryStreamLogs();

  CardboardService service_;
  CutProxy proxy_{service_.port};
};

void UserCallsTest::TrySubmitJob() {
  const std::string file = JobFile();
  size_t jobs = service_.views.All().size();
  AtEachPlace(
      "SubmitJob", [&] { return "submit " + file + " -o name"; },
      [&](const Outcome& outcome) {
        ASSERT_EQ(service_.views.All().size(), ++jobs);
        EXPECT_EQ(outcome.out, service_.views.All().back()->job.id() + "\n");
        EXPECT_EQ(service_.CountEvents(service_.views.All().back()->job.id(), "launched"), 1);
      });
  // Who gives up does not know, and says how to find out.
  for (const CutAt at : {CutAt::kRequest, CutAt::kDelivered}) {
    proxy_.Arm(PathOf("SubmitJob"), at, /*times=*/1000);
    const Outcome outcome = Simpoctl("submit " + file);
    EXPECT_EQ(outcome.code, 1);
    EXPECT_EQ(proxy_.cuts(), 5);
    EXPECT_THAT(outcome.err, HasSubstr("It is not known whether the job was taken: submit it again"));
    const std::vector<std::string> words = absl::StrSplit(outcome.err, ' ');
    const auto flag = std::find(words.begin(), words.end(), "--request-id");
    ASSERT_TRUE(flag != words.end() && flag + 1 != words.end()) << outcome.err;
    const std::string request_id(absl::StripSuffix(*(flag + 1), ","));
    proxy_.Arm("", CutAt::kNowhere);
    EXPECT_EQ(Simpoctl(absl::StrCat("submit ", file, " --request-id ", request_id)).code, 0);
    EXPECT_EQ(service_.views.All().size(), ++jobs);
  }
}

void UserCallsTest::TryCancelJob() {
  std::string id;
  AtEachPlace(
      "CancelJob", [&] { return absl::StrCat("cancel ", id = service_.NewJob(), " --yes"); },
      [&](const Outcome& outcome) {
        EXPECT_THAT(outcome.out, HasSubstr(id));
        EXPECT_EQ(service_.Job(id).state(), v1::JOB_STATE_CANCELLING);
        EXPECT_EQ(service_.CountEvents(id, "cancelling"), 1);
        service_.launcher.End(id, 1, 143);
        EXPECT_TRUE(service_.Reaches(id, v1::JOB_STATE_CANCELLED));
      });
  proxy_.Arm(PathOf("CancelJob"), CutAt::kDelivered, /*times=*/1000);
  id = service_.NewJob();
  EXPECT_THAT(Simpoctl(absl::StrCat("cancel ", id, " --yes")).err,
              HasSubstr(absl::StrCat("It is not known whether job ", id, " was asked to end: cancel it again")));
  service_.launcher.End(id, 1, 143);
}

void UserCallsTest::TrySetPriority() {
  const std::string id = service_.NewJob();
  int priority = 0;
  AtEachPlace(
      "SetPriority", [&] { return absl::StrCat("priority ", id, " ", ++priority); },
      [&](const Outcome&) {
        EXPECT_EQ(service_.Job(id).priority(), priority);
        EXPECT_EQ(service_.CountEvents(id, "priority"), priority);
      });
  proxy_.Arm(PathOf("SetPriority"), CutAt::kDelivered, /*times=*/1000);
  EXPECT_THAT(Simpoctl(absl::StrCat("priority ", id, " 77")).err, HasSubstr("It is not known whether job"));
}

// One more checkpoint does no harm; none would.
void UserCallsTest::TryCheckpointJob() {
  const std::string id = service_.NewJob();
  CardboardRank rank(service_, id);
  ASSERT_TRUE(service_.Reaches(id, v1::JOB_STATE_RUNNING));
  int asked = 0;
  AtEachPlace(
      "CheckpointJob", [&] { return absl::StrCat("checkpoint ", id); },
      [&](const Outcome& outcome) {
        EXPECT_THAT(outcome.out, HasSubstr(absl::StrCat("Job ", id)));
        const int before = std::exchange(asked, service_.CountEvents(id, "checkpoint_asked"));
        EXPECT_GE(asked, before + 1);
        EXPECT_LE(asked, before + 3);
      });
  proxy_.Arm(PathOf("CheckpointJob"), CutAt::kDelivered, /*times=*/1000);
  EXPECT_THAT(Simpoctl(absl::StrCat("checkpoint ", id)).err, HasSubstr("It is not known whether job"));
}

void UserCallsTest::TryDrainNode(const std::string& method) {
  const bool drain = method == "DrainNode";
  const auto is_drained = [&] {
    proxy_.Arm("", CutAt::kNowhere);
    return nlohmann::json::parse(Simpoctl("nodes -o json").out)[0]["drain_reason"] == "disks";
  };
  AtEachPlace(
      method,
      [&] {
        proxy_.Arm("", CutAt::kNowhere);
        EXPECT_EQ(Simpoctl(drain ? "undrain local" : "drain local --reason disks").code, 0);
        return std::string(drain ? "drain local --reason disks" : "undrain local");
      },
      [&](const Outcome& outcome) {
        EXPECT_THAT(outcome.out, HasSubstr("Node local"));
        EXPECT_EQ(is_drained(), drain);
      });
  proxy_.Arm(PathOf(method), CutAt::kDelivered, /*times=*/1000);
  EXPECT_THAT(Simpoctl(drain ? "drain local" : "undrain local").err, HasSubstr("It is not known whether node local"));
}

// Every event is shown once, in order, and the end is known, wherever the stream breaks.
void UserCallsTest::TryWatchJob() {
  std::string id;
  std::thread life;
  AtEachPlace(
      "WatchJob",
      [&] {
        id = service_.NewJob();
        life = std::thread([&] {
          Report(id, 1, 6, /*pause_ms=*/40);
          service_.launcher.End(id, 1, 0);
        });
        return absl::StrCat("watch ", id);
      },
      [&](const Outcome& outcome) {
        life.join();
        std::vector<std::string> shown, expected;
        for (const v1::JobEvent& event : service_.Events(id)) expected.push_back(event.type());
        const std::vector<std::string> lines = absl::StrSplit(outcome.err, '\n');
        for (const std::string& line : lines) {
          if (line.size() < 11 || line[2] != ':' || line[5] != ':') continue;  // events begin with their time
          shown.push_back(line.substr(11, line.find(':', 11) - 11));
        }
        EXPECT_EQ(shown, expected) << outcome.err;
      },
      /*messages=*/4);
}

void UserCallsTest::TryStreamLogs() {
  std::string id = EndedJob(1);
  std::string text;
  for (int line = 0; line < 20'000; ++line) absl::StrAppend(&text, "line ", line, " of the log\n");
  WriteText(std::filesystem::path(service_.Job(id).output_dir()) / "logs" / "attempt-1" / "rank-0.log", text);
  Read("StreamLogs", "logs " + id, /*messages=*/3);
  EXPECT_TRUE(Simpoctl("logs " + id).out == text);
  Read("StreamLogs", absl::StrCat("logs ", id, " --tail 15000"), /*messages=*/2);
  // While it grows.
  std::thread life;
  AtEachPlace(
      "StreamLogs",
      [&] {
        id = service_.NewJob();
        life = std::thread([this, id] {
          const auto file = std::filesystem::path(service_.Job(id).output_dir()) / "logs" / "attempt-1" / "rank-0.log";
          std::filesystem::create_directories(file.parent_path());
          std::ofstream log(file);
          for (int line = 0; line < 10; ++line) {
            log << "line " << line << "\n" << std::flush;
            std::this_thread::sleep_for(std::chrono::milliseconds(40));
          }
          service_.launcher.End(id, 1, 0);
        });
        return absl::StrCat("logs ", id, " --follow");
      },
      [&](const Outcome& outcome) {
        life.join();
        std::string expected;
        for (int line = 0; line < 10; ++line) absl::StrAppend(&expected, "line ", line, "\n");
        EXPECT_EQ(outcome.out, expected);
      },
      /*messages=*/3);
}

bool UserCallsTest::Try(const std::string& method) {
  if (method == "SubmitJob") return TrySubmitJob(), true;
  if (method == "GetJob") return Read(method, absl::StrCat("get ", EndedJob(5), " -o json")), true;
  if (method == "ListJobs") {
    for (int i = 0; i < 3; ++i) EndedJob(1);
    return Read(method, "list -o name"), true;
  }
  if (method == "CancelJob") return TryCancelJob(), true;
  if (method == "SetPriority") return TrySetPriority(), true;
  if (method == "CheckpointJob") return TryCheckpointJob(), true;
  if (method == "DrainNode" || method == "UndrainNode") return TryDrainNode(method), true;
  if (method == "WatchJob") return TryWatchJob(), true;
  if (method == "StreamLogs") return TryStreamLogs(), true;
  if (method == "ListMetrics") {
    const std::string id = EndedJob(4500);  // three pages
    Read(method, absl::StrCat("metrics ", id, " -o json"));
    const auto points = nlohmann::json::parse(Simpoctl(absl::StrCat("metrics ", id, " -o json")).out);
    EXPECT_EQ(points.size(), 4500u);
    return true;
  }
  if (method == "ListNodes") return Read(method, "nodes -o json"), true;
  if (method == "GetServerInfo") return Read(method, "version"), true;
  return false;
}

class UserCallTest : public UserCallsTest, public ::testing::WithParamInterface<std::string> {};

TEST_P(UserCallTest, SurvivesALossAtEachPlace) {
  EXPECT_TRUE(Try(GetParam())) << GetParam() << " has no case here: what does simpoctl do when the connection breaks?";
}

// Every method there is, so that a new one needs a case.
std::vector<std::string> Methods() {
  std::vector<std::string> methods;
  const google::protobuf::ServiceDescriptor* service = v1::SubmitJobRequest::descriptor()->file()->service(0);
  for (int i = 0; i < service->method_count(); ++i) methods.push_back(service->method(i)->name());
  return methods;
}

INSTANTIATE_TEST_SUITE_P(All, UserCallTest, ::testing::ValuesIn(Methods()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace simpo
