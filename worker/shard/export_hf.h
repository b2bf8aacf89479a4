#ifndef SIMPO_WORKER_SHARD_EXPORT_HF_H_
#define SIMPO_WORKER_SHARD_EXPORT_HF_H_

#include <cstdint>
#include <filesystem>
#include <string>

#include "absl/status/status.h"
#include "worker/comm/collectives.h"
#include "worker/model/model_config.h"
#include "worker/shard/sharded_params.h"

namespace simpo {

// Writes the model as a Hugging Face folder that transformers and vLLM load: config.json,
// safetensors (several files and an index above max_file_bytes), generation_config.json and
// tokenizer files of the sources, and the chat template that training used (empty: the source's
// own, if any). Weights are in the compute dtype of the run, which config.json then says; fp32
// training of a bf16 model gives an fp32 export, so that nothing that was learned is rounded away.
// Made in a folder of another name and renamed when whole; an earlier `final_dir` is replaced.
// Collective: rank 0 writes, an error there is an error on all. FAILED_PRECONDITION when the
// config.json in `model_dir` is no longer that of `config`.
absl::Status ExportHf(const std::filesystem::path& final_dir, ShardedParams& params, const ModelConfig& config,
                      const std::filesystem::path& model_dir, const std::filesystem::path& tokenizer_dir,
                      const std::string& chat_template, Collectives& comm, int64_t max_file_bytes = 5'000'000'000);

}  // namespace simpo

#endif  // SIMPO_WORKER_SHARD_EXPORT_HF_H_
