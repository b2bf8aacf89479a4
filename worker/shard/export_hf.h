#ifndef SIMPO_WORKER_SHARD_EXPORT_HF_H_
#define SIMPO_WORKER_SHARD_EXPORT_HF_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/comm/collectives.h"
#include "worker/model/model_config.h"
#include "worker/shard/sharded_params.h"

namespace simpo {

// What a Hugging Face folder has beside the weights, as (name, content): config.json, which says `dtype`;
// generation_config.json and tokenizer files of the sources; the chat template that training used (empty:
// the source's own, if any).
using HfFiles = std::vector<std::pair<std::string, std::string>>;
absl::StatusOr<HfFiles> ReadHfFiles(const std::filesystem::path& model_dir, const std::filesystem::path& tokenizer_dir,
                                    const std::string& chat_template, at::ScalarType dtype);

// Each is durable in `folder`, which must exist, when this returns.
absl::Status WriteHfFiles(const std::filesystem::path& folder, const HfFiles& files);

inline constexpr int64_t kMaxExportFileBytes = 5'000'000'000;

// Writes the model as a Hugging Face folder that transformers and vLLM load: the files above and
// safetensors (several files and an index above max_file_bytes). Weights are in the compute dtype of
// the run, which config.json then says; fp32 training of a bf16 model gives an fp32 export, so that
// nothing that was learned is rounded away. Streams: one bucket at a time is gathered, one tensor is
// copied. Made in a folder of another name and renamed when whole; an earlier `final_dir` is replaced.
// Collective: rank 0 writes, an error there is an error on all. FAILED_PRECONDITION when the
// config.json in `model_dir` is no longer that of `config`.
absl::Status ExportHf(const std::filesystem::path& final_dir, ShardedParams& params, const ModelConfig& config,
                      const std::filesystem::path& model_dir, const std::filesystem::path& tokenizer_dir,
                      const std::string& chat_template, Collectives& comm,
                      int64_t max_file_bytes = kMaxExportFileBytes);

// The same folder, byte for byte, from a checkpoint that any number of ranks wrote, in one process
// and tensor by tensor. `to` must not exist, or be an empty folder.
absl::Status ExportCheckpoint(const std::filesystem::path& checkpoint, const std::filesystem::path& to,
                              int64_t max_file_bytes = kMaxExportFileBytes);

}  // namespace simpo

#endif  // SIMPO_WORKER_SHARD_EXPORT_HF_H_
