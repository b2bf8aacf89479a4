// A gang that trains nothing: what a coordinator in a test is given as its --worker and as its --mpirun. All ranks
// live in one process; each has the real worker's line to the coordinator. It claims its folder, writes metrics.jsonl
// and checkpoints, resumes and obeys commands as the real worker does.
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/atomic_file.h"
#include "common/job_config_yaml.h"
#include "simulated_run.h"
#include "worker/coordinator_client.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

constexpr int kDone = 0, kBadJob = 2, kTryAgain = 75, kStopped = 143;
constexpr int kFinishMs = 2'000;  // shorter than the real worker's: tests kill coordinators every second

std::atomic<bool> g_stop_requested = false;

[[noreturn]] void Leave(const std::string& why, int code) {
  std::fprintf(stderr, "simpo-worker: %s\n", why.c_str());
  std::_Exit(code);
}

void Journal(const std::string& line) {
  const char* path = std::getenv(kJournalVariable);
  if (path == nullptr) return;
  const int file = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
  const std::string text = line + "\n";
  if (file < 0 || write(file, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    Leave("cannot write the journal", kTryAgain);
  }
  close(file);
}

struct Flags {
  std::map<std::string, std::string> values;  // by name
  bool prepare = false, resume_latest = false;
};

// Both command lines: the worker's own and that of mpirun with the worker's behind it.
Flags ParseFlags(int argc, char** argv) {
  Flags flags;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    flags.prepare |= word == "prepare";
    flags.resume_latest |= word == "--resume-latest";
    if (word.starts_with("-") && i + 1 < argc) flags.values[word] = argv[i + 1];
  }
  return flags;
}

JobConfig ReadJob(const Flags& flags) {
  const absl::StatusOr<std::string> yaml = ReadFile(flags.values.at("--job"), 1 << 20);
  if (!yaml.ok()) Leave(std::string(yaml.status().message()), kBadJob);
  const absl::StatusOr<ParsedJob> job = ParseJobYamlOrStatus(*yaml, {.file_name = "job.yaml", .base_dir = "/"});
  if (!job.ok()) Leave(std::string(job.status().message()), kBadJob);
  return job->config;
}

int Label(const JobConfig& job, const std::string& name) {
  int value = 0;
  const auto found = job.labels.find(name);
  if (found == job.labels.end() || !absl::SimpleAtoi(found->second, &value)) Leave("no label " + name, kBadJob);
  return value;
}

class Gang {
 public:
  explicit Gang(const Flags& flags) : flags_(flags), job_(ReadJob(flags)), run_(static_cast<uint64_t>(job_.seed)) {}

  int Run() {
    Journal(absl::StrCat("start ", job_id(), " ", attempt_, " ", getpid()));
    fs::create_directories(output_);
    // The kernel lets go of it when this process ends, however it ends.
    const int lock = open((output_ / "gang.lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (flock(lock, LOCK_EX | LOCK_NB) != 0) {
      Journal(absl::StrCat("overlap ", job_id(), " ", attempt_));
      return kTryAgain;
    }
    if (const int code = ClaimFolder(); code != kDone) return code;
    StartClients();
    SetPhase("load");
    Resume();
    SetPhase("train");
    const int code = Train();
    for (auto& client : clients_)
      client->Finish(code, code == kTryAgain ? "a fault that was asked for" : "", kFinishMs);
    clients_.clear();
    return code;
  }
  const std::string& job_id() const { return flags_.values.at("--job-id"); }

 private:
  // As the worker does: a folder that holds another run's results is not written over.
  int ClaimFolder() {
    const bool used = fs::exists(output_ / "metrics.jsonl") || fs::exists(output_ / "final");
    if (flags_.resume_latest) return kDone;
    if (used) {
      std::fprintf(stderr, "simpo-worker: output_dir %s holds an earlier run\n", output_.c_str());
      return kBadJob;
    }
    return kDone;
  }

  void StartClients() {
    CoordinatorClient::Options options{.address = flags_.values.at("--coordinator"),
                                       .address_file = flags_.values.at("--coordinator-file"),
                                       .job_id = job_id(),
                                       .attempt = attempt_,
                                       .world_size = std::atoi(flags_.values.at("-n").c_str())};
    std::ifstream(std::getenv("SIMPO_ATTEMPT_SECRET_FILE")) >> options.secret;
    options.metrics_path = output_ / "metrics.jsonl";
    options.eval_metrics_path = output_ / "eval_metrics.jsonl";
    for (options.rank = 0; options.rank < options.world_size; ++options.rank) {
      clients_.push_back(CoordinatorClient::Start(options));
    }
  }
  void SetPhase(const char* phase) {
    for (auto& client : clients_) client->SetPhase(phase, step_, job_.max_steps);
  }

  fs::path CheckpointFile() const { return output_ / "checkpoint"; }
  void Checkpoint() {
    if (step_ == checkpoint_step_) return;
    SetPhase("checkpoint");
    const absl::Status status = WriteFileAtomically(CheckpointFile(), absl::StrCat(step_, " ", run_.state(), "\n"));
    if (!status.ok()) Leave(std::string(status.message()), kTryAgain);
    checkpoint_step_ = step_;
    clients_[0]->ReportEvent("checkpoint", absl::StrCat("checkpoint of step ", step_), step_);
    SetPhase("train");
  }

  // The checkpoint's state, and the lines of metrics.jsonl up to it: later ones are written again.
  void Resume() {
    uint64_t state = run_.state();
    if (flags_.resume_latest) std::ifstream(CheckpointFile()) >> step_ >> state;
    run_ = SimulatedRun(state);
    checkpoint_step_ = step_;
    std::string kept;
    std::ifstream file(output_ / "metrics.jsonl");
    int line_number = 0;
    for (std::string line; line_number < step_ && std::getline(file, line); ++line_number)
      absl::StrAppend(&kept, line, "\n");
    if (line_number < step_) Leave("metrics.jsonl is shorter than its checkpoint", kTryAgain);
    if (const absl::Status status = WriteFileAtomically(output_ / "metrics.jsonl", kept); !status.ok()) {
      Leave(std::string(status.message()), kTryAgain);
    }
    if (step_ > 0) clients_[0]->ReportEvent("resumed", absl::StrCat("resumed after step ", step_), step_);
  }

  // Whether the ranks are to leave.
  bool Obey() {
    bool stop = g_stop_requested, checkpoint = false;
    for (auto& client : clients_) {
      while (const auto command = client->TakeCommand()) {
        (*command == CoordinatorClient::Command::kStop ? stop : checkpoint) = true;
      }
    }
    if (stop || checkpoint) Checkpoint();
    return stop;
  }

  int Train() {
    const auto step_time = std::chrono::milliseconds(Label(job_, "step_ms"));
    const int exit_code = attempt_ <= Label(job_, "faults") ? kTryAgain : Label(job_, "exit");
    const int64_t end = exit_code == kDone ? job_.max_steps : std::max<int64_t>(step_ + 1, job_.max_steps / 2);
    std::ofstream metrics(output_ / "metrics.jsonl", std::ios::app);
    while (step_ < end) {
      std::this_thread::sleep_for(step_time);
      run_.Step();
      ++step_;
      const std::map<std::string, double> values = {{"loss", run_.loss()}, {"step_seconds", 1e-3 * step_time.count()}};
      metrics << absl::StrFormat("{\"step\": %d, \"loss\": %.17g, \"step_seconds\": %.17g}", step_, values.at("loss"),
                                 values.at("step_seconds"))
              << std::endl;
      clients_[0]->ReportStep("train", step_, values);
      SetPhase("train");
      if (job_.save_steps > 0 && step_ % job_.save_steps == 0) Checkpoint();
      if (step_ < job_.max_steps && Obey()) return kStopped;
    }
    if (exit_code != kDone) return exit_code;
    Checkpoint();
    fs::create_directories(output_ / "final");
    clients_[0]->ReportEvent("exported", "the model is exported", step_);
    return kDone;
  }

  const Flags flags_;
  const JobConfig job_;
  const fs::path output_ = flags_.values.at("--output-dir");
  const int attempt_ = std::atoi(flags_.values.at("--attempt").c_str());
  SimulatedRun run_;
  int64_t step_ = 0, checkpoint_step_ = 0;
  std::vector<std::unique_ptr<CoordinatorClient>> clients_;
};

int Main(int argc, char** argv) {
  const Flags flags = ParseFlags(argc, argv);
  if (!flags.values.contains("--job")) Leave("--job is missing", kBadJob);
  if (flags.prepare) {
    Journal(absl::StrCat("prepare ", fs::path(flags.values.at("--job")).parent_path().string()));
    if (Label(ReadJob(flags), "exit") == kBadJob) Leave("a refusal that was asked for", kBadJob);
    return kDone;
  }
  signal(SIGUSR1, [](int) { g_stop_requested = true; });
  Gang gang(flags);
  const int code = gang.Run();
  Journal(absl::StrCat("end ", gang.job_id(), " ", flags.values.at("--attempt"), " ", code));
  return code;
}

}  // namespace
}  // namespace simpo

int main(int argc, char** argv) { return simpo::Main(argc, argv); }
