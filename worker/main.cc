// simpo-worker: trains one job as one rank of a gang, with or without a coordinator.
//
//   mpirun -n 4 simpo-worker --job job.yaml [--set key=value]...
//   torchrun --no-python --nproc-per-node 4 simpo-worker --job job.yaml      on GPUs, without MPI
//   simpo-worker prepare --job job.yaml      downloads and checks model and data, fills the token cache
//   simpo-worker export --checkpoint DIR     makes a Hugging Face folder of a checkpoint
//
// This file alone turns errors into messages and exit codes.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/atomic_file.h"
#include "common/host_name.h"
#include "common/job_config_yaml.h"
#include "common/log.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/advice.h"
#include "worker/comm/collectives.h"
#include "worker/comm/join_world.h"
#include "worker/comm/world.h"
#include "worker/coordinator_client.h"
#include "worker/data/hub.h"
#include "worker/data/prepare.h"
#include "worker/data/tokenized_dataset.h"
#include "worker/model/read_model_config.h"
#include "worker/model/safetensors.h"
#include "worker/register_rank.h"
#include "worker/shard/export_hf.h"
#include "worker/shard/host_snapshot.h"
#include "worker/train.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

// Exit codes; see `simpoctl help exit-codes`.
constexpr int kDone = 0;
constexpr int kBadJob = 2;
constexpr int kBadInput = 3;
constexpr int kTryAgain = 75;
constexpr int kStopped = 143;

struct Flags {
  std::string job;
  std::vector<std::string> overrides;
  std::string output_dir;
  std::string log_dir;
  std::string coordinator;
  std::string coordinator_file;
  std::string job_id;
  int attempt = 1;
  bool resume_latest = false;
  std::string dump_tokens;
  std::string checkpoint;
  std::string export_to;
};

std::atomic<bool> g_stop_requested = false;

int EnvInt(const char* name, int fallback) {
  const char* value = std::getenv(name);
  return value == nullptr ? fallback : std::atoi(value);
}

// What whoever started this process says of it, before the ranks talk to each other.
const absl::StatusOr<RankInfo>& Started() {
  static const auto info = RankFromEnvironment(&std::getenv);
  return info;
}
int EnvRank() { return Started().ok() ? Started()->rank : 0; }
int EnvLocalRank() { return Started().ok() ? Started()->local_rank : 0; }
int EnvWorldSize() { return Started().ok() ? Started()->world_size : 1; }
int EnvLocalSize() { return Started().ok() ? Started()->local_size : 1; }

fs::path CacheDir() {
  // Set to nothing is not set.
  const auto folder = [](const char* name) {
    const char* value = std::getenv(name);
    return fs::path(value == nullptr ? "" : value);
  };
  if (const fs::path dir = folder("SIMPO_CACHE_DIR"); !dir.empty()) return dir;
  if (const fs::path dir = folder("XDG_CACHE_HOME"); !dir.empty()) return dir / "simpo" / "tokens";
  const fs::path home = folder("HOME");
  return (home.empty() ? fs::path(".") : home) / ".cache" / "simpo" / "tokens";
}

// A file with one rank's output, so that the ranks' lines never mix.
absl::Status RedirectOutput(const fs::path& log_dir) {
  std::error_code error;
  fs::create_directories(log_dir, error);
  const fs::path path = log_dir / absl::StrCat("rank-", EnvRank(), ".log");
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (file < 0) return absl::UnavailableError(absl::StrCat("cannot write the log ", path.string()));
  dup2(file, STDOUT_FILENO);
  dup2(file, STDERR_FILENO);
  close(file);
  return absl::OkStatus();
}

absl::StatusOr<ParsedJob> ReadJob(const Flags& flags) {
  SIMPO_ASSIGN_OR_RETURN(const std::string yaml, ReadFile(flags.job, /*max_bytes=*/1 << 20));
  const fs::path absolute = fs::absolute(flags.job);
  return ParseJobYamlOrStatus(
      yaml, {.file_name = flags.job, .base_dir = absolute.parent_path().string(), .overrides = flags.overrides});
}

// The folder behind a model's name: a local one wins over a hub repository of the same name.
absl::StatusOr<HubFiles> FindFolder(const char* key, const std::string& value,
                                    const std::function<absl::StatusOr<HubFiles>()>& fetch) {
  std::error_code error;
  if (fs::is_directory(value, error)) return HubFiles{.folder = value, .source = absl::StrCat("local folder ", value)};
  const std::string no_folder = absl::StrCat(key, ": '", value, "' is not a folder on ", HostName());
  if (!IsHubId(value)) {
    return absl::NotFoundError(absl::StrCat(no_folder,
                                            ". Give the path of a folder with config.json, *.safetensors and "
                                            "tokenizer.json, or a model of the hub (owner/name)."));
  }
  absl::StatusOr<HubFiles> files = fetch();
  const absl::StatusCode code = files.status().code();
  if (files.ok() || code == absl::StatusCode::kInvalidArgument) return files;
  return absl::Status(code, absl::StrCat(no_folder, ", and from the hub: ", files.status().message()));
}

// Model and tokenizer as folders of this machine. Config and notes name what was found.
absl::Status FindModel(HubAccess access, TrainOptions* options) {
  const JobConfig& config = options->config;
  SIMPO_RETURN_IF_ERROR(CheckDevice(config.device == "cuda"));
  const std::string& name = config.model_name_or_path;
  const std::string& tokenizer = config.tokenizer_name_or_path;
  const auto check = [](const fs::path& dir) { return ReadModelConfig(dir).status(); };
  SIMPO_ASSIGN_OR_RETURN(const HubFiles model, FindFolder("model_name_or_path", name, [&] {
                           return FetchModel(name, config.model_revision, access, check);
                         }));
  options->model_dir = model.folder;
  options->model_source = model.source;
  options->data.notes = model.notes;
  options->tokenizer_dir = options->model_dir;
  if (!tokenizer.empty() && tokenizer != name) {
    SIMPO_ASSIGN_OR_RETURN(const HubFiles found, FindFolder("tokenizer_name_or_path", tokenizer,
                                                            [&] { return FetchTokenizer(tokenizer, "main", access); }));
    options->tokenizer_dir = found.folder;
    options->data.notes.push_back(absl::StrCat("tokenizer: ", found.source));
    for (const std::string& note : found.notes) options->data.notes.push_back(note);
  }
  SIMPO_ASSIGN_OR_RETURN(options->model, ReadModelConfig(options->model_dir));
  return absl::OkStatus();
}

// What the job file and the flags say.
void FillOptions(const Flags& flags, const ParsedJob& job, TrainOptions* options) {
  options->config = job.config;
  const JobConfig& config = options->config;
  fs::path output = !flags.output_dir.empty() ? flags.output_dir : config.output_dir;
  if (output.empty()) output = fs::path("outputs") / (config.name.empty() ? "simpo" : config.name);
  options->output_dir = fs::absolute(output);
  options->resume_latest = flags.resume_latest;
  options->stop_requested = &g_stop_requested;
}

// Whether the run goes on from a checkpoint in its own output folder.
bool ResumesInPlace(const TrainOptions& options) {
  const std::string& from = options.config.resume_from_checkpoint;
  if (options.resume_latest || from == "true") return true;
  return !from.empty() &&
         fs::absolute(from).lexically_normal().parent_path() == (options.output_dir / "checkpoints").lexically_normal();
}

// A folder that holds another run's results is never written over by accident.
absl::Status CheckOutputDir(const TrainOptions& options) {
  const fs::path& dir = options.output_dir;
  const bool used = fs::exists(dir / "metrics.jsonl") || fs::exists(dir / "final");
  if (!used || ResumesInPlace(options) || options.config.overwrite_output_dir) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "output_dir ", dir.string(),
      " holds an earlier run. To go on from its last checkpoint add --set "
      "resume_from_checkpoint=true; to start again add --set overwrite_output_dir=true; or choose another folder."));
}

// Only once nothing else can be wrong: what is removed here is lost.
absl::Status MakeOutputDir(const TrainOptions& options, bool* made) {
  const fs::path& dir = options.output_dir;
  std::error_code error;
  if (!ResumesInPlace(options)) {
    for (const char* name : {"metrics.jsonl", "eval_metrics.jsonl", "checkpoints", "final"}) {
      fs::remove_all(dir / name, error);
    }
  }
  *made = fs::create_directories(dir, error);
  if (!error) return absl::OkStatus();
  return absl::PermissionDeniedError(absl::StrCat("cannot make output_dir ", dir.string(), ": ", error.message()));
}

// Every weight is there, whole, and of the shape that config.json says.
absl::Status CheckWeights(const TrainOptions& options) {
  SIMPO_ASSIGN_OR_RETURN(const std::unique_ptr<ModelWeightsReader> reader, ModelWeightsReader::Open(options.model_dir));
  for (const WeightSpec& weight : ModelWeights(options.model)) {
    SIMPO_RETURN_IF_ERROR(reader->Get(weight.name, weight.shape).status());
  }
  return absl::OkStatus();
}

// Every token of the data has a row in the model's embedding.
absl::Status CheckTokens(const TrainOptions& options) {
  int32_t largest = 0;
  std::vector<fs::path> caches = {options.data.train_cache};
  if (options.data.eval_cache) caches.push_back(*options.data.eval_cache);
  for (const fs::path& cache : caches) {
    SIMPO_ASSIGN_OR_RETURN(const std::unique_ptr<TokenizedDataset> data, TokenizedDataset::Open(cache));
    for (int64_t i = 0; i < data->size(); ++i) {
      const TokenizedPair pair = (*data)[i];
      for (const auto& tokens : {pair.chosen, pair.rejected}) {
        largest = std::max(largest, *std::max_element(tokens.begin(), tokens.end()));
      }
    }
  }
  if (largest < options.model.vocab_size) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "the tokenizer in ", options.tokenizer_dir.string(), " gives token ", largest, ", but vocab_size in ",
      (options.model_dir / "config.json").string(), " is ", options.model.vocab_size,
      ": they are of different models. Set tokenizer_name_or_path to the model's own tokenizer."));
}

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kDone;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kResourceExhausted:
      return kTryAgain;
    case absl::StatusCode::kFailedPrecondition:
      return kBadJob;
    default:
      return kBadInput;
  }
}

int Fail(const absl::Status& status, int code) {
  const absl::string_view text = status.message();
  std::fprintf(stderr, "simpo-worker: %.*s\n", static_cast<int>(text.size()), text.data());
  return code;
}

// Tokenises; the notes of the model stay before those of the data.
absl::Status Prepare(HubAccess access, TrainOptions* options) {
  auto progress = [](int64_t done, int64_t all) {
    if (EnvRank() == 0 && isatty(STDERR_FILENO))
      std::fprintf(stderr, "\rtokenised %ld of %ld rows%s", done, all, done == all ? "\n" : "");
  };
  JobConfig config = options->config;
  config.model_name_or_path = options->model_dir;
  config.tokenizer_name_or_path = options->tokenizer_dir;
  SIMPO_ASSIGN_OR_RETURN(PreparedData data, PrepareData(config, CacheDir(), progress, access));
  data.notes.insert(data.notes.begin(), options->data.notes.begin(), options->data.notes.end());
  options->data = std::move(data);
  return absl::OkStatus();
}

void PrintPrepared(const TrainOptions& options) {
  const PreparedData& data = options.data;
  std::fprintf(stderr, "model: %s\n", options.model_source.c_str());
  for (const std::string& note : data.notes) std::fprintf(stderr, "note: %s\n", note.c_str());
  std::fprintf(stderr, "chat template: %s\ntrain data:\n%s", data.chat_template_source.c_str(),
               data.train_report.ToString().c_str());
  if (data.eval_report) std::fprintf(stderr, "evaluation data:\n%s", data.eval_report->ToString().c_str());
}

// The token ids of every pair of the train split as JSON lines, for comparison with other trainers.
absl::Status DumpTokens(const fs::path& cache, const fs::path& path) {
  SIMPO_ASSIGN_OR_RETURN(const std::unique_ptr<TokenizedDataset> data, TokenizedDataset::Open(cache));
  std::ofstream file(path);
  for (int64_t i = 0; i < data->size(); ++i) {
    const TokenizedPair pair = (*data)[i];
    file << nlohmann::json{{"chosen", std::vector<int32_t>(pair.chosen.begin(), pair.chosen.end())},
                           {"rejected", std::vector<int32_t>(pair.rejected.begin(), pair.rejected.end())},
                           {"chosen_prompt_length", pair.chosen_prompt_length},
                           {"rejected_prompt_length", pair.rejected_prompt_length}}
                .dump()
         << '\n';
  }
  if (!file) return absl::UnavailableError(absl::StrCat("cannot write ", path.string()));
  return absl::OkStatus();
}

// Whether this machine's memory holds the model's tensors, before anything is made ready for them.
absl::Status CheckMemory(const TrainOptions& options) {
  const ShardingOptions sharding = ShardingOf(options.config, options.model);
  const MemoryNeed need = EstimateMemory(options.model, sharding, EnvWorldSize());
  const auto advice_for = [&](int64_t bytes) {
    return MemoryAdvice(need, sharding, EnvLocalSize(), static_cast<double>(bytes));
  };
  if (const auto advice = advice_for(TotalMemory())) return absl::FailedPreconditionError(*advice);
  if (const auto advice = advice_for(AvailableMemory())) {
    std::fprintf(stderr, "warning: %s (of which other programs hold a part)\n", advice->c_str());
  }
  return absl::OkStatus();
}

// The checks and the tokenising that need no other rank.
absl::Status CheckInputs(TrainOptions* options) {
  SIMPO_RETURN_IF_ERROR(FindModel(HubAccess::kDownload, options));
  SIMPO_RETURN_IF_ERROR(CheckMemory(*options));
  SIMPO_RETURN_IF_ERROR(CheckWeights(*options));
  SIMPO_RETURN_IF_ERROR(Prepare(HubAccess::kDownload, options));
  return CheckTokens(*options);
}

// `simpo-worker prepare`: the checks that a gang would make, in one process.
int RunPrepare(const Flags& flags, const ParsedJob& job) {
  TrainOptions options;
  FillOptions(flags, job, &options);
  if (absl::Status status = CheckInputs(&options); !status.ok()) return Fail(status, ExitCodeOf(status));
  PrintPrepared(options);
  if (!flags.dump_tokens.empty()) {
    if (absl::Status status = DumpTokens(options.data.train_cache, flags.dump_tokens); !status.ok()) {
      return Fail(status, kTryAgain);
    }
  }
  return kDone;
}

// `simpo-worker export`: one process, whatever number of ranks wrote the checkpoint.
int RunExport(const Flags& flags) {
  fs::path checkpoint = fs::path(flags.checkpoint).lexically_normal();
  if (!checkpoint.has_filename()) checkpoint = checkpoint.parent_path();  // it ended in a slash
  const fs::path to = flags.export_to.empty() ? fs::path(checkpoint.string() + "-hf") : fs::path(flags.export_to);
  if (absl::Status status = ExportCheckpoint(checkpoint, to); !status.ok()) return Fail(status, ExitCodeOf(status));
  std::printf("model: %s\n", to.c_str());
  return kDone;
}

void SetThreads(const JobConfig& config) {
  int threads = config.threads_per_rank;
  if (threads <= 0) threads = EnvInt("OMP_NUM_THREADS", 0);
  if (threads <= 0) threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / EnvLocalSize());
  at::set_num_threads(threads);
}

CoordinatorClient::Options ClientOptions(const Flags& flags, int world_size) {
  std::string secret;
  if (const char* file = std::getenv("SIMPO_ATTEMPT_SECRET_FILE")) {
    std::ifstream(file) >> secret;
  }
  return {.address = flags.coordinator,
          .address_file = flags.coordinator_file,
          .job_id = flags.job_id,
          .attempt = flags.attempt,
          .secret = secret,
          .rank = EnvRank(),
          .world_size = world_size};
}

std::unique_ptr<CoordinatorClient> StartClient(const Flags& flags, const TrainOptions& options, Collectives& comm) {
  if (flags.coordinator.empty() && flags.coordinator_file.empty()) return nullptr;
  CoordinatorClient::Options client = ClientOptions(flags, comm.world_size());
  client.activity = &comm.activity();
  client.metrics_path = options.output_dir / "metrics.jsonl";
  client.eval_metrics_path = options.output_dir / "eval_metrics.jsonl";
  return CoordinatorClient::Start(std::move(client));
}

// The ranks of this run, joined.
absl::StatusOr<std::unique_ptr<Collectives>> Join(const Flags& flags, const JobConfig& config) {
  Meet at_coordinator;
  if (!flags.coordinator.empty() || !flags.coordinator_file.empty()) {
    at_coordinator = [&](const std::string& of_rank_0, std::chrono::milliseconds timeout) {
      return RegisterRank(ClientOptions(flags, Started()->world_size), of_rank_0, timeout);
    };
  }
  // What cuBLAS asks for to be deterministic; it reads it when it is first used.
  if (config.device == "cuda" && config.deterministic) setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
  return JoinWorld(*Started(), config.device == "cuda", at_coordinator);
}

// What comes before the first collective. The first rank of each machine does it before MPI starts,
// while its neighbours wait for it there; they find the token cache filled.
absl::Status PrepareRank(const Flags& flags, const ParsedJob& job, TrainOptions* options, bool* made_output_dir) {
  FillOptions(flags, job, options);
  if (EnvLocalRank() != 0) {
    SIMPO_RETURN_IF_ERROR(FindModel(HubAccess::kCacheOnly, options));
    return Prepare(HubAccess::kCacheOnly, options);
  }
  if (EnvRank() != 0) return CheckInputs(options);
  SIMPO_RETURN_IF_ERROR(CheckOutputDir(*options));
  SIMPO_RETURN_IF_ERROR(CheckInputs(options));
  PrintPrepared(*options);
  if (!flags.dump_tokens.empty()) SIMPO_RETURN_IF_ERROR(DumpTokens(options->data.train_cache, flags.dump_tokens));
  return MakeOutputDir(*options, made_output_dir);
}

// Each machine has asked the hub for itself, and a repository may have changed in between.
absl::Status CheckSameInputs(const TrainOptions& options, Collectives& comm) {
  std::string inputs = absl::StrCat(options.model_source, "\n", options.data.train_cache.filename().string());
  if (options.data.eval_cache) absl::StrAppend(&inputs, "\n", options.data.eval_cache->filename().string());
  at::Tensor digests = at::zeros({comm.world_size()}, at::kLong);
  const std::span<int64_t> of_rank(digests.data_ptr<int64_t>(), static_cast<size_t>(comm.world_size()));
  of_rank[static_cast<size_t>(comm.rank())] = std::stoll(Sha256(inputs).substr(0, 15), nullptr, 16);
  comm.AllReduce(digests);
  if (std::set<int64_t>(of_rank.begin(), of_rank.end()).size() == 1) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("the ranks have read different models or data; rank ", comm.rank(), " has ", options.model_source,
                   ". If a repository of the hub has just changed, start again, or set model_revision to a commit"));
}

// Every rank returns the same outcome.
absl::StatusOr<TrainOutcome> RunRanks(const Flags& flags, const ParsedJob& job, TrainOptions& options,
                                      Collectives& comm, std::unique_ptr<CoordinatorClient>* client) {
  if (comm.rank() == 0 && options.config.Ranks() != comm.world_size()) {
    LOG_INFO(absl::StrCat("running on ", comm.world_size(), " ranks as started (the job file says ",
                          options.config.Ranks(), ")"));
  }
  *client = StartClient(flags, options, comm);
  options.coordinator = client->get();
  SIMPO_RETURN_IF_ERROR(CheckSameInputs(options, comm));
  return Train(options, comm);
}

int RunWorker(const Flags& flags, const ParsedJob& job) {
  // From now on: a stop that comes before the first step is not lost, it ends the run after that step.
  signal(SIGUSR1, [](int) { g_stop_requested = true; });
  if (!Started().ok()) return Fail(Started().status(), kBadJob);
  TrainOptions options;
  bool made_output_dir = false;
  if (EnvLocalRank() == 0) {
    if (absl::Status status = PrepareRank(flags, job, &options, &made_output_dir); !status.ok()) {
      return Fail(status, ExitCodeOf(status));
    }
  }
  absl::StatusOr<std::unique_ptr<Collectives>> world = Join(flags, job.config);
  std::error_code not_empty;
  if (!world.ok()) {
    if (made_output_dir) fs::remove(options.output_dir, not_empty);
    EndGang(Fail(world.status(), ExitCodeOf(world.status())));
  }
  const std::unique_ptr<Collectives> comm = *std::move(world);
  SetThreads(job.config);
  if (EnvLocalRank() != 0) {
    if (absl::Status status = PrepareRank(flags, job, &options, &made_output_dir); !status.ok()) {
      EndGang(Fail(status, ExitCodeOf(status)));
    }
  }
  std::unique_ptr<CoordinatorClient> client;
  int code = kTryAgain;
  std::string message;
  try {
    const absl::StatusOr<TrainOutcome> outcome = RunRanks(flags, job, options, *comm, &client);
    if (outcome.ok()) {
      code = *outcome == TrainOutcome::kDone ? kDone : kStopped;
    } else {
      code = comm->rank() == 0 ? Fail(outcome.status(), ExitCodeOf(outcome.status())) : ExitCodeOf(outcome.status());
      message = std::string(outcome.status().message());
    }
  } catch (const std::exception& error) {
    // Peers may be waiting in a collective that this rank will never reach.
    std::fprintf(stderr, "simpo-worker: rank %d: %s\n", comm->rank(), error.what());
    if (client != nullptr) client->Finish(kTryAgain, error.what(), /*timeout_ms=*/2000);
    EndGang(kTryAgain);
  }
  if (client != nullptr) client->Finish(code, message, /*timeout_ms=*/10000);
  client.reset();
  LeaveWorld();
  // A run that could not begin leaves no folder (one with anything in it stays).
  if (made_output_dir && (code == kBadJob || code == kBadInput)) fs::remove(options.output_dir, not_empty);
  return code;
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app("Trains one SimPO job as one rank of a gang (mpirun -n N simpo-worker --job FILE).");
  app.add_option("--job", flags.job, "The job file (required, but for export)");
  app.add_option("--set", flags.overrides, "key=value, wins over the file; may be repeated")->take_all();
  app.add_option("--output-dir", flags.output_dir, "Wins over the file's output_dir");
  app.add_option("--log-dir", flags.log_dir, "Write this rank's output to rank-N.log there");
  app.add_option("--coordinator", flags.coordinator, "HOST:PORT to report to");
  app.add_option("--coordinator-file", flags.coordinator_file, "A file with HOST:PORT, read at every reconnect");
  app.add_option("--job-id", flags.job_id, "This job's id at the coordinator");
  app.add_option("--attempt", flags.attempt, "This attempt's number, from 1");
  app.add_flag("--resume-latest", flags.resume_latest, "Go on from the newest checkpoint of the output folder, if any");
  app.add_option("--dump-tokens", flags.dump_tokens,
                 "Also write the train split's token ids to this file (JSON lines)");
  app.set_version_flag("--version", "simpo-worker " SIMPO_VERSION);
  CLI::App* prepare =
      app.add_subcommand("prepare", "Download and check model and data, fill the token cache; train nothing");
  prepare->fallthrough();  // --job may stand after the command too
  CLI::App* to_hf =
      app.add_subcommand("export", "Make a Hugging Face folder of a checkpoint, whatever number of ranks wrote it");
  to_hf->add_option("--checkpoint", flags.checkpoint, "A folder such as outputs/x/checkpoints/step-000120")->required();
  to_hf->add_option("--to", flags.export_to, "The folder to make (default: the checkpoint's name with -hf after it)");
  try {
    app.parse(argc, argv);
    if (!to_hf->parsed() && flags.job.empty()) throw CLI::RequiredError("--job");
  } catch (const CLI::ParseError& error) {
    if (EnvRank() != 0) return error.get_exit_code() == 0 ? kDone : kBadJob;  // rank 0 says it
    return app.exit(error) == 0 ? kDone : kBadJob;
  }
  if (!flags.log_dir.empty()) {
    if (absl::Status status = RedirectOutput(flags.log_dir); !status.ok()) return Fail(status, kTryAgain);
  }
  if (to_hf->parsed()) return RunExport(flags);
  absl::StatusOr<ParsedJob> job = ReadJob(flags);
  if (!job.ok()) return EnvRank() == 0 ? Fail(job.status(), kBadJob) : kBadJob;
  if (prepare->parsed()) return RunPrepare(flags, *job);
  return RunWorker(flags, *job);
}

}  // namespace
}  // namespace simpo

// jemalloc, linked in: freed pages are kept, large blocks included, on huge pages. With glibc a
// trainer spends up to half its time in page faults (docs/architecture.md).
extern "C" const char* malloc_conf;
const char* malloc_conf = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always,metadata_thp:auto";

int main(int argc, char** argv) {
  try {
    return simpo::Main(argc, argv);
  } catch (const std::exception& error) {  // before MPI: a disk that fails, no memory
    std::fprintf(stderr, "simpo-worker: %s\n", error.what());
    return simpo::kTryAgain;
  }
}
