// How much a coordinator takes in. It runs in this process with everything that belongs to it (gRPC, stores on
// disk, supervisors of attempts); only the gangs are simulated: this program speaks for their ranks.
//
//   control_plane_bench --data-dir DIR     a new folder on the disk that is to be measured
//
// (a) clients, each with a connection of its own and one call at a time, submit jobs durably;
// (b) the same while ranks report their steps; a point is one value of one job, attempt and step;
// (c) jobs are cancelled, all at once.
// The load is made by this process too, so on a small machine the clients' share of the cores is in the figures.
#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <sys/resource.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "coordinator/attempt_files.h"
#include "coordinator/server.h"
#include "simpo/v1/training_service.grpc.pb.h"
#include "simpo/v1/worker_service.grpc.pb.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

double CpuSeconds() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

[[noreturn]] void Die(const std::string& why) {
  std::fprintf(stderr, "control_plane_bench: %s\n", why.c_str());
  std::_Exit(1);
}

struct Options {
  std::string data_dir;
  int clients = 64;
  double seconds = 10;
  int ranks = 64;                      // of as many jobs
  int values = 20;                     // of a report
  double points_per_second = 120'000;  // that the ranks offer; 0: as many as the coordinator takes
  int cancels = 2'000;
};

// What one fsync of this disk takes: no answer can come sooner.
double MedianSyncMs(const fs::path& dir) {
  const int fd = open((dir / "sync-probe").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  const std::string block(8192, 'x');
  std::vector<double> times;
  for (int i = 0; i < 101; ++i) {
    const Clock::time_point begin = Clock::now();
    if (pwrite(fd, block.data(), block.size(), 0) < 0 || fdatasync(fd) != 0) Die("cannot write to the data folder");
    times.push_back(SecondsSince(begin) * 1000);
  }
  close(fd);
  fs::remove(dir / "sync-probe");
  std::nth_element(times.begin(), times.begin() + 50, times.end());
  return times[50];
}

std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

v1::SubmitJobRequest JobRequest(const std::string& request_id) {
  v1::SubmitJobRequest request;
  request.set_request_id(request_id);
  request.set_file_name("bench.yaml");
  request.set_base_dir("/");
  request.set_user("bench");
  request.set_job_yaml(
      "model_name_or_path: org/model-7b-instruct\n"
      "dataset_mixer: {org/preferences: 1.0}\n"
      "loss_type: sigmoid\nbeta: 2.5\ngamma_beta_ratio: 0.55\nlearning_rate: 1.0e-6\nlr_scheduler_type: cosine\n"
      "warmup_ratio: 0.1\nnum_train_epochs: 1\nmax_length: 2048\nmax_prompt_length: 1800\nglobal_batch_size: 128\n"
      "bf16: true\ngradient_checkpointing: true\nseed: 42\nlogging_steps: 1\n"
      "labels: {team: bench}\n"
      "resources: {ranks_per_node: 1, threads_per_rank: 1}\n");
  return request;
}

// Counts down to zero.
class Countdown {
 public:
  explicit Countdown(int count) : count_(count) {}
  void Done() {
    const std::lock_guard lock(mutex_);
    if (--count_ == 0) zero_.notify_all();
  }
  void Wait() {
    std::unique_lock lock(mutex_);
    zero_.wait(lock, [&] { return count_ <= 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable zero_;
  int count_;
};

// Submits one job after the other until the time is up.
class Submitter {
 public:
  Submitter(std::shared_ptr<grpc::Channel> channel, std::string name)
      : stub_(v1::TrainingService::NewStub(channel)), name_(std::move(name)) {}

  void Run(Clock::time_point end, Countdown* done) {
    end_ = end;
    done_ = done;
    times_ms_.clear();
    Next();
  }
  v1::TrainingService::Stub& stub() { return *stub_; }
  const std::vector<double>& times_ms() const { return times_ms_; }
  const std::vector<std::string>& ids() const { return ids_; }

 private:
  void Next() {
    context_ = std::make_unique<grpc::ClientContext>();
    request_ = JobRequest(absl::StrCat(name_, "-", ++count_));
    begin_ = Clock::now();
    stub_->async()->SubmitJob(context_.get(), &request_, &response_, [this](const grpc::Status& status) {
      if (!status.ok()) Die(absl::StrCat("a submit failed: ", status.error_message()));
      times_ms_.push_back(SecondsSince(begin_) * 1000);
      ids_.push_back(response_.job().id());
      Clock::now() < end_ ? Next() : done_->Done();
    });
  }

  std::unique_ptr<v1::TrainingService::Stub> stub_;
  const std::string name_;
  int64_t count_ = 0;
  Clock::time_point end_, begin_;
  Countdown* done_ = nullptr;
  std::unique_ptr<grpc::ClientContext> context_;
  v1::SubmitJobRequest request_;
  v1::SubmitJobResponse response_;
  std::vector<double> times_ms_;
  std::vector<std::string> ids_;
};

// Rank 0 of a simulated gang: sends the reports that are due, and counts those that are acknowledged.
class Rank final : public grpc::ClientBidiReactor<v1::AttachRequest, v1::AttachResponse> {
 public:
  Rank(std::shared_ptr<grpc::Channel> channel, const std::string& job_id, const std::string& secret, int values)
      : stub_(v1::WorkerService::NewStub(channel)) {
    context_.AddMetadata("simpo-attempt-secret", secret);
    v1::Hello& hello = *request_.mutable_hello();
    hello.set_job_id(job_id);
    hello.set_attempt(1);
    hello.set_world_size(1);
    next_.mutable_step()->set_steps_planned(1'000'000'000);
    v1::MetricPoint& point = *next_.mutable_step()->mutable_point();
    point.set_split("train");
    for (int i = 0; i < values; ++i) (*point.mutable_values())[absl::StrCat("rewards/metric_", i)] = 0.1 * i;
    stub_->async()->Attach(&context_, this);
    AddHold();
    writing_ = true;
    StartWrite(&request_);
    StartRead(&response_);
    StartCall();
  }

  bool welcomed() const { return welcomed_; }
  int64_t stored_steps() const { return acknowledged_; }
  // Reports up to this step are due.
  void Offer(int64_t step) {
    const std::lock_guard lock(mutex_);
    offered_ = std::max(offered_, step);
    Write();
  }
  // Drops what is due and not sent.
  void Pause() {
    const std::lock_guard lock(mutex_);
    offered_ = sent_;
  }
  void Leave() {
    context_.TryCancel();
    RemoveHold();
    std::unique_lock lock(mutex_);
    over_.wait(lock, [&] { return done_; });
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    writing_ = false;
    if (ok) Write();
  }
  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (response_.has_welcome()) welcomed_ = true;
    if (response_.has_ack()) acknowledged_ = response_.ack().step();
    StartRead(&response_);
  }
  void OnDone(const grpc::Status&) override {
    const std::lock_guard lock(mutex_);
    done_ = true;
    over_.notify_all();
  }

 private:
  void Write() {
    if (writing_ || sent_ >= offered_) return;
    writing_ = true;
    v1::MetricPoint& point = *next_.mutable_step()->mutable_point();
    point.set_step(++sent_);
    for (auto& [name, value] : *point.mutable_values()) value += 1e-3;
    StartWrite(&next_);
  }

  std::unique_ptr<v1::WorkerService::Stub> stub_;
  grpc::ClientContext context_;
  v1::AttachRequest request_, next_;
  v1::AttachResponse response_;
  std::atomic<bool> welcomed_ = false;
  std::atomic<int64_t> acknowledged_ = 0;
  std::mutex mutex_;
  std::condition_variable over_;
  bool writing_ = false;
  bool done_ = false;
  int64_t sent_ = 0, offered_ = 0;
};

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options) {}

  void Run() {
    StartServer();
    StartGangs();
    std::printf("%ld cores, fdatasync %.1f ms, %d clients, %d ranks\n", sysconf(_SC_NPROCESSORS_ONLN),
                MedianSyncMs(options_.data_dir), options_.clients, options_.ranks);
    for (int i = 0; i < options_.clients; ++i) {
      clients_.push_back(std::make_unique<Submitter>(Connect(server_->grpc_address()), absl::StrCat("client-", i)));
    }
    Submit("a. submits alone");
    {
      std::atomic<bool> stop = false;
      std::thread offer([&] { OfferPoints(stop); });
      std::this_thread::sleep_for(std::chrono::seconds(1));
      Submit("b. submits while ranks report");
      stop = true;
      offer.join();
    }
    Cancel();
    for (auto& rank : ranks_) rank->Leave();
    EndGangs();
    server_.reset();
    for (const char* file : {"coordinator.db", "metrics.db"}) {
      std::printf("%s: %.1f MB\n", file, static_cast<double>(fs::file_size(fs::path(options_.data_dir) / file)) / 1e6);
    }
  }

 private:
  void StartServer() {
    const fs::path dir = options_.data_dir;
    if (fs::exists(dir) && !fs::is_empty(dir)) Die(absl::StrCat(dir.string(), " is not empty; name a new --data-dir"));
    fs::create_directories(dir);
    for (const auto& [name, text] :
         {std::pair("worker", "#!/bin/sh\nexit 0\n"), std::pair("mpirun", "#!/bin/sh\nexec sleep 3600\n")}) {
      std::ofstream(dir / name) << text;
      fs::permissions(dir / name, fs::perms::owner_all);
    }
    ServerOptions server;
    server.data_dir = dir;
    server.listen = server.http = "127.0.0.1:0";
    server.slots = options_.ranks;
    server.worker = dir / "worker";
    server.mpirun = dir / "mpirun";
    server.program = fs::read_symlink("/proc/self/exe").parent_path() / "simpo-coordinator";
    server.heartbeat_timeout_s = server.attach_timeout_s = 1e6;
    server.stop_grace_s = 0.1;
    server.max_jobs_per_user = 0;
    auto started = Server::Start(server, "bench", [](const absl::Status& status) { Die(status.ToString()); });
    if (!started.ok()) Die(started.status().ToString());
    server_ = *std::move(started);
  }

  void StartGangs() {
    const auto stub = v1::TrainingService::NewStub(Connect(server_->grpc_address()));
    for (int i = 0; i < options_.ranks; ++i) {
      grpc::ClientContext context;
      v1::SubmitJobResponse response;
      const grpc::Status status = stub->SubmitJob(&context, JobRequest(absl::StrCat("gang-", i)), &response);
      if (!status.ok()) Die(absl::StrCat("a submit failed: ", status.error_message()));
      gangs_.push_back(response.job().id());
    }
    std::vector<std::string> secrets(gangs_.size());
    for (size_t gang = 0; gang < gangs_.size(); ++gang) {
      const AttemptFiles files{fs::path(options_.data_dir) / "attempts" / gangs_[gang] / "1"};
      for (int i = 0; secrets[gang].empty() && i < 6000; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        std::getline(std::ifstream(files.Secret()), secrets[gang]);
      }
    }
    std::this_thread::sleep_for(std::chrono::seconds(1));  // now the coordinator knows them too
    for (size_t gang = 0; gang < gangs_.size(); ++gang) {
      ranks_.push_back(
          std::make_unique<Rank>(Connect(server_->grpc_address()), gangs_[gang], secrets[gang], options_.values));
      for (int i = 0; !ranks_.back()->welcomed(); ++i) {
        if (i == 6000) Die("a rank was not welcomed");
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
    }
  }

  int64_t StoredReports() const {
    int64_t steps = 0;
    for (const auto& rank : ranks_) steps += rank->stored_steps();
    return steps;
  }

  // At the pace that is asked for, or always a little more than was stored.
  void OfferPoints(const std::atomic<bool>& stop) {
    const Clock::time_point begin = Clock::now();
    const double steps_per_second = options_.points_per_second / options_.values / options_.ranks;
    constexpr int64_t kAhead = 200;
    while (!stop) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      for (auto& rank : ranks_) {
        rank->Offer(steps_per_second > 0 ? static_cast<int64_t>(steps_per_second * SecondsSince(begin))
                                         : rank->stored_steps() + kAhead);
      }
    }
    for (auto& rank : ranks_) rank->Pause();
  }

  void Submit(const char* title) {
    Countdown done(options_.clients);
    const int64_t reports = StoredReports();
    const double cpu = CpuSeconds();
    const Clock::time_point begin = Clock::now();
    for (auto& client : clients_)
      client->Run(begin + std::chrono::milliseconds(int64_t(options_.seconds * 1000)), &done);
    done.Wait();
    const double seconds = SecondsSince(begin);
    const double points = static_cast<double>((StoredReports() - reports) * options_.values);
    std::vector<double> times;
    for (auto& client : clients_) times.insert(times.end(), client->times_ms().begin(), client->times_ms().end());
    std::sort(times.begin(), times.end());
    std::printf("%-30s %6.0f submits/s, p50 %5.1f ms, p99 %5.1f ms, max %5.1f ms; %7.0f points/s stored; %.2f cores\n",
                title, static_cast<double>(times.size()) / seconds, times[times.size() / 2],
                times[times.size() * 99 / 100], times.back(), points / seconds, (CpuSeconds() - cpu) / seconds);
    std::fflush(stdout);
  }

  struct CancelCall {
    grpc::ClientContext context;
    v1::CancelJobRequest request;
    v1::CancelJobResponse response;
  };
  void CancelAll(const std::vector<std::string>& ids) {
    if (ids.empty()) return;
    Countdown done(static_cast<int>(ids.size()));
    std::vector<std::unique_ptr<CancelCall>> calls;
    for (size_t i = 0; i < ids.size(); ++i) {
      CancelCall& call = *calls.emplace_back(std::make_unique<CancelCall>());
      call.request.set_job_id(ids[i]);
      clients_[i % clients_.size()]->stub().async()->CancelJob(
          &call.context, &call.request, &call.response, [&done](const grpc::Status& status) {
            if (!status.ok()) Die(absl::StrCat("a cancel failed: ", status.error_message()));
            done.Done();
          });
    }
    done.Wait();
  }
  void Cancel() {
    std::vector<std::string> ids;
    size_t submitted = 0;
    for (auto& client : clients_) {
      submitted += client->ids().size();
      for (size_t i = 0; i < client->ids().size() && static_cast<int>(ids.size()) < options_.cancels; ++i) {
        if (i < static_cast<size_t>(options_.cancels / options_.clients + 1)) ids.push_back(client->ids()[i]);
      }
    }
    const Clock::time_point begin = Clock::now();
    CancelAll(ids);
    std::printf("c. %zu of %zu waiting jobs cancelled at once: %.2f s\n", ids.size(), submitted, SecondsSince(begin));
    std::fflush(stdout);
  }

  void EndGangs() {
    // Those that wait first: they would take the slots.
    std::vector<std::string> waiting;
    for (auto& client : clients_) waiting.insert(waiting.end(), client->ids().begin(), client->ids().end());
    CancelAll(waiting);
    CancelAll(gangs_);
    // Nothing of the gangs may be left: their supervisors say when they are gone.
    for (const std::string& id : gangs_) {
      const AttemptFiles files{fs::path(options_.data_dir) / "attempts" / id / "1"};
      for (int i = 0; !fs::exists(files.Exit()) && i < 6000; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
    }
  }

  const Options options_;
  std::unique_ptr<Server> server_;
  std::vector<std::string> gangs_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<std::unique_ptr<Submitter>> clients_;
};

int Main(int argc, char** argv) {
  CLI::App app("Measures how much a coordinator takes in.");
  Options options;
  app.add_option("--data-dir", options.data_dir, "A new folder on the disk to measure")->required();
  app.add_option("--clients", options.clients, "Clients that submit")->capture_default_str();
  app.add_option("--seconds", options.seconds, "Length of (a) and of (b)")->capture_default_str();
  app.add_option("--ranks", options.ranks, "Ranks that report, of as many jobs")->capture_default_str();
  app.add_option("--values", options.values, "Values of a report")->capture_default_str();
  app.add_option("--points-per-second", options.points_per_second, "Offered by all ranks; 0: as many as are taken")
      ->capture_default_str();
  app.add_option("--cancels", options.cancels, "Jobs to cancel")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);  // as simpo-coordinator does
  Bench(options).Run();
  return 0;
}

}  // namespace
}  // namespace simpo

int main(int argc, char** argv) { return simpo::Main(argc, argv); }
