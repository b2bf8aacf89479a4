// kill -9 at random moments against a model of the history. Clients submit, cancel, change priorities, list and watch
// while the coordinator is killed and started again, also in the middle of its start and of the recovery; now and then
// a supervisor or a gang is killed too. What must hold all the time and in the end stands in job_history.h.
//
//   chaos --data-dir DIR [--rounds 1000] [--seed N]     DIR: a new folder, or one of an earlier run, which is emptied
//
// The seed decides what is done; the machine, when exactly. Exit code 1: something did not hold, and DIR is kept.
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <shared_mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "coordinator_process.h"
#include "job_history.h"
#include "service.h"
#include "simulated_run.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int kSlots = 6;
constexpr size_t kMostLive = 20;            // jobs that no client adds to
constexpr int kRoundsBetweenLooks = 20;     // until all jobs are let come to their end and looked at
constexpr milliseconds kPatience{900'000};  // machines are slow at times; a job that hangs does not end at all

struct Options {
  std::string data_dir;
  int rounds = 1'000;
  uint64_t seed = 0;  // 0: by the clock
  int clients = 4;
  int watchers = 2;
};

class Dice {
 public:
  explicit Dice(uint64_t seed) : random_(seed) {}
  // Both ends may come.
  int Between(int low, int high) { return std::uniform_int_distribution(low, high)(random_); }
  bool Percent(int percent) { return Between(1, 100) <= percent; }
  void Pause(int low_ms, int high_ms) { std::this_thread::sleep_for(milliseconds(Between(low_ms, high_ms))); }
  template <typename T>
  T& Of(std::vector<T>& all) {
    return all[static_cast<size_t>(Between(0, static_cast<int>(all.size()) - 1))];
  }

 private:
  std::mt19937_64 random_;
};

struct Counts {
  std::atomic<int64_t> answers = 0, without_answer = 0, submits_again = 0, cancels = 0, priorities = 0, watched = 0;
  // The coordinator to kill as soon as somebody is told that something is done: nothing may be told too early.
  std::atomic<pid_t> kill_at_answer = 0;
};

// One user: its jobs are its own, so what it asked of each of them happened in that order.
class Client {
 public:
  Client(int number, uint64_t seed, Service& service, JobHistory& history, Counts& counts, std::string outputs)
      : number_(number),
        dice_(seed * 1'000 + static_cast<uint64_t>(number)),
        service_(service),
        history_(history),
        counts_(counts),
        outputs_(std::move(outputs)) {}

  // Holds `acting` while it asks for something.
  void Run(const std::atomic<bool>& stop, const std::atomic<bool>& pause, std::shared_mutex& acting) {
    while (!stop) {
      dice_.Pause(2, 60);
      const Service::Stub stub = service_.Wait(milliseconds(50));
      const std::shared_lock lock(acting);
      if (stub != nullptr && !pause) Act(*stub);
    }
  }

 private:
  void Act(v1::TrainingService::Stub& stub) {
    const int choice = dice_.Between(1, 100);
    if (!unanswered_.empty()) {
      // Whoever got no answer asks again, or never learns what became of it.
      const JobHistory::JobPtr job = unanswered_.back();
      if (dice_.Percent(20) || Submit(stub, job)) unanswered_.pop_back();
    } else if (choice <= 60 && history_.CountLive() < kMostLive) {
      const JobHistory::JobPtr job = NewJob();
      if (!Submit(stub, job)) unanswered_.push_back(job);
    } else if (choice <= 66) {
      List(stub);
    } else if (!jobs_.empty()) {
      const size_t newest = std::min<size_t>(jobs_.size(), 8);
      const JobHistory::JobPtr job =
          jobs_[jobs_.size() - 1 - static_cast<size_t>(dice_.Between(0, static_cast<int>(newest) - 1))];
      if (choice <= 72)
        Cancel(stub, *job);
      else if (choice <= 80)
        SetPriority(stub, *job);
      else if (choice <= 88)
        SubmitAgain(stub, job);
      else
        Get(stub, *job);
    }
  }

  JobHistory::JobPtr NewJob() {
    SimulatedJob spec;
    spec.ranks = dice_.Between(1, 3);
    spec.steps = dice_.Between(2, 30);
    spec.step_ms = dice_.Between(2, 50);
    spec.save_steps = dice_.Between(1, 6);
    spec.seed = static_cast<uint64_t>(dice_.Between(1, 1'000'000'000));
    const int kind = dice_.Between(1, 100);
    if (kind <= 5)
      spec.exit_code = 2;
    else if (kind <= 12)
      spec.exit_code = 3;
    else if (kind <= 25)
      spec.faults = dice_.Between(1, 2);
    else if (kind <= 30)
      spec.faults = 9, spec.max_restarts = 1;
    const std::string request = absl::StrCat("client-", number_, "-", ++submitted_);
    if (dice_.Percent(25)) spec.output_dir = absl::StrCat(outputs_, "/", request);
    return history_.Add(request, spec);
  }

  static v1::SubmitJobRequest RequestOf(const TrackedJob& job) {
    v1::SubmitJobRequest request;
    request.set_request_id(job.request_id);
    request.set_job_yaml(SimulatedJobYaml(job.spec));
    request.set_file_name("chaos.yaml");
    request.set_base_dir("/");
    return request;
  }

  // Whether there was an answer; `done`: it says that something will last.
  bool Answered(const char* what, const std::string& job, const grpc::Status& status, bool done = false) {
    if (status.ok() && done) {
      if (const pid_t pid = counts_.kill_at_answer.exchange(0)) kill(pid, SIGKILL);
    }
    if (status.ok()) return ++counts_.answers > 0;
    ++counts_.without_answer;
    if (!NoAnswer(status)) {
      history_.Fail(
          absl::StrCat(what, " of ", job, ": ", static_cast<int>(status.error_code()), " ", status.error_message()));
    }
    return false;
  }

  bool Submit(v1::TrainingService::Stub& stub, const JobHistory::JobPtr& job) {
    v1::SubmitJobResponse response;
    const int64_t asked_at = history_.Now();
    if (!Answered("submit", job->request_id, stub.SubmitJob(Context().get(), RequestOf(*job), &response),
                  /*done=*/true))
      return false;
    history_.SubmitAnswered(*job, response, asked_at);
    jobs_.push_back(job);
    return true;
  }

  void SubmitAgain(v1::TrainingService::Stub& stub, const JobHistory::JobPtr& job) {
    ++counts_.submits_again;
    v1::SubmitJobRequest request = RequestOf(*job);
    v1::SubmitJobResponse response;
    if (dice_.Percent(30)) {
      request.set_name("another");
      const grpc::Status status = stub.SubmitJob(Context().get(), request, &response);
      if (status.error_code() != grpc::StatusCode::ALREADY_EXISTS && !NoAnswer(status)) {
        history_.Fail(absl::StrCat("another body with request ", job->request_id, ": ", status.error_message()));
      }
      return;
    }
    const int64_t asked_at = history_.Now();
    if (!Answered("second submit", job->request_id, stub.SubmitJob(Context().get(), request, &response))) return;
    if (!response.already_existed()) history_.Fail(absl::StrCat("request ", job->request_id, " made a job once more"));
    history_.SubmitAnswered(*job, response, asked_at);
  }

  void Cancel(v1::TrainingService::Stub& stub, TrackedJob& job) {
    ++counts_.cancels;
    v1::CancelJobRequest request;
    request.set_job_id(job.id);
    v1::CancelJobResponse response;
    history_.CancelTried(job);
    const int64_t asked_at = history_.Now();
    if (!Answered("cancel", job.id, stub.CancelJob(Context().get(), request, &response), /*done=*/true)) return;
    history_.CancelAnswered(job, response.job(), asked_at);
  }

  void SetPriority(v1::TrainingService::Stub& stub, TrackedJob& job) {
    ++counts_.priorities;
    v1::SetPriorityRequest request;
    request.set_job_id(job.id);
    request.set_priority(dice_.Between(-3, 3));
    v1::SetPriorityResponse response;
    history_.PriorityTried(job, request.priority());
    const grpc::Status status = stub.SetPriority(Context().get(), request, &response);
    if (status.error_code() == grpc::StatusCode::FAILED_PRECONDITION) return;  // it has ended
    if (Answered("priority", job.id, status, /*done=*/true)) history_.PriorityAnswered(job, request.priority());
  }

  void Get(v1::TrainingService::Stub& stub, TrackedJob& job) {
    v1::GetJobRequest request;
    request.set_job_id(job.id);
    v1::GetJobResponse response;
    const int64_t asked_at = history_.Now();
    if (!Answered("get", job.id, stub.GetJob(Context().get(), request, &response))) return;
    history_.Saw(response.job(), asked_at);
    history_.SawEvents(job, response.events());
  }

  void List(v1::TrainingService::Stub& stub) {
    grpc::Status status;
    const int64_t asked_at = history_.Now();
    const auto jobs = ListJobs(stub, 50, &status);
    if (Answered("list", "the newest jobs", status)) history_.CheckList(*jobs, {}, asked_at);
  }

  const int number_;
  Dice dice_;
  Service& service_;
  JobHistory& history_;
  Counts& counts_;
  const std::string outputs_;
  int submitted_ = 0;
  std::vector<JobHistory::JobPtr> jobs_;        // that were acknowledged
  std::vector<JobHistory::JobPtr> unanswered_;  // one at most
};

// Follows one job after the other, over all restarts, from where the last stream ended.
void Watch(uint64_t seed, Service& service, JobHistory& history, Counts& counts, const std::atomic<bool>& stop) {
  Dice dice(seed);
  JobHistory::JobPtr job;
  while (!stop) {
    const Service::Stub stub = service.Wait(milliseconds(50));
    std::vector<JobHistory::JobPtr> jobs = history.Unsettled();
    if (stub == nullptr || jobs.empty()) {
      dice.Pause(5, 20);
      continue;
    }
    if (job == nullptr || job->settled || dice.Percent(30)) job = dice.Of(jobs);
    v1::WatchJobRequest request;
    request.set_job_id(job->id);
    request.set_after_sequence(history.events_known(*job));
    const int64_t asked_at = history.Now();
    const auto context = Context(std::chrono::seconds(2));
    const auto stream = stub->WatchJob(context.get(), request);
    std::set<std::pair<int64_t, int>> points;
    v1::WatchJobResponse response;
    while (!stop && stream->Read(&response)) {
      history.Saw(response.job(), asked_at);
      history.SawEvents(*job, response.events());
      counts.watched += response.events_size();
      for (const v1::MetricPoint& point : response.points()) {
        if (!points.insert({point.step(), point.attempt()}).second) {
          history.Fail(absl::StrCat("job ", job->id, ": a watcher was shown step ", point.step(), " twice"));
        }
      }
    }
    context->TryCancel();
    const grpc::Status status = stream->Finish();
    if (!status.ok() && !NoAnswer(status) && status.error_code() != grpc::StatusCode::DEADLINE_EXCEEDED) {
      history.Fail(absl::StrCat("watch of ", job->id, ": ", status.error_message()));
    }
    dice.Pause(1, 20);
  }
}

class Chaos {
 public:
  explicit Chaos(const Options& options)
      : options_(options), dir_(fs::absolute(options.data_dir)), history_(dir_ / "journal"), dice_(options.seed) {}

  int Run() {
    MakeFolder();
    const Clock::time_point begin = Clock::now();
    std::vector<std::thread> threads;
    std::vector<std::unique_ptr<Client>> clients;
    for (int i = 0; i < options_.clients; ++i) {
      clients.push_back(std::make_unique<Client>(i, options_.seed, service_, history_, counts_, dir_ / "outputs"));
      threads.emplace_back([this, client = clients.back().get()] { client->Run(stop_, pause_, acting_); });
    }
    for (int i = 0; i < options_.watchers; ++i) {
      threads.emplace_back(
          [this, i] { Watch(options_.seed + 77 + static_cast<uint64_t>(i), service_, history_, counts_, stop_); });
    }
    int round = 0;
    while (round < options_.rounds && history_.violations() == 0) {
      Round();
      if (++round % kRoundsBetweenLooks == 0 || round == options_.rounds)
        LookAtAll(/*everything=*/round == options_.rounds);
      if (round % 100 == 0) Report(round, begin);
    }
    stop_ = true;
    for (std::thread& thread : threads) thread.join();
    coordinator_.reset();
    Report(round, begin);
    KillWhatIsLeft();
    const size_t violations = history_.violations();
    std::printf("%s: seed %llu, %d rounds, %zu violations\n", violations == 0 ? "PASSED" : "FAILED",
                static_cast<unsigned long long>(options_.seed), round, violations);
    if (violations > 0) std::printf("logs and databases are in %s\n", dir_.c_str());
    return violations == 0 ? 0 : 1;
  }

 private:
  void MakeFolder() {
    const bool ours = fs::exists(dir_ / "journal");
    if (fs::exists(dir_) && !fs::is_empty(dir_) && !ours) {
      std::fprintf(stderr, "chaos: %s is not empty; name a new --data-dir\n", dir_.c_str());
      std::exit(2);
    }
    if (ours) fs::remove_all(dir_);
    fs::create_directories(dir_);
    std::ofstream(dir_ / "journal") << "";
    setenv(kJournalVariable, (dir_ / "journal").c_str(), 1);
  }

  void Start() {
    const std::string gang = ProgramsDir() / "simulated_gang";
    coordinator_ = std::make_unique<CoordinatorProcess>(
        std::vector<std::string>{"--data-dir", Data().string(), "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0",
                                 "--slots", absl::StrCat(kSlots), "--worker", gang, "--mpirun", gang, "--preemption",
                                 "--restart-pause-s", "0.05", "--restart-pause-max-s", "0.2", "--stop-grace-s", "4"},
        dir_ / "coordinator.log");
  }
  fs::path Data() const { return dir_ / "data"; }

  // Returns false when it did not come up.
  bool WaitUntilReady() {
    const std::string address = coordinator_->WaitUntilReady();
    if (address.empty()) {
      history_.Fail("the coordinator did not start; see coordinator.log");
      return false;
    }
    service_.Appear(address);
    return true;
  }

  void Round() {
    const Clock::time_point begin = Clock::now();
    Start();
    if (dice_.Percent(20)) {
      // In the middle of the start.
      std::this_thread::sleep_for(std::chrono::microseconds(dice_.Between(0, 2 * start_us_)));
      ++killed_in_start_;
    } else {
      if (!WaitUntilReady()) return;
      const auto took = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - begin).count();
      start_us_ = static_cast<int>((9 * int64_t{start_us_} + std::min<int64_t>(took, 1'000'000)) / 10);
      if (dice_.Percent(25)) {
        std::this_thread::sleep_for(std::chrono::microseconds(dice_.Between(0, 20'000)));  // while it adopts
      } else {
        CheckList();
        dice_.Pause(20, dice_.Percent(10) ? 3'000 : 700);
        if (dice_.Percent(15)) KillOneProcess();
        if (dice_.Percent(50)) {
          counts_.kill_at_answer = coordinator_->pid();
          for (int i = 0; i < 500 && !coordinator_->HasEnded(); ++i) std::this_thread::sleep_for(milliseconds(2));
          killed_at_answer_ += counts_.kill_at_answer.exchange(0) == 0;
        }
      }
    }
    service_.Vanish();
    if (dice_.Percent(5)) {
      ++stopped_;
      coordinator_->Stop();
    } else {
      coordinator_->Kill();
    }
    if (dice_.Percent(5)) KillOneProcess();
    if (dice_.Percent(30)) dice_.Pause(0, dice_.Percent(10) ? 3'000 : 300);
    history_.ReadJournal();
  }

  // All that was acknowledged is there. Only what has not ended: the whole history is looked at in the end.
  void CheckList() {
    const Service::Stub stub = service_.Wait(milliseconds(0));
    const std::vector<JobHistory::JobPtr> expected = history_.Unsettled();
    const int64_t asked_at = history_.Now();
    grpc::Status status;
    const auto jobs = ListJobs(*stub, 1'000, &status);
    if (jobs) history_.CheckList(*jobs, expected, asked_at);
    if (!jobs) history_.Fail(absl::StrCat("list: ", status.error_message()));
  }

  void KillOneProcess() {
    std::vector<AttemptProcess> processes = AttemptProcesses(Data());
    if (processes.empty()) return;
    const AttemptProcess victim = dice_.Of(processes);
    if (kill(victim.pid, SIGKILL) == 0) ++(victim.supervisor ? killed_supervisors_ : killed_gangs_);
  }

  // Lets every job come to its end, and looks at all of it; then nothing may be left of them.
  void LookAtAll(bool everything) {
    pause_ = true;
    acting_.lock();  // nobody acts any more
    acting_.unlock();
    Start();
    if (!WaitUntilReady()) return;
    const Service::Stub stub = service_.Wait(milliseconds(0));
    const Clock::time_point end = Clock::now() + kPatience;
    grpc::Status status;
    std::vector<v1::Job> jobs;
    while (true) {
      // A call that had no answer may have made a job that nobody but the list knows.
      const int64_t asked_at = history_.Now();
      const auto listed = ListJobs(*stub, everything ? 0 : 1'000, &status);
      if (!listed) return history_.Fail(absl::StrCat("list: ", status.error_message()));
      jobs = *listed;
      history_.CheckList(jobs, everything ? Acknowledged() : history_.Unsettled(), asked_at);
      const auto live =
          std::find_if(jobs.begin(), jobs.end(), [](const v1::Job& job) { return !IsFinal(job.state()); });
      if (live == jobs.end()) break;
      if (Clock::now() > end) {
        return history_.Fail(
            absl::StrCat("job ", live->id(), " is still ", JobStateName(live->state()), ": ", live->reason()));
      }
      std::this_thread::sleep_for(milliseconds(100));
    }
    history_.ReadJournal();
    for (const JobHistory::JobPtr& job : everything ? history_.All() : history_.Unsettled(/*acked_only=*/false)) {
      if (!job->id.empty()) LookAt(*stub, *job);
    }
    CheckNothingIsLeft();
    service_.Vanish();
    coordinator_->Kill();
    pause_ = false;
  }

  std::vector<JobHistory::JobPtr> Acknowledged() const {
    std::vector<JobHistory::JobPtr> jobs = history_.All();
    std::erase_if(jobs, [](const JobHistory::JobPtr& job) { return !job->acked; });
    return jobs;
  }

  void LookAt(v1::TrainingService::Stub& stub, TrackedJob& job) {
    v1::GetJobRequest request;
    request.set_job_id(job.id);
    v1::GetJobResponse response;
    std::vector<v1::MetricPoint> points;
    grpc::Status status = stub.GetJob(Context().get(), request, &response);
    if (status.ok()) status = ListPoints(stub, job.id, &points);
    if (!status.ok()) return history_.Fail(absl::StrCat("get of ", job.id, ": ", status.error_message()));
    history_.CheckEnded(job, response, points);
  }

  void CheckNothingIsLeft() {
    const Clock::time_point end = Clock::now() + milliseconds(60'000);
    while (Clock::now() < end && !(AttemptProcesses(Data()).empty() && ScratchFolders(Data()).empty())) {
      std::this_thread::sleep_for(milliseconds(100));
    }
    for (const AttemptProcess& process : AttemptProcesses(Data())) {
      history_.Fail(absl::StrCat("process ", process.pid, " of an attempt is left though all jobs have ended"));
    }
    for (const std::string& folder : ScratchFolders(Data())) history_.Fail(absl::StrCat(folder, " is left"));
    for (const fs::path& outputs : {dir_ / "outputs", Data() / "outputs"}) {
      std::error_code error;
      for (const auto& output : fs::directory_iterator(outputs, error)) {
        if (fs::exists(output.path() / "job.yaml.tmp")) history_.Fail(output.path().string() + "/job.yaml.tmp is left");
      }
    }
  }

  void KillWhatIsLeft() {
    for (const AttemptProcess& process : AttemptProcesses(Data())) kill(process.pid, SIGKILL);
  }

  void Report(int round, Clock::time_point begin) {
    const JobHistory::Figures figures = history_.figures();
    std::string states;
    for (const auto& [state, count] : figures.states) absl::StrAppend(&states, " ", count, " ", JobStateName(state));
    std::printf(
        "%4d rounds in %.0f s: %lld jobs tried, %lld acknowledged; ended:%s; %lld gangs started; killed: %d "
        "coordinators in their start, %d at an answer, %d others (%d stopped in order), %d supervisors, %d gangs\n"
        "     %lld calls answered, %lld without an answer; %lld submits again, %lld cancels, %lld priorities; %lld "
        "events "
        "(%lld of them watched), %lld points; a start takes %d ms\n",
        round, std::chrono::duration<double>(Clock::now() - begin).count(), static_cast<long long>(figures.jobs),
        static_cast<long long>(figures.acked), states.c_str(), static_cast<long long>(figures.attempts),
        killed_in_start_, killed_at_answer_, round - killed_in_start_ - killed_at_answer_ - stopped_, stopped_,
        killed_supervisors_, killed_gangs_, static_cast<long long>(counts_.answers),
        static_cast<long long>(counts_.without_answer), static_cast<long long>(counts_.submits_again),
        static_cast<long long>(counts_.cancels), static_cast<long long>(counts_.priorities),
        static_cast<long long>(figures.events), static_cast<long long>(counts_.watched),
        static_cast<long long>(figures.points), start_us_ / 1000);
    std::fflush(stdout);
  }

  const Options options_;
  const fs::path dir_;
  JobHistory history_;
  Dice dice_;
  Service service_;
  Counts counts_;
  std::unique_ptr<CoordinatorProcess> coordinator_;
  std::atomic<bool> stop_ = false, pause_ = false;
  std::shared_mutex acting_;
  int start_us_ = 50'000;
  int killed_in_start_ = 0, killed_at_answer_ = 0, stopped_ = 0, killed_supervisors_ = 0, killed_gangs_ = 0;
};

int Main(int argc, char** argv) {
  CLI::App app("Kills a coordinator again and again, and checks what must hold all the same.");
  Options options;
  app.add_option("--data-dir", options.data_dir, "A new folder, or one of an earlier run")->required();
  app.add_option("--rounds", options.rounds, "Kills of the coordinator")->capture_default_str();
  app.add_option("--seed", options.seed, "Of all choices; 0: by the clock")->capture_default_str();
  app.add_option("--clients", options.clients, "Clients that submit, cancel ...")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  if (options.seed == 0)
    options.seed = static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
  return Chaos(options).Run();
}

}  // namespace
}  // namespace simpo

int main(int argc, char** argv) { return simpo::Main(argc, argv); }
