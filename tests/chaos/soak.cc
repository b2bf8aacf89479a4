// Hours of short jobs on one coordinator, whose history is so short that it is pruned all the time: what it takes of
// the machine must not grow with the number of jobs that it has seen.
//
//   soak --data-dir DIR [--minutes 120] [--jobs-per-second 2]     DIR: a new folder; DIR/soak.csv has a line each 10 s
//
// The first half is warm-up. Over the second half the slope of each figure must lie below its bound; exit code 1: one
// does not. A run of less than 20 minutes has no verdict.
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator_process.h"
#include "service.h"
#include "simulated_run.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr int kSlots = 8;
constexpr double kLeastMinutes = 20;                               // for a verdict
constexpr char kHistoryDays[] = "0.0007", kFullDays[] = "0.0002";  // a minute; 17 seconds
constexpr int64_t kMostLive = 40;                                  // on a machine that is too slow for the rate
constexpr auto kKeepOutputs = seconds(120);

struct Options {
  std::string data_dir;
  double minutes = 120;
  double jobs_per_second = 2;
};

[[noreturn]] void Die(const std::string& why) {
  std::fprintf(stderr, "soak: %s\n", why.c_str());
  std::exit(1);
}

// One figure over time, and how much it may grow in an hour: an absolute part, and one of its mean.
struct Curve {
  const char* name;
  double bound, bound_ratio;
  std::vector<double> values = {};
};

// Of the least squares line through the second half, per hour.
double SlopePerHour(const std::vector<double>& hours, const std::vector<double>& values) {
  const size_t begin = values.size() / 2, count = values.size() - begin;
  double mean_x = 0, mean_y = 0, xy = 0, xx = 0;
  for (size_t i = begin; i < values.size(); ++i) {
    mean_x += hours[i] / static_cast<double>(count);
    mean_y += values[i] / static_cast<double>(count);
  }
  for (size_t i = begin; i < values.size(); ++i) {
    xy += (hours[i] - mean_x) * (values[i] - mean_y);
    xx += (hours[i] - mean_x) * (hours[i] - mean_x);
  }
  return xx > 0 ? xy / xx : 0;
}

double CountFiles(const fs::path& dir) {
  std::error_code error;
  int64_t count = 0;
  for (fs::recursive_directory_iterator entry(dir, error), end; !error && entry != end; entry.increment(error)) ++count;
  return static_cast<double>(count);
}

double FileMiB(const fs::path& dir, const std::string& name) {
  double bytes = 0;
  for (const char* end : {"", "-wal"}) {
    std::error_code error;
    const auto size = fs::file_size(dir / (name + end), error);
    if (!error) bytes += static_cast<double>(size);
  }
  return bytes / (1 << 20);
}

class Soak {
 public:
  explicit Soak(const Options& options) : options_(options), dir_(fs::absolute(options.data_dir)) {}

  int Run() {
    if (fs::exists(dir_) && !fs::is_empty(dir_)) Die(dir_.string() + " is not empty; name a new --data-dir");
    fs::create_directories(dir_);
    const std::string gang = ProgramsDir() / "simulated_gang";
    coordinator_ = std::make_unique<CoordinatorProcess>(std::vector<std::string>{"--data-dir",   Data().string(),
                                                                                 "--listen",     "127.0.0.1:0",
                                                                                 "--http",       "127.0.0.1:0",
                                                                                 "--slots",      absl::StrCat(kSlots),
                                                                                 "--worker",     gang,
                                                                                 "--mpirun",     gang,
                                                                                 "--preemption", "--restart-pause-s",
                                                                                 "0.2",          "--history-days",
                                                                                 kHistoryDays,   "--metrics-full-days",
                                                                                 kFullDays,      "--keep-ended-minutes",
                                                                                 "0.2"},
                                                        dir_ / "coordinator.log");
    const std::string address = coordinator_->WaitUntilReady();
    if (address.empty()) Die("the coordinator did not start; see coordinator.log");
    service_.Appear(address);
    std::thread submitter([this] { SubmitAndCancel(); });
    std::thread watcher([this] { WatchJobs(); });
    std::thread lister([this] { ListThings(); });
    Sample();
    stop_ = true;
    submitter.join();
    watcher.join();
    lister.join();
    coordinator_->Stop();
    for (const AttemptProcess& process : AttemptProcesses(Data())) kill(process.pid, SIGKILL);
    return Verdict();
  }

 private:
  fs::path Data() const { return dir_ / "data"; }
  void Check(const char* what, const grpc::Status& status) {
    if (!status.ok()) Die(absl::StrCat(what, " failed: ", status.error_message()));
  }

  void SubmitAndCancel() {
    std::mt19937_64 random(1);
    const auto between = [&](int low, int high) { return std::uniform_int_distribution(low, high)(random); };
    const Service::Stub stub = service_.Wait(milliseconds(0));
    const Clock::time_point begin = Clock::now();
    std::deque<std::pair<Clock::time_point, fs::path>> outputs;
    for (int64_t number = 1; !stop_; ++number) {
      SimulatedJob spec{.ranks = between(1, 2), .steps = between(10, 60), .step_ms = between(5, 30), .save_steps = 10};
      spec.seed = static_cast<uint64_t>(number);
      if (between(1, 10) == 1) spec.faults = 1;
      if (between(1, 20) == 1) spec.exit_code = 3;
      spec.output_dir = dir_ / "outputs" / absl::StrCat(number);
      v1::SubmitJobRequest request;
      request.set_request_id(absl::StrCat("soak-", number));
      request.set_job_yaml(SimulatedJobYaml(spec));
      request.set_base_dir("/");
      request.set_user(absl::StrCat("user-", number % 10));
      v1::SubmitJobResponse response;
      const Clock::time_point asked = Clock::now();
      Check("a submit", stub->SubmitJob(Context().get(), request, &response));
      {
        const std::lock_guard lock(mutex_);
        submit_ms_.push_back(std::chrono::duration<double, std::milli>(Clock::now() - asked).count());
        newest_.push_back(response.job().id());
        if (newest_.size() > 20) newest_.pop_front();
      }
      ++submitted_;
      if (between(1, 6) == 1) {
        v1::CancelJobRequest cancel;
        const std::lock_guard lock(mutex_);
        cancel.set_job_id(newest_[static_cast<size_t>(between(0, static_cast<int>(newest_.size()) - 1))]);
        v1::CancelJobResponse answer;
        Check("a cancel", stub->CancelJob(Context().get(), cancel, &answer));
      }
      // Output folders are the users', who clear them away.
      outputs.emplace_back(Clock::now(), spec.output_dir);
      while (outputs.front().first + kKeepOutputs < Clock::now()) {
        std::error_code error;
        fs::remove_all(outputs.front().second, error);
        outputs.pop_front();
      }
      const auto next =
          begin + milliseconds(static_cast<int64_t>(1e3 * static_cast<double>(number) / options_.jobs_per_second));
      std::this_thread::sleep_until(next);
      while (live_ > kMostLive && !stop_) std::this_thread::sleep_for(milliseconds(100));
    }
  }

  std::string AnyJob(size_t place) {
    const std::lock_guard lock(mutex_);
    return newest_.empty() ? "" : newest_[place % newest_.size()];
  }

  // Streams that begin and end all the time, some before their job has ended.
  void WatchJobs() {
    const Service::Stub stub = service_.Wait(milliseconds(0));
    for (size_t i = 0; !stop_; ++i) {
      std::this_thread::sleep_for(milliseconds(100));
      v1::WatchJobRequest request;
      request.set_job_id(AnyJob(i));
      if (request.job_id().empty()) continue;
      const auto context = Context(seconds(1));
      const auto stream = stub->WatchJob(context.get(), request);
      v1::WatchJobResponse response;
      while (stream->Read(&response)) {
      }
      (void)stream->Finish();
    }
  }

  void ListThings() {
    const Service::Stub stub = service_.Wait(milliseconds(0));
    for (size_t i = 0; !stop_; ++i) {
      std::this_thread::sleep_for(milliseconds(500));
      grpc::Status status;
      const auto jobs = ListJobs(*stub, 0, &status);
      Check("a list", status);
      listed_ = static_cast<int64_t>(jobs->size());
      live_ = std::count_if(jobs->begin(), jobs->end(), [](const v1::Job& job) { return !IsFinal(job.state()); });
      std::vector<v1::MetricPoint> points;
      if (const std::string id = AnyJob(i); !id.empty()) (void)ListPoints(*stub, id, &points);
    }
  }

  void Sample() {
    std::ofstream csv(dir_ / "soak.csv");
    csv << "seconds,jobs";
    for (const Curve& curve : curves_) csv << "," << curve.name;
    csv << std::endl;
    const Clock::time_point begin = Clock::now();
    const auto length = milliseconds(static_cast<int64_t>(options_.minutes * 60'000));
    for (auto next = begin; Clock::now() < begin + length;) {
      next += seconds(10);
      std::this_thread::sleep_until(std::min(next, begin + length));
      if (coordinator_->HasEnded()) Die("the coordinator has ended; see coordinator.log");
      const pid_t pid = coordinator_->pid();
      const double hours = std::chrono::duration<double>(Clock::now() - begin).count() / 3600;
      hours_.push_back(hours);
      const double values[] = {static_cast<double>(ProcessFigure(pid, "VmRSS")) / 1024,
                               static_cast<double>(OpenFiles(pid)),
                               static_cast<double>(ProcessFigure(pid, "Threads")),
                               FileMiB(Data(), "coordinator.db"),
                               FileMiB(Data(), "metrics.db"),
                               static_cast<double>(listed_.load()),
                               CountFiles(Data())};
      csv << static_cast<int64_t>(hours * 3600) << "," << submitted_;
      for (size_t i = 0; i < curves_.size(); ++i) {
        curves_[i].values.push_back(values[i]);
        csv << "," << values[i];
      }
      csv << std::endl;
    }
  }

  int Verdict() {
    std::sort(submit_ms_.begin(), submit_ms_.end());
    std::printf("%.0f minutes, %lld jobs; submits: p50 %.1f ms, p99 %.1f ms\n", options_.minutes,
                static_cast<long long>(submitted_), submit_ms_[submit_ms_.size() / 2],
                submit_ms_[submit_ms_.size() * 99 / 100]);
    bool flat = true;
    for (const Curve& curve : curves_) {
      const std::vector<double>& values = curve.values;
      const auto half = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
      double mean = 0;
      for (auto value = half; value != values.end(); ++value) mean += *value / static_cast<double>(values.end() - half);
      const double slope = SlopePerHour(hours_, values), bound = curve.bound + curve.bound_ratio * mean;
      const bool ok = slope <= bound;
      flat &= ok;
      std::printf(
          "%-16s first %8.1f, mean of the second half %8.1f, most %8.1f; grows by %8.2f an hour (at most %.2f) %s\n",
          curve.name, values.front(), mean, *std::max_element(values.begin(), values.end()), slope, bound,
          ok ? "" : "GROWS");
    }
    if (options_.minutes < kLeastMinutes) {
      std::printf("too short for a verdict\n");
      return 0;
    }
    std::printf("%s; the curve is in %s\n", flat ? "PASSED" : "FAILED", (dir_ / "soak.csv").c_str());
    return flat ? 0 : 1;
  }

  const Options options_;
  const fs::path dir_;
  std::unique_ptr<CoordinatorProcess> coordinator_;
  Service service_;
  std::atomic<bool> stop_ = false;
  std::atomic<int64_t> submitted_ = 0, listed_ = 0, live_ = 0;
  std::mutex mutex_;
  std::deque<std::string> newest_;  // guarded by mutex_
  std::vector<double> submit_ms_;   // guarded by mutex_
  std::vector<double> hours_;
  std::vector<Curve> curves_ = {
      {"rss_mib", 1, 0.03},       {"open_files", 3, 0.05},  {"threads", 2, 0.05}, {"coordinator_mib", 0.5, 0.05},
      {"metrics_mib", 0.5, 0.05}, {"jobs_listed", 10, 0.1}, {"files", 100, 0.1}};
};

int Main(int argc, char** argv) {
  CLI::App app("Runs thousands of short jobs and watches what their coordinator takes of the machine.");
  Options options;
  app.add_option("--data-dir", options.data_dir, "A new folder")->required();
  app.add_option("--minutes", options.minutes, "How long")->capture_default_str();
  app.add_option("--jobs-per-second", options.jobs_per_second, "That are submitted")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  return Soak(options).Run();
}

}  // namespace
}  // namespace simpo

int main(int argc, char** argv) { return simpo::Main(argc, argv); }
