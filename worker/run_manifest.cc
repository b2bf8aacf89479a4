#include "worker/run_manifest.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/atomic_file.h"
#include "common/host_name.h"
#include "common/job_config_yaml.h"
#include "common/sha256.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr int64_t kHostLength = 64;
constexpr uint64_t kMaxHeaderBytes = 100 << 20;

// The part of a safetensors file that names every tensor, its type, shape and place.
std::string HeaderOf(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  uint64_t size = 0;
  file.read(reinterpret_cast<char*>(&size), sizeof(size));
  if (!file || size > kMaxHeaderBytes) return "";
  std::string header(size, '\0');
  file.read(header.data(), static_cast<std::streamsize>(size));
  return header;
}

// The files of an HF folder that decide what is trained, in the order of their names.
Json FilesOf(const fs::path& folder) {
  Json files = Json::object();
  std::vector<fs::path> paths;
  std::error_code error;
  for (const auto& item : fs::directory_iterator(folder, error)) paths.push_back(item.path());
  std::sort(paths.begin(), paths.end());
  for (const fs::path& path : paths) {
    const std::string extension = path.extension();
    const std::string name = path.filename();
    const auto bytes = static_cast<int64_t>(fs::file_size(path, error));
    if (error) continue;
    if (extension == ".safetensors") {
      files[name] = {{"bytes", bytes}, {"header_sha256", Sha256(HeaderOf(path))}};
    } else if (extension == ".json" || extension == ".jinja" || extension == ".model" || extension == ".txt") {
      files[name] = {{"bytes", bytes}, {"sha256", Sha256OfFile(path).value_or("unreadable")}};
    }
  }
  return files;
}

Json ModelFacts(const TrainOptions& options) {
  return {{"path", options.model_dir.string()},
          {"source", options.model_source},
          {"model_type", options.model.model_type},
          {"parameters", options.model.NumParameters()},
          {"files", FilesOf(options.model_dir)}};
}

Json DataFacts(const TrainOptions& options, const RunFacts& facts) {
  Json data = {{"train", options.data.train_cache.string()},
               {"pairs", facts.pairs},
               {"dropped_pairs", facts.dropped_pairs},
               {"chat_template", options.data.chat_template_source},
               {"chat_template_sha256", Sha256(options.data.chat_template)},
               {"notes", options.data.notes}};
  if (options.data.eval_cache) data["eval"] = options.data.eval_cache->string();
  return data;
}

// One row per rank: where it runs and what it holds.
Json RankFacts(const ShardedParams& params, Collectives& comm) {
  const ShardedParams::Bytes bytes = params.MemoryBytes();
  const std::array<int64_t, 5> mine = {bytes.weights, bytes.grads, bytes.optimizer, at::get_num_threads(), getpid()};
  const auto width = static_cast<int64_t>(mine.size());
  at::Tensor numbers = at::zeros({comm.world_size(), width}, at::kLong);
  std::copy(mine.begin(), mine.end(), numbers.data_ptr<int64_t>() + comm.rank() * width);
  comm.AllReduce(numbers);
  at::Tensor hosts = at::zeros({comm.world_size() * kHostLength}, at::kByte);
  char* names = static_cast<char*>(hosts.data_ptr());
  HostName().copy(names + comm.rank() * kHostLength, kHostLength - 1);
  comm.AllGather(hosts);
  Json ranks = Json::array();
  for (int rank = 0; rank < comm.world_size(); ++rank) {
    const auto* row = numbers.data_ptr<int64_t>() + rank * width;
    ranks.push_back({{"rank", rank},
                     {"host", std::string(names + rank * kHostLength)},
                     {"pid", row[4]},
                     {"threads", row[3]},
                     {"weight_bytes", row[0]},
                     {"gradient_bytes", row[1]},
                     {"optimizer_bytes", row[2]}});
  }
  return ranks;
}

}  // namespace

absl::Status WriteRunManifest(const fs::path& path, const TrainOptions& options, const ShardedParams& params,
                              const RunFacts& facts, Collectives& comm) {
  const Json ranks = RankFacts(params, comm);
  if (comm.rank() != 0) return absl::OkStatus();
  Json manifest;
  manifest["job"] = JobConfigToYaml(options.config);
  manifest["model"] = ModelFacts(options);
  manifest["tokenizer"] = {{"path", options.tokenizer_dir.string()}, {"files", FilesOf(options.tokenizer_dir)}};
  if (options.tokenizer_dir == options.model_dir) manifest["tokenizer"].erase("files");
  manifest["data"] = DataFacts(options, facts);
  manifest["code"] = {{"simpo", SIMPO_VERSION}, {"libtorch", TORCH_VERSION}, {"compiler", __VERSION__}};
  manifest["compute_dtype"] = params.compute_dtype() == at::kFloat ? "float32" : "bfloat16";
  manifest["global_batch_size"] = facts.global_batch_size;
  manifest["steps_planned"] = facts.steps_planned;
  manifest["resumed_after_step"] = facts.resumed_after_step;
  manifest["world_size"] = comm.world_size();
  manifest["ranks"] = ranks;
  return WriteFileAtomically(path, manifest.dump(2) + "\n");
}

}  // namespace simpo
