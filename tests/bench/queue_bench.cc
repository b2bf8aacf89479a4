// How fast the queue drains: the real Controller, Dispatcher and stores on disk, gangs that only pass time.
//
//   queue_bench [DATA_DIR]     default: a folder below the working directory, removed at the end
//
// 1. 15,000 jobs of one second each over 1,000 slots, from the first submission to the last success.
// 2. 2,000 jobs (1,000 running, 1,000 waiting) cancelled at once.
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "common/log.h"
#include "coordinator/controller.h"
#include "coordinator/training_service.h"
#include "simulation.h"

namespace simpo {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kJobs = 15'000, kSlots = 1'000, kCancelled = 2'000;
constexpr double kMostSeconds = 351;

double SecondsSince(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

double CpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "queue_bench: %s\n", what.c_str());
  std::exit(1);
}

// One coordinator without its servers, and the ranks of its gangs.
class Bench {
 public:
  explicit Bench(const std::filesystem::path& dir) : stores_(Stores::Open(dir / "coordinator.db")) {
    Dispatcher::Options options;
    options.outputs_dir = dir / "outputs";
    for (int i = 0; i < kSlots; ++i) options.queue.nodes.push_back({.name = absl::StrCat("n", i), .slots = 1});
    options.liveness.heartbeat = std::chrono::hours(1);
    dispatcher_.emplace(options, *stores_.database, *stores_.jobs, *stores_.metrics, views_);
    if (!dispatcher_->Load(Moment::Now()).ok()) Fail("the stores cannot be read");
    controller_.emplace(*dispatcher_, [](const absl::Status& status) { Fail(std::string(status.message())); });
    stores_.metrics->SetListener([this] { controller_->Wake(); });
    controller_->Start(launcher_);
    ranks_ = std::thread([this] { AttachRanks(); });
  }
  ~Bench() {
    over_ = true;
    ranks_.join();
    controller_->Stop();
  }

  // Returns when all are acknowledged.
  void Submit(int count, int64_t work_ms) {
    launcher_.SetWork(work_ms);
    std::atomic<int> answered = 0;
    for (int i = 0; i < count; ++i) {
      controller_->Submit(SimulatedSubmission("bench", 1, 1), "", [&](const auto& answer) {
        if (!answer.ok()) Fail(std::string(answer.status().message()));
        ++answered;
      });
    }
    while (answered < count) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  void CancelAll() {
    std::vector<std::string> ids;
    for (const JobViews::View& view : views_.All()) {
      if (!IsFinal(view->job.state())) ids.push_back(view->job.id());
    }
    if (ids.size() != kCancelled) Fail(absl::StrCat(ids.size(), " jobs to cancel"));
    std::atomic<int> answered = 0;
    for (const std::string& id : ids) {
      controller_->Cancel(id, [&](const auto& answer) {
        if (!answer.ok()) Fail(std::string(answer.status().message()));
        ++answered;
      });
    }
    while (answered < kCancelled) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  int Count(v1::JobState state) {
    if (SlotsTaken(views_) > kSlots) Fail("more slots are taken than there are");
    int count = 0;
    for (const JobViews::View& view : views_.All()) count += view->job.state() == state;
    return count;
  }
  void WaitFor(v1::JobState state, int count) {
    while (Count(state) < count) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  int starts() const { return launcher_.starts(); }
  Histogram commits() const { return controller_->stats().commit_seconds; }

 private:
  void AttachRanks() {
    while (!over_) {
      for (const GangRequest& gang : launcher_.TakeStarted()) {
        controller_->Attach(HelloOf(gang, 0), std::make_shared<SimulatedRank>(launcher_, gang.job_id, gang.attempt));
        controller_->Receive({gang.job_id, gang.attempt, 0}, StepMessage(1), [] {});
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }

  Stores stores_;
  SimulatedLauncher launcher_{[] { return Moment::Now().unix_ms; }};
  JobViews views_;
  std::optional<Dispatcher> dispatcher_;
  std::optional<Controller> controller_;
  std::atomic<bool> over_ = false;
  std::thread ranks_;
};

int Main(const std::filesystem::path& dir) {
  SetLogLevel(LogLevel::kWarning);
  Bench bench(dir);
  const auto begin = Clock::now();
  bench.Submit(kJobs, /*work_ms=*/1'000);
  const double submitted = SecondsSince(begin);
  bench.WaitFor(v1::JOB_STATE_SUCCEEDED, kJobs);
  const double drained = SecondsSince(begin);
  const Histogram commits = bench.commits();
  if (bench.starts() != kJobs) Fail(absl::StrCat(bench.starts(), " gangs were started for ", kJobs, " jobs"));
  std::printf(
      "drain: %d jobs of 1 s over %d slots in %.1f s (at most %.0f; %.1f s would be ideal); all acknowledged "
      "after %.1f s; %.1f s of CPU; %lld commits of %.1f ms\n",
      kJobs, kSlots, drained, kMostSeconds, static_cast<double>(kJobs) / kSlots, submitted, CpuSeconds(),
      static_cast<long long>(commits.count), 1e3 * commits.sum / static_cast<double>(commits.count));

  bench.Submit(kCancelled, /*work_ms=*/3'600'000);
  bench.WaitFor(v1::JOB_STATE_RUNNING, kSlots);
  const auto cancel = Clock::now();
  bench.CancelAll();
  const double acknowledged = SecondsSince(cancel);
  bench.WaitFor(v1::JOB_STATE_CANCELLED, kCancelled);
  std::printf(
      "cancel: %d jobs, %d of them running; acknowledged after %.2f s, all ended after %.2f s, of which the "
      "gangs' checkpoints take %.1f s\n",
      kCancelled, kSlots, acknowledged, SecondsSince(cancel), SimulatedLauncher::kCheckpointMs / 1e3);
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  std::printf("memory: %ld MiB at most\n", usage.ru_maxrss / 1024);
  return drained < kMostSeconds ? 0 : 1;
}

}  // namespace
}  // namespace simpo

int main(int argc, char** argv) {
  namespace fs = std::filesystem;
  const fs::path dir = argc > 1 ? argv[1] : fs::absolute("queue_bench_data");
  if (fs::exists(dir / "coordinator.db")) simpo::Fail(dir.string() + " holds a database; name an empty folder");
  fs::create_directories(dir);
  const int code = simpo::Main(dir);
  if (argc <= 1) fs::remove_all(dir);
  return code;
}
