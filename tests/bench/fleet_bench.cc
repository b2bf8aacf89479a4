// Many ranks on one coordinator, each on a connection of its own. The coordinator, its supervisors and (sleeping) gangs
// are real processes; this program speaks for the ranks, with the pauses of the real worker between connections.
//
//   fleet_bench --data-dir DIR --gangs 1000 --restart         kill -9 of the coordinator: when is everything adopted?
//   fleet_bench --data-dir DIR --gangs 10 --ranks 1000 --tls  10,000 ranks: memory of a connection, submits meanwhile
//
// Exit code 1: a gang was started again, adoption took more than --most-seconds, or a connection takes more than 256
// KiB.
#include <grpcpp/grpcpp.h>
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/attempt_files.h"
#include "simpo/v1/training_service.grpc.pb.h"
#include "simpo/v1/worker_service.grpc.pb.h"
#include "tests/certificates.h"
#include "tests/chaos/coordinator_process.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kHeartbeat{2'000};
constexpr milliseconds kFirstBackoff{200}, kMaxBackoff{5'000};  // as in worker/coordinator_client.cc
constexpr int kConnectingAtATime = 64;                          // in the beginning; after a restart all come at once
constexpr double kMostKiB = 256;                                // of a connection, counted from 1,000 of them

struct Options {
  std::string data_dir;
  int gangs = 1'000;
  int ranks = 1;  // of a gang
  bool tls = false;
  bool restart = false;
  double seconds = 20;      // of heartbeats and submits
  double outage_s = 1.5;    // between the kill and the next coordinator
  double most_seconds = 5;  // of adoption
  int clients = 8;
};

double SecondsSince(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

double CpuSeconds(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  std::string text;
  std::getline(file, text);
  std::istringstream fields(text.substr(text.rfind(')') + 2));
  std::string skipped;
  for (int field = 3; field < 14; ++field) fields >> skipped;
  double user = 0, system = 0;
  fields >> user >> system;
  return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

class Fleet;

// One rank over all its connections.
struct Rank {
  Fleet* fleet = nullptr;
  std::string job_id, secret;
  fs::path address_file;
  int number = 0;
  std::mutex mutex;
  class Session* session = nullptr;  // guarded by mutex
  milliseconds backoff = kFirstBackoff;
  std::mt19937 random;
};

// One connection; deletes itself when it is over.
class Session final : public grpc::ClientBidiReactor<v1::AttachRequest, v1::AttachResponse> {
 public:
  Session(Rank& rank, std::shared_ptr<grpc::Channel> channel, int world_size)
      : rank_(rank), stub_(v1::WorkerService::NewStub(channel)) {
    context_.AddMetadata("simpo-attempt-secret", rank.secret);
    v1::Hello& hello = *request_.mutable_hello();
    hello.set_job_id(rank.job_id);
    hello.set_attempt(1);
    hello.set_rank(rank.number);
    hello.set_world_size(world_size);
    heartbeat_.mutable_heartbeat()->set_phase("train");
    heartbeat_.mutable_heartbeat()->set_steps_planned(1'000'000);
  }
  void Begin() {
    stub_->async()->Attach(&context_, this);
    AddHold();
    writing_ = true;
    StartWrite(&request_);
    StartRead(&response_);
    StartCall();
  }
  void Heartbeat() {
    const std::lock_guard lock(mutex_);
    if (writing_ || closed_ || !welcomed_) return;
    writing_ = true;
    StartWrite(&heartbeat_);
  }
  void Leave() { context_.TryCancel(); }
  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    writing_ = !ok;  // a broken stream takes nothing more
  }
  void OnReadDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

 private:
  Rank& rank_;
  std::unique_ptr<v1::WorkerService::Stub> stub_;
  grpc::ClientContext context_;
  v1::AttachRequest request_, heartbeat_;
  v1::AttachResponse response_;
  std::mutex mutex_;
  bool writing_ = false, closed_ = false, welcomed_ = false;
};

// All ranks: connects them, again and again, and sends their heartbeats.
class Fleet {
 public:
  Fleet(int world_size, std::string ca) : world_size_(world_size), ca_(std::move(ca)) {}
  ~Fleet() { Stop(); }

  void Add(const std::string& job_id, const std::string& secret, const fs::path& address_file, int number) {
    auto rank = std::make_unique<Rank>();
    rank->fleet = this;
    rank->job_id = job_id;
    rank->secret = secret;
    rank->address_file = address_file;
    rank->number = number;
    rank->random.seed(static_cast<unsigned>(ranks_.size()));
    ranks_.push_back(std::move(rank));
  }
  void Start() {
    for (size_t i = 0; i < ranks_.size(); ++i) due_.emplace(Clock::now(), ranks_[i].get());
    connector_ = std::thread([this] { Connect(); });
    heart_ = std::thread([this] { Beat(); });
  }
  void Stop() {
    {
      const std::lock_guard lock(mutex_);
      if (stop_.exchange(true)) return;
    }
    changed_.notify_all();
    connector_.join();
    heart_.join();
    for (auto& rank : ranks_) {
      const std::lock_guard lock(rank->mutex);
      if (rank->session != nullptr) rank->session->Leave();
    }
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return sessions_ == 0; });
  }
  size_t size() const { return ranks_.size(); }
  int attached() const { return attached_; }
  bool WaitUntilAttached(int seconds) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(seconds),
                             [&] { return attached_ == static_cast<int>(size()); });
  }

  // From sessions.
  void Welcomed(Rank& rank) {
    rank.backoff = kFirstBackoff;
    const std::lock_guard lock(mutex_);
    ++attached_;
    --connecting_;
    changed_.notify_all();
  }
  void Lost(Rank& rank, bool was_welcomed) {
    const double jitter = std::uniform_real_distribution(0.5, 1.0)(rank.random);
    const auto pause = std::chrono::duration_cast<milliseconds>(rank.backoff * jitter);
    rank.backoff = std::min(rank.backoff * 2, kMaxBackoff);
    const std::lock_guard lock(mutex_);
    if (was_welcomed) {
      --attached_;
    } else {
      --connecting_;
    }
    --sessions_;
    due_.emplace(Clock::now() + pause, &rank);
    changed_.notify_all();
  }
  // From now on nobody waits for the others.
  void ConnectAllAtOnce() { most_connecting_ = static_cast<int>(size()); }

 private:
  void Connect() {
    std::unique_lock lock(mutex_);
    while (!stop_) {
      if (due_.empty() || due_.begin()->first > Clock::now() || connecting_ >= most_connecting_) {
        changed_.wait_for(lock, milliseconds(10));
        continue;
      }
      Rank& rank = *due_.begin()->second;
      due_.erase(due_.begin());
      ++connecting_;
      ++sessions_;
      lock.unlock();
      std::string address;
      std::getline(std::ifstream(rank.address_file), address);
      grpc::ChannelArguments arguments;
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
      const auto credentials =
          ca_.empty() ? grpc::InsecureChannelCredentials() : grpc::SslCredentials({.pem_root_certs = ca_});
      const std::shared_ptr<grpc::Channel> channel = grpc::CreateCustomChannel(address, credentials, arguments);
      if (anchor_ == nullptr) anchor_ = channel;
      auto* session = new Session(rank, channel, world_size_);
      {
        const std::lock_guard rank_lock(rank.mutex);
        rank.session = session;
      }
      session->Begin();
      lock.lock();
    }
  }
  void Beat() {
    constexpr size_t kParts = 100;
    for (size_t part = 0; !stop_; part = (part + 1) % kParts) {
      std::this_thread::sleep_for(kHeartbeat / kParts);
      for (size_t i = part; i < ranks_.size(); i += kParts) {
        const std::lock_guard lock(ranks_[i]->mutex);
        if (ranks_[i]->session != nullptr) ranks_[i]->session->Heartbeat();
      }
    }
  }

  const int world_size_;
  const std::string ca_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  // gRPC's threads for callbacks end with the last channel, and must not be the ones that drop it.
  std::shared_ptr<grpc::Channel> anchor_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::multimap<Clock::time_point, Rank*> due_;  // guarded by mutex_
  int connecting_ = 0, sessions_ = 0;            // guarded by mutex_
  std::atomic<int> attached_ = 0;                // changed under mutex_
  std::atomic<int> most_connecting_ = kConnectingAtATime;
  std::atomic<bool> stop_ = false;
  std::thread connector_, heart_;
};

void Session::OnReadDone(bool ok) {
  if (!ok) {
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
    }
    return RemoveHold();
  }
  bool first = false;
  if (response_.has_welcome()) {
    const std::lock_guard lock(mutex_);
    first = !std::exchange(welcomed_, true);
  }
  if (first) rank_.fleet->Welcomed(rank_);
  StartRead(&response_);
}

void Session::OnDone(const grpc::Status&) {
  {
    const std::lock_guard lock(rank_.mutex);
    rank_.session = nullptr;
  }
  rank_.fleet->Lost(rank_, welcomed_);
  delete this;
}

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options), dir_(fs::absolute(options.data_dir)) {}

  int Run() {
    MakeFolder();
    StartCoordinator();
    StartGangs();
    const int64_t before_kib = ProcessFigure(coordinator_->pid(), "VmRSS");
    const Clock::time_point begin = Clock::now();
    fleet_->Start();
    if (!fleet_->WaitUntilAttached(600)) return Fail(absl::StrCat(fleet_->attached(), " ranks are attached, not all"));
    std::printf("%zu ranks of %d jobs attached after %.1f s%s\n", fleet_->size(), options_.gangs, SecondsSince(begin),
                options_.tls ? ", TLS" : "");
    WaitUntilRunning();
    Submit();
    const int64_t after_kib = ProcessFigure(coordinator_->pid(), "VmRSS");
    const double kib = static_cast<double>(after_kib - before_kib) / static_cast<double>(fleet_->size());
    std::printf("coordinator: %.0f MiB before, %.0f MiB with %zu ranks: %.1f KiB each; %lld open files, %lld threads\n",
                static_cast<double>(before_kib) / 1024, static_cast<double>(after_kib) / 1024, fleet_->size(), kib,
                static_cast<long long>(OpenFiles(coordinator_->pid())),
                static_cast<long long>(ProcessFigure(coordinator_->pid(), "Threads")));
    if (fleet_->size() >= 1'000 && kib > kMostKiB) Fail("a connection takes too much");
    CheckFileLimit();
    if (options_.restart) Restart();
    if (const int64_t starts = CountStarts(); starts != options_.gangs) {
      Fail(absl::StrCat(starts, " gangs were started for ", options_.gangs, " jobs"));
    }
    End();
    std::printf("%s\n", failed_ ? "FAILED" : "PASSED");
    return failed_ ? 1 : 0;
  }

 private:
  int Fail(const std::string& what) {
    std::printf("fleet_bench: %s\n", what.c_str());
    failed_ = true;
    return 1;
  }
  [[noreturn]] void Die(const std::string& what) {
    std::printf("fleet_bench: %s\n", what.c_str());
    KillGangs();
    std::_Exit(1);
  }
  fs::path Data() const { return dir_ / "data"; }

  // It began with the soft limit of a shell.
  void CheckFileLimit() {
    std::ifstream file(absl::StrCat("/proc/", coordinator_->pid(), "/limits"));
    for (std::string line; std::getline(file, line);) {
      std::istringstream words(line);
      std::string max, open, files, soft, hard;
      words >> max >> open >> files >> soft >> hard;
      if (open == "open" && soft != hard) Fail(absl::StrCat("the coordinator may open ", soft, " files of ", hard));
    }
  }

  void MakeFolder() {
    const bool ours = fs::exists(dir_ / "starts");
    if (fs::exists(dir_) && !fs::is_empty(dir_) && !ours) Die(dir_.string() + " is not empty; name a new --data-dir");
    if (ours) fs::remove_all(dir_);
    fs::create_directories(dir_);
    std::ofstream(dir_ / "starts") << "";
    const std::string mpirun =
        absl::StrCat("#!/bin/sh\necho start >> ", (dir_ / "starts").string(), "\nexec sleep 36000\n");
    for (const auto& [name, text] :
         {std::pair("worker", std::string("#!/bin/sh\nexit 0\n")), std::pair("mpirun", mpirun)}) {
      std::ofstream(dir_ / name) << text;
      fs::permissions(dir_ / name, fs::perms::owner_all);
    }
    if (!options_.tls) return;
    const Identity identity = MakeIdentity("simpo-coordinator", nullptr, "DNS:localhost,IP:127.0.0.1");
    ca_ = identity.cert;
    std::ofstream(dir_ / "cert.pem") << identity.cert;
    std::ofstream(dir_ / "key.pem") << identity.key;
    fs::permissions(dir_ / "key.pem", fs::perms::owner_read);
  }

  std::string StartCoordinator() {
    std::vector<std::string> flags = {"--data-dir",     Data().string(),
                                      "--listen",       "127.0.0.1:0",
                                      "--http",         "127.0.0.1:0",
                                      "--slots",        absl::StrCat(options_.gangs * options_.ranks),
                                      "--worker",       (dir_ / "worker").string(),
                                      "--mpirun",       (dir_ / "mpirun").string(),
                                      "--stop-grace-s", "0.1"};
    if (options_.tls) {
      for (const char* name : {"cert", "key"}) {
        flags.push_back(absl::StrCat("--tls-", name));
        flags.push_back((dir_ / absl::StrCat(name, ".pem")).string());
      }
    }
    coordinator_ = std::make_unique<CoordinatorProcess>(flags, dir_ / "coordinator.log");
    const std::string address = coordinator_->WaitUntilReady();
    if (address.empty()) Die("the coordinator did not start; see coordinator.log");
    stub_ = v1::TrainingService::NewStub(Channel(address));
    address_ = address;
    return address;
  }
  std::shared_ptr<grpc::Channel> Channel(const std::string& address) const {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return grpc::CreateCustomChannel(
        address, ca_.empty() ? grpc::InsecureChannelCredentials() : grpc::SslCredentials({.pem_root_certs = ca_}),
        arguments);
  }

  std::string SubmitOne(v1::TrainingService::Stub& stub, int ranks) {
    v1::SubmitJobRequest request;
    request.set_base_dir("/");
    request.set_job_yaml(
        absl::StrCat("model_name_or_path: org/model\ndataset_mixer: {org/data: 1.0}\nglobal_batch_size: ", 8 * ranks,
                     "\nresources: {ranks_per_node: ", ranks, ", threads_per_rank: 1}\n"));
    v1::SubmitJobResponse response;
    grpc::ClientContext context;
    const grpc::Status status = stub.SubmitJob(&context, request, &response);
    if (!status.ok()) Die(absl::StrCat("a submit failed: ", status.error_message()));
    return response.job().id();
  }

  void StartGangs() {
    const Clock::time_point begin = Clock::now();
    for (int i = 0; i < options_.gangs; ++i) jobs_.push_back(SubmitOne(*stub_, options_.ranks));
    while (CountStarts() < options_.gangs) {
      if (SecondsSince(begin) > 600) Die("not all gangs have started within 600 s");
      std::this_thread::sleep_for(milliseconds(50));
    }
    fleet_ = std::make_unique<Fleet>(options_.ranks, ca_);
    for (const std::string& job : jobs_) {
      const AttemptFiles files{Data() / "attempts" / job / "1"};
      std::string secret;
      std::getline(std::ifstream(files.Secret()), secret);
      for (int rank = 0; rank < options_.ranks; ++rank) fleet_->Add(job, secret, files.Address(), rank);
    }
    std::printf("%d gangs started after %.1f s\n", options_.gangs, SecondsSince(begin));
    std::fflush(stdout);
  }

  int64_t CountStarts() const {
    std::error_code error;
    const auto size = fs::file_size(dir_ / "starts", error);
    return error ? 0 : static_cast<int64_t>(size / 6);  // "start\n"
  }

  // Jobs in this state, of the first attempt.
  int Count(v1::JobState state) {
    int count = 0;
    v1::ListJobsRequest request;
    request.set_page_size(1'000);
    request.add_states(state);
    do {
      grpc::ClientContext context;
      v1::ListJobsResponse response;
      if (!stub_->ListJobs(&context, request, &response).ok()) Die("a list failed");
      for (const v1::Job& job : response.jobs()) count += job.attempt() == 1;
      request.set_page_token(response.next_page_token());
    } while (!request.page_token().empty());
    return count;
  }
  void WaitUntilRunning() {
    const Clock::time_point begin = Clock::now();
    while (Count(v1::JOB_STATE_RUNNING) < options_.gangs) {
      if (SecondsSince(begin) > 60) Die("not all jobs are running");
      std::this_thread::sleep_for(milliseconds(10));
    }
  }

  // While all ranks send heartbeats.
  void Submit() {
    std::vector<std::thread> threads;
    std::mutex mutex;
    std::vector<double> times;
    std::vector<std::string> ids;
    const double cpu = CpuSeconds(coordinator_->pid());
    const Clock::time_point begin = Clock::now();
    for (int i = 0; i < options_.clients; ++i) {
      threads.emplace_back([&] {
        const auto stub = v1::TrainingService::NewStub(Channel(address_));
        while (SecondsSince(begin) < options_.seconds) {
          const Clock::time_point asked = Clock::now();
          const std::string id = SubmitOne(*stub, 1);
          const double ms = 1e3 * SecondsSince(asked);
          {
            const std::lock_guard lock(mutex);
            times.push_back(ms);
            ids.push_back(id);
          }
          std::this_thread::sleep_for(milliseconds(50));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    std::sort(times.begin(), times.end());
    std::printf(
        "submits while %zu ranks send heartbeats every 2 s: %.0f a second, p50 %.1f ms, p99 %.1f ms, most %.1f ms; "
        "the coordinator takes %.2f cores\n",
        fleet_->size(), static_cast<double>(times.size()) / SecondsSince(begin), times[times.size() / 2],
        times[times.size() * 99 / 100], times.back(), (CpuSeconds(coordinator_->pid()) - cpu) / SecondsSince(begin));
    std::fflush(stdout);
    for (const std::string& id : ids) Cancel(id);  // they would take the slots in the end
    if (fleet_->attached() != static_cast<int>(fleet_->size())) Fail("ranks have lost their connection meanwhile");
  }
  void SetPriority(const std::string& id, int priority) {
    grpc::ClientContext context;
    v1::SetPriorityRequest request;
    request.set_job_id(id);
    request.set_priority(priority);
    v1::SetPriorityResponse response;
    if (!stub_->SetPriority(&context, request, &response).ok()) Die("a change of priority failed");
  }
  void CheckAdopted(const std::string& id) {
    grpc::ClientContext context;
    v1::GetJobRequest request;
    request.set_job_id(id);
    v1::GetJobResponse response;
    if (!stub_->GetJob(&context, request, &response).ok()) Die("a get failed");
    const auto& events = response.events();
    if (std::none_of(events.begin(), events.end(), [](const auto& event) { return event.type() == "adopted"; })) {
      Fail(absl::StrCat("job ", id, " was not adopted"));
    }
  }
  void Cancel(const std::string& id) {
    grpc::ClientContext context;
    v1::CancelJobRequest request;
    request.set_job_id(id);
    v1::CancelJobResponse response;
    if (!stub_->CancelJob(&context, request, &response).ok()) Die("a cancel failed");
  }

  void Restart() {
    fleet_->ConnectAllAtOnce();
    coordinator_->Kill();
    std::this_thread::sleep_for(std::chrono::duration<double>(options_.outage_s));
    for (int i = 0; fleet_->attached() != 0; ++i) {
      if (i == 3'000) return void(Fail("ranks are attached to a coordinator that is dead"));
      std::this_thread::sleep_for(milliseconds(10));
    }
    const Clock::time_point begin = Clock::now();
    StartCoordinator();
    // What was adopted is committed with, or before, the first thing that it is asked to write.
    SetPriority(jobs_.back(), 1);
    const double adopted = SecondsSince(begin);
    const bool all = fleet_->WaitUntilAttached(120);
    const double attached = SecondsSince(begin);
    std::printf(
        "after kill -9 and %.1f s without a coordinator: all %d gangs are adopted after %.2f s (at most %.0f), all %zu "
        "ranks "
        "are back after %.2f s (they try again every 5 s at the most)\n",
        options_.outage_s, options_.gangs, adopted, options_.most_seconds, fleet_->size(), attached);
    if (adopted > options_.most_seconds) Fail("adoption took too long");
    if (!all) Fail("not all ranks are back");
    for (const std::string& job : jobs_) CheckAdopted(job);
    std::this_thread::sleep_for(milliseconds(1'000));
    if (const int running = Count(v1::JOB_STATE_RUNNING); running != options_.gangs) {
      Fail(absl::StrCat(running, " of ", options_.gangs, " jobs run in their first attempt"));
    }
  }

  void End() {
    fleet_->Stop();
    coordinator_->Kill();
    KillGangs();
  }
  void KillGangs() {
    for (int i = 0; i < 100; ++i) {
      const std::vector<AttemptProcess> left = AttemptProcesses(Data());
      if (left.empty()) break;
      for (const AttemptProcess& process : left) kill(process.pid, SIGKILL);
      std::this_thread::sleep_for(milliseconds(100));
    }
    for (const std::string& folder : ScratchFolders(Data())) fs::remove_all(folder);
  }

  const Options options_;
  const fs::path dir_;
  std::string ca_, address_;
  std::unique_ptr<CoordinatorProcess> coordinator_;
  std::unique_ptr<v1::TrainingService::Stub> stub_;
  std::vector<std::string> jobs_;
  std::unique_ptr<Fleet> fleet_;
  bool failed_ = false;
};

int Main(int argc, char** argv) {
  CLI::App app("Attaches many ranks to a coordinator, and kills it.");
  Options options;
  app.add_option("--data-dir", options.data_dir, "A new folder, or one of an earlier run")->required();
  app.add_option("--gangs", options.gangs, "Jobs that run")->capture_default_str();
  app.add_option("--ranks", options.ranks, "Of each gang")->capture_default_str();
  app.add_flag("--tls", options.tls, "Encrypt all connections");
  app.add_flag("--restart", options.restart, "Kill the coordinator and measure how long adoption takes");
  app.add_option("--seconds", options.seconds, "Of submits while ranks send heartbeats")->capture_default_str();
  app.add_option("--outage-s", options.outage_s, "Between the kill and the next coordinator")->capture_default_str();
  app.add_option("--most-seconds", options.most_seconds, "That adoption may take")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  rlimit limit = {};
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
  if (const rlim_t need = static_cast<rlim_t>(options.gangs) * static_cast<rlim_t>(options.ranks) + 500;
      limit.rlim_max < need) {
    std::printf("fleet_bench: the hard limit of open files is %llu; it needs %llu (ulimit -Hn)\n",
                static_cast<unsigned long long>(limit.rlim_max), static_cast<unsigned long long>(need));
    return 1;
  }
  return Bench(options).Run();
}

}  // namespace
}  // namespace simpo

int main(int argc, char** argv) { return simpo::Main(argc, argv); }
