// Real supervisors and processes; the worker and mpirun are shell scripts. The supervisor is the real
// simpo-coordinator, whose path the build passes.
#include "coordinator/launcher_mpirun.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "coordinator/attempt_output.h"
#include "coordinator/file_lock.h"
#include "coordinator/subprocess.h"
#include "testing.h"

namespace simpo {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Phase = GangStatus::Phase;

class LauncherTest : public ::testing::Test {
 protected:
  ~LauncherTest() override {
    // Whatever a failed test has left.
    for (pid_t pid : Processes()) kill(pid, SIGKILL);
  }

  void Script(const std::string& name, const std::string& body) {
    WriteText(dir_ / name, "#!/bin/sh\n" + body);
    chmod((dir_ / name).c_str(), 0755);
  }
  // `worker` gets --job FILE prepare; `mpirun` gets what a real one gets.
  MpirunLauncher& Launcher(const std::string& worker, const std::string& mpirun) {
    Script("worker", worker);
    Script("mpirun", mpirun);
    launcher_.emplace(MpirunLauncher::Options{.attempts_dir = dir_ / "attempts",
                                              .supervisor = SIMPO_COORDINATOR_BINARY,
                                              .worker = dir_ / "worker",
                                              .mpirun = dir_ / "mpirun",
                                              .coordinator_address = "127.0.0.1:1",
                                              .log_limit_bytes = log_limit_bytes_});
    return *launcher_;
  }
  GangRequest Request(bool resume = false) const {
    return {.job_id = job_id_,
            .attempt = 1,
            .ranks = 2,
            .threads_per_rank = 3,
            .resume_latest = resume,
            .job_yaml = "beta: 2\n",
            .log_dir = dir_ / "out" / "logs",
            .output_dir = dir_ / "out"};
  }
  GangStatus Poll() { return launcher_->Poll(job_id_, 1); }
  bool Reaches(Phase phase) {
    return Eventually([&] { return Poll().phase == phase; });
  }
  AttemptFiles Files() const { return {dir_ / "attempts" / job_id_ / "1"}; }
  std::vector<pid_t> Processes() const {
    return ValueOf(ProcessesWithEnvironment(kSecretFileVariable, Files().Secret().string()));
  }
  std::string Log() const { return ReadText(dir_ / "out" / "logs" / "launcher.log"); }

  TempDir dir_;
  const std::string job_id_ = "test" + dir_.path().filename().string();
  int64_t log_limit_bytes_ = 0;
  std::optional<MpirunLauncher> launcher_;
};

TEST_F(LauncherTest, PreparesThenRunsThenTellsTheExitCode) {
  Launcher("echo prepared \"$@\"", "echo gang \"$@\"; echo threads $OMP_NUM_THREADS; exit 75");
  ASSERT_OK(launcher_->Start(Request(/*resume=*/true)).status());
  ASSERT_TRUE(Reaches(Phase::kEnded)) << Log();
  EXPECT_EQ(Poll().exit.exit_code, 75);
  EXPECT_EQ(Poll().exit.phase, "train");
  const std::string log = Log();
  EXPECT_THAT(log, HasSubstr("prepared --job " + Files().Job().string()));
  EXPECT_THAT(log, HasSubstr("--job-id " + job_id_ + " --attempt 1"));
  EXPECT_THAT(log, HasSubstr("-n 2 "));
  EXPECT_THAT(log, HasSubstr("--resume-latest"));
  EXPECT_THAT(log, HasSubstr("threads 3"));
  EXPECT_EQ(ReadText(Files().Job()), "beta: 2\n");
  EXPECT_EQ(ReadText(dir_ / "out" / "job.yaml"), "beta: 2\n");
}

TEST_F(LauncherTest, TheScratchFolderIsNewAndPrivateAndGoesWithTheGang) {
  const std::filesystem::path guessed = "/dev/shm/simpo-" + job_id_ + "-1";
  WriteText(guessed / "planted", "");
  Launcher("", "stat -c 'mode %a' $OMPI_MCA_orte_tmpdir_base; ls -A $OMPI_MCA_orte_tmpdir_base; exec sleep 600");
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kTraining)) << Log();
  ASSERT_TRUE(Eventually([&] { return Log().find("mode ") != std::string::npos; })) << Log();
  EXPECT_THAT(Log(), HasSubstr("mode 700\n"));
  EXPECT_EQ(Log().find("planted"), std::string::npos) << "another's folder is not taken over";
  const std::string scratch = ReadText(Files().Scratch());
  EXPECT_TRUE(std::filesystem::is_directory(scratch)) << scratch;
  ASSERT_OK(launcher_->Terminate(job_id_, 1));
  ASSERT_TRUE(Reaches(Phase::kEnded)) << Log();
  EXPECT_FALSE(std::filesystem::exists(scratch));
  EXPECT_TRUE(std::filesystem::exists(guessed / "planted"));
  std::filesystem::remove_all(guessed);
}

TEST_F(LauncherTest, TheScratchFolderOfALostGangGoesToo) {
  Launcher("", "exec sleep 600");
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kTraining)) << Log();
  const std::string scratch = ReadText(Files().Scratch());
  EXPECT_TRUE(std::filesystem::is_directory(scratch)) << scratch;
  kill(ReadSupervisor(Files())->pid, SIGKILL);
  ASSERT_TRUE(Reaches(Phase::kLost));
  ASSERT_OK(launcher_->Kill(job_id_, 1));
  EXPECT_FALSE(std::filesystem::exists(scratch));
}

TEST_F(LauncherTest, TheLogsOfAnEarlierJobInTheFolderAreNotThisOnes) {
  const std::filesystem::path logs = dir_ / "out" / "logs";
  WriteText(logs / "launcher.log", "simpo-worker: the words of the one before\n");
  WriteText(logs / "rank-3.log", "simpo-worker: its rank 3\n");
  WriteText(logs / "notes.txt", "the user's");
  Launcher("echo prepared", "echo trains; exit 75");
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_OK(launcher_->Start(Request()).status());  // an attempt that runs keeps its own
  ASSERT_TRUE(Reaches(Phase::kEnded)) << Log();
  EXPECT_EQ(LastWords(logs, 4), "");
  EXPECT_THAT(Log(), HasSubstr("prepared\ntrains\n"));
  EXPECT_FALSE(std::filesystem::exists(logs / "rank-3.log"));
  EXPECT_TRUE(std::filesystem::exists(logs / "notes.txt"));
}

TEST_F(LauncherTest, NothingIsWrittenThroughALinkInTheOutputFolder) {
  WriteText(dir_ / "others", "another's");
  std::filesystem::create_directories(dir_ / "out");
  for (const char* link : {"job.yaml.tmp", "job.yaml"}) {
    std::filesystem::create_symlink(dir_ / "others", dir_ / "out" / link);
  }
  Launcher("", "");
  ASSERT_OK(launcher_->Start(Request()).status());
  EXPECT_EQ(ReadText(dir_ / "others"), "another's");
  EXPECT_FALSE(std::filesystem::is_symlink(dir_ / "out" / "job.yaml"));
  EXPECT_EQ(ReadText(dir_ / "out" / "job.yaml"), "beta: 2\n");
  ASSERT_TRUE(Reaches(Phase::kEnded)) << Log();
}

TEST_F(LauncherTest, LogsBehindALinkAreLeftAlone) {
  WriteText(dir_ / "others" / "rank-0.log", "another's");
  std::filesystem::create_directories(dir_ / "out");
  std::filesystem::create_directory_symlink(dir_ / "others", dir_ / "out" / "logs");
  Launcher("", "");
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kEnded));
  EXPECT_EQ(ReadText(dir_ / "others" / "rank-0.log"), "another's");
}

TEST_F(LauncherTest, ALogThatGrowsTooLargeBeginsAnewAndSaysSo) {
  log_limit_bytes_ = 20'000;
  Launcher("", absl::StrCat("for i in 1 2 3 4 5 6; do head -c 30000 /dev/zero | tr '\\0' x; echo; sleep 0.5; done; ",
                            "echo last words; exit 75"));
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kEnded)) << Log();
  const std::string log = Log();
  EXPECT_THAT(log, HasSubstr("begins anew here"));
  EXPECT_THAT(log, HasSubstr("last words"));
  EXPECT_LT(log.size(), 150'000u) << "it would be 180 kB";
}

TEST_F(LauncherTest, NoGangWhenThePreparationFails) {
  Launcher("exit 3", "echo gang");
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kEnded)) << Log();
  EXPECT_EQ(Poll().exit.exit_code, 3);
  EXPECT_EQ(Poll().exit.phase, "prepare");
  EXPECT_EQ(Log().find("gang"), std::string::npos);
}

TEST_F(LauncherTest, AMissingWorkerIsExitCode127) {
  Launcher("", "");
  std::filesystem::remove(dir_ / "worker");
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kEnded)) << Log();
  EXPECT_EQ(Poll().exit.exit_code, 127);
}

TEST_F(LauncherTest, TheSecretIsSecretAndStays) {
  Launcher("", "exec sleep 600");
  EXPECT_EQ(launcher_->ReadSecret(job_id_, 1).status().code(), absl::StatusCode::kNotFound);
  ASSERT_OK(launcher_->Start(Request()).status());
  const std::string secret = *launcher_->ReadSecret(job_id_, 1);
  EXPECT_EQ(secret.size(), 64u);
  struct stat info = {};
  ASSERT_EQ(stat(Files().Secret().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  ASSERT_OK(launcher_->Start(Request()).status());
  EXPECT_EQ(*launcher_->ReadSecret(job_id_, 1), secret);
  ASSERT_TRUE(Reaches(Phase::kTraining)) << Log();
  ASSERT_OK(launcher_->Terminate(job_id_, 1));
  ASSERT_TRUE(Reaches(Phase::kEnded)) << Log();
}

TEST_F(LauncherTest, NeverStartedTwiceAndFoundByANewLauncher) {
  Launcher("", absl::StrCat("echo start >>", (dir_ / "starts").string(), "; exec sleep 600"));
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kTraining)) << Log();
  ASSERT_TRUE(Eventually([&] { return !ReadText(dir_ / "starts").empty(); }));
  const auto options = MpirunLauncher::Options{.attempts_dir = dir_ / "attempts",
                                               .supervisor = SIMPO_COORDINATOR_BINARY,
                                               .worker = dir_ / "worker",
                                               .mpirun = dir_ / "mpirun",
                                               .coordinator_address = "127.0.0.1:2"};
  MpirunLauncher second(options);
  EXPECT_EQ(second.Poll(job_id_, 1).phase, Phase::kTraining);
  ASSERT_OK(second.Start(Request()).status());
  ASSERT_OK(second.PublishAddress(job_id_, 1));
  EXPECT_EQ(ReadText(Files().Address()), "127.0.0.1:2\n");
  ASSERT_OK(second.Terminate(job_id_, 1));
  ASSERT_TRUE(Eventually([&] { return second.Poll(job_id_, 1).phase == Phase::kEnded; })) << Log();
  EXPECT_EQ(second.Poll(job_id_, 1).exit.exit_code, 128 + SIGTERM);
  EXPECT_EQ(ReadText(dir_ / "starts"), "start\n");
  ASSERT_OK(second.Start(Request()).status());
  EXPECT_EQ(second.Poll(job_id_, 1).phase, Phase::kEnded) << "an attempt that has ended is not begun again";
}

TEST_F(LauncherTest, TerminateLeavesNoProcessEvenOfAGangThatWillNotGo) {
  // The gang ignores SIGTERM, and so do children that it has cast off.
  Launcher("", "trap '' TERM; (trap '' TERM; setsid sleep 600) & sleep 600; sleep 600");
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kTraining)) << Log();
  ASSERT_TRUE(Eventually([&] { return Processes().size() >= 3; }));
  ASSERT_OK(launcher_->Terminate(job_id_, 1));
  ASSERT_TRUE(Reaches(Phase::kEnded)) << Log();
  EXPECT_THAT(Processes(), IsEmpty());
}

TEST_F(LauncherTest, ASupervisorThatIsKilledIsLostAndItsGangSwept) {
  Launcher("", "exec sleep 600");
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kTraining)) << Log();
  ASSERT_TRUE(Eventually([&] { return !Processes().empty(); }));
  kill(ReadSupervisor(Files())->pid, SIGKILL);
  ASSERT_TRUE(Reaches(Phase::kLost));
  EXPECT_THAT(Poll().reason, HasSubstr("without a word"));
  EXPECT_FALSE(Processes().empty());
  ASSERT_OK(launcher_->Kill(job_id_, 1));
  EXPECT_TRUE(Eventually([&] { return Processes().empty(); }));
}

TEST_F(LauncherTest, WithoutFilesToOpenNothingIsTakenForGone) {
  const auto options = [this] {
    return MpirunLauncher::Options{.attempts_dir = dir_ / "attempts",
                                   .supervisor = SIMPO_COORDINATOR_BINARY,
                                   .worker = dir_ / "worker",
                                   .mpirun = dir_ / "mpirun",
                                   .coordinator_address = "127.0.0.1:2"};
  };
  Launcher("", absl::StrCat("echo start >>", (dir_ / "starts").string(), "; exec sleep 600"));
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kTraining)) << Log();
  ASSERT_TRUE(Eventually([&] { return !ReadText(dir_ / "starts").empty(); }));
  const pid_t supervisor = ReadSupervisor(Files())->pid;
  MpirunLauncher second(options());  // the gang is no child of this one
  {
    const NoMoreFiles none;
    const GangStatus status = second.Poll(job_id_, 1);
    EXPECT_EQ(status.phase, Phase::kUnknown);
    EXPECT_THAT(status.reason, HasSubstr("Too many open files"));
    EXPECT_FALSE(second.Start(Request()).ok());
    EXPECT_FALSE(second.Terminate(job_id_, 1).ok());
    EXPECT_FALSE(second.Kill(job_id_, 1).ok());
    EXPECT_FALSE(second.RunsFor(job_id_, 1));
    EXPECT_EQ(FileLock::IsHeld(Files().Lock()).status().code(), absl::StatusCode::kUnavailable);
    second.Sweep([](const std::string&) { return false; });
  }
  EXPECT_EQ(second.Poll(job_id_, 1).phase, Phase::kTraining) << "nobody was reached, and nothing removed";
  ASSERT_OK(second.Terminate(job_id_, 1));
  ASSERT_TRUE(Eventually([&] { return second.Poll(job_id_, 1).phase == Phase::kEnded; })) << Log();
  EXPECT_EQ(ReadText(dir_ / "starts"), "start\n");
  waitpid(supervisor, nullptr, 0);
  {
    const NoMoreFiles none;
    EXPECT_EQ(second.Poll(job_id_, 1).phase, Phase::kUnknown) << "its exit code cannot be read";
  }
  EXPECT_EQ(second.Poll(job_id_, 1).phase, Phase::kEnded);
}

TEST_F(LauncherTest, AfterAJobNothingOfItsAttemptsIsLeft) {
  Launcher("exit 0", "exit 0");
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kEnded));
  EXPECT_TRUE(std::filesystem::exists(Files().dir));
  launcher_->Forget(job_id_);
  EXPECT_FALSE(std::filesystem::exists(dir_ / "attempts" / job_id_));
  EXPECT_TRUE(std::filesystem::exists(dir_ / "out" / "logs")) << "the user's";
  launcher_->Forget(job_id_);
}

TEST_F(LauncherTest, WhatIsLeftOfUnknownJobsIsEndedAndRemoved) {
  Launcher("exit 0", "exec sleep 1000");
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kTraining));
  ASSERT_TRUE(Eventually([&] { return Processes().size() >= 1; }));
  WriteText(dir_ / "attempts" / "old" / "1" / "exit.json", "{}");
  launcher_->Sweep([&](const std::string& id) { return id == job_id_; });
  EXPECT_FALSE(std::filesystem::exists(dir_ / "attempts" / "old"));
  EXPECT_EQ(Poll().phase, Phase::kTraining) << "this one is known";
  launcher_->Sweep([](const std::string&) { return false; });
  EXPECT_TRUE(Eventually([&] { return Processes().empty(); }));
  EXPECT_FALSE(std::filesystem::exists(dir_ / "attempts" / job_id_));
}

TEST_F(LauncherTest, RanksOfAnUnknownJobAreEndedWithoutTheirSupervisorToo) {
  Launcher("exit 0", "exec sleep 1000");
  ASSERT_OK(launcher_->Start(Request()).status());
  ASSERT_TRUE(Reaches(Phase::kTraining));
  ASSERT_TRUE(Eventually([&] { return !Processes().empty(); }));
  ASSERT_OK(SignalProcess(ValueOf(ReadSupervisor(Files())), SIGKILL));
  ASSERT_TRUE(Reaches(Phase::kLost));
  ASSERT_FALSE(Processes().empty());
  launcher_->Sweep([](const std::string&) { return false; });
  EXPECT_TRUE(Eventually([&] { return Processes().empty(); }));
}

TEST_F(LauncherTest, ARestartedMachineIsToldFromACrash) {
  Launcher("", "");
  std::filesystem::create_directories(Files().dir);
  ASSERT_OK(WriteSupervisor(Files(), {.pid = 1, .start_time = 1, .boot_id = "another-boot"}));
  EXPECT_EQ(Poll().phase, Phase::kLost);
  EXPECT_THAT(Poll().reason, HasSubstr("machine was restarted"));
}

TEST_F(LauncherTest, AnOutputFolderThatCannotBeMadeIsAnErrorWithItsPath) {
  Launcher("", "");
  WriteText(dir_ / "file", "");
  GangRequest request = Request();
  request.log_dir = dir_ / "file" / "logs";
  const absl::Status status = launcher_->Start(request).status();
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()), HasSubstr((dir_ / "file").string()));
}

TEST(FileLockTest, OneHolderAndAnybodyMayAsk) {
  TempDir dir;
  EXPECT_FALSE(ValueOf(FileLock::IsHeld(dir / "lock")));
  {
    auto lock = FileLock::Acquire(dir / "lock");
    ASSERT_OK(lock.status());
    EXPECT_TRUE(ValueOf(FileLock::IsHeld(dir / "lock")));
    EXPECT_EQ(FileLock::Acquire(dir / "lock").status().code(), absl::StatusCode::kAlreadyExists);
  }
  EXPECT_FALSE(ValueOf(FileLock::IsHeld(dir / "lock")));
  EXPECT_EQ(FileLock::Acquire(dir / "no" / "lock").status().code(), absl::StatusCode::kUnavailable);
}

TEST(SubprocessTest, ASignalReachesTheProcessThatWasMeantOrNone) {
  const pid_t pid = ValueOf(SpawnInNewGroup({"sleep", "1000"}, {{"SIMPO_TEST", "signal"}}));
  ProcessIdentity identity = *IdentifyProcess(pid);
  ProcessIdentity earlier = identity;
  --earlier.start_time;
  EXPECT_TRUE(absl::IsNotFound(SignalProcess(earlier, SIGKILL))) << "one that had the same number before";
  ASSERT_OK(SignalProcessesWithEnvironment("SIMPO_TEST", "another", SIGKILL));
  {
    const NoMoreFiles none;
    EXPECT_EQ(SignalProcess(identity, SIGKILL).code(), absl::StatusCode::kUnavailable);
    EXPECT_EQ(SignalProcessesWithEnvironment("SIMPO_TEST", "signal", SIGKILL).code(), absl::StatusCode::kUnavailable);
    EXPECT_EQ(Descendants(getpid()).status().code(), absl::StatusCode::kUnavailable);
  }
  EXPECT_EQ(ValueOf(IdentifyProcess(pid)), identity) << "it runs on";
  ASSERT_OK(SignalProcess(identity, SIGKILL));
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_EQ(ExitCodeOfWaitStatus(status), 137);
  EXPECT_TRUE(absl::IsNotFound(SignalProcess(identity, SIGKILL)));
}

// The kernel lets a file of /proc be opened and then fails to read it, when the process ends in between.
TEST(SubprocessTest, AProcessMayEndWhileItIsLookedAt) {
  using ::testing::AnyOf;
  using enum absl::StatusCode;
  std::atomic<pid_t> pid = getpid();
  std::atomic<bool> stop = false;
  std::thread looker([&] {
    while (!stop) EXPECT_THAT(IdentifyProcess(pid).status().code(), AnyOf(kOk, kNotFound));
  });
  for (int i = 0; i < 300; ++i) {
    pid = fork();
    if (pid == 0) {
      pause();
      _exit(0);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
  }
  stop = true;
  looker.join();
  EXPECT_TRUE(absl::IsNotFound(IdentifyProcess(pid).status()));
}

TEST(SubprocessTest, IdentityAndExitCodes) {
  const ProcessIdentity self = ValueOf(IdentifyProcess(getpid()));
  ProcessIdentity later = self;
  ++later.start_time;
  ASSERT_OK(SignalProcess(self, 0));
  EXPECT_TRUE(absl::IsNotFound(SignalProcess(later, 0))) << "the same number, but another process";
  EXPECT_EQ(ExitCodeOfWaitStatus(3 << 8), 3);
  EXPECT_EQ(ExitCodeOfWaitStatus(SIGKILL), 137);
}

}  // namespace
}  // namespace simpo
