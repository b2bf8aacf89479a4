#include "worker/shard/export_hf.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/atomic_file.h"
#include "common/status_macros.h"
#include "worker/model/json_fields.h"
#include "worker/model/safetensors.h"
#include "worker/shard/agree_on.h"
#include "worker/shard/replace_folder.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

constexpr int64_t kMaxJsonBytes = 64 << 20;
constexpr int64_t kMaxTokenizerBytes = 1 << 30;

// The source's config.json with the dtype of what stands beside it.
absl::Status WriteConfig(const fs::path& source, const fs::path& target, at::ScalarType dtype) {
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(source, kMaxJsonBytes));
  SIMPO_RETURN_IF_ERROR(ParseJsonObject(text, source.string()).status());
  auto json = nlohmann::ordered_json::parse(text);  // once more, to keep the order of its fields
  // transformers 4 reads torch_dtype, transformers 5 both.
  const char* name = dtype == at::kBFloat16 ? "bfloat16" : "float32";
  if (json.contains("dtype")) json["dtype"] = name;
  if (json.contains("torch_dtype") || !json.contains("dtype")) json["torch_dtype"] = name;
  return WriteFileAtomically(target, json.dump(2) + "\n");
}

// Whether the exported config.json still describes the model that was trained.
absl::Status CheckConfig(const fs::path& folder, const ModelConfig& trained, const fs::path& model_dir) {
  SIMPO_ASSIGN_OR_RETURN(const ModelConfig written, ReadModelConfig(folder));
  const std::vector<WeightSpec> now = ModelWeights(written);
  const std::vector<WeightSpec> then = ModelWeights(trained);
  const bool same =
      std::equal(now.begin(), now.end(), then.begin(), then.end(),
                 [](const WeightSpec& a, const WeightSpec& b) { return a.name == b.name && a.shape == b.shape; });
  if (same) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat((model_dir / "config.json").string(),
                   " has changed since the run began: it describes other weights now. Put the "
                   "original back and resume from the last checkpoint"));
}

// The weights in files of at most max_bytes (more when one tensor is larger), in the model's order.
std::vector<NamedTensors> SplitIntoFiles(const ShardedParams& params, size_t max_bytes) {
  std::vector<NamedTensors> files(1);
  size_t bytes = 0;
  for (const Bucket& bucket : params.buckets()) {
    for (const ParamSlot& slot : bucket.slots) {
      const at::Tensor weight = SlotOf(bucket.weights, slot);
      if (bytes > 0 && bytes + weight.nbytes() > max_bytes) {
        files.emplace_back();
        bytes = 0;
      }
      files.back().emplace_back(slot.spec.name, weight);
      bytes += weight.nbytes();
    }
  }
  return files;
}

absl::Status WriteWeights(const fs::path& folder, const ShardedParams& params, size_t max_bytes) {
  const std::map<std::string, std::string> metadata = {{"format", "pt"}};
  const std::vector<NamedTensors> files = SplitIntoFiles(params, max_bytes);
  if (files.size() == 1) {
    return WriteSafetensors(folder / "model.safetensors", files[0], metadata).status();
  }
  size_t total = 0;
  nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
  for (size_t i = 0; i < files.size(); ++i) {
    const std::string name = absl::StrFormat("model-%05d-of-%05d.safetensors", i + 1, files.size());
    SIMPO_RETURN_IF_ERROR(WriteSafetensors(folder / name, files[i], metadata).status());
    for (const auto& [tensor_name, tensor] : files[i]) {
      weight_map[tensor_name] = name;
      total += tensor.nbytes();
    }
  }
  const nlohmann::ordered_json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
  return WriteFileAtomically(folder / "model.safetensors.index.json", index.dump(2) + "\n");
}

absl::Status CopyIfThere(const fs::path& from, const fs::path& to, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    if (!fs::exists(from / name)) continue;
    SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(from / name, kMaxTokenizerBytes));
    SIMPO_RETURN_IF_ERROR(WriteFileAtomically(to / name, text));
  }
  return absl::OkStatus();
}

absl::Status WriteTokenizer(const fs::path& folder, const fs::path& tokenizer_dir, const std::string& chat_template) {
  SIMPO_RETURN_IF_ERROR(
      CopyIfThere(tokenizer_dir, folder,
                  {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"}));
  if (chat_template.empty()) return absl::OkStatus();
  // This file wins over a template within tokenizer_config.json.
  return WriteFileAtomically(folder / "chat_template.jinja", chat_template);
}

}  // namespace

absl::Status ExportHf(const fs::path& final_dir, ShardedParams& params, const ModelConfig& config,
                      const fs::path& model_dir, const fs::path& tokenizer_dir, const std::string& chat_template,
                      Collectives& comm, int64_t max_file_bytes) {
  const auto write = [&]() -> absl::Status {
    const fs::path partial = PartialFolder(final_dir);
    SIMPO_RETURN_IF_ERROR(StartFolder(final_dir));
    SIMPO_RETURN_IF_ERROR(WriteConfig(model_dir / "config.json", partial / "config.json", params.compute_dtype()));
    SIMPO_RETURN_IF_ERROR(CheckConfig(partial, config, model_dir));
    SIMPO_RETURN_IF_ERROR(CopyIfThere(model_dir, partial, {"generation_config.json"}));
    SIMPO_RETURN_IF_ERROR(WriteTokenizer(partial, tokenizer_dir, chat_template));
    SIMPO_RETURN_IF_ERROR(WriteWeights(partial, params, static_cast<size_t>(max_file_bytes)));
    return PublishFolder(final_dir);
  };
  absl::Status status;
  params.GatherAll();
  if (comm.rank() == 0) {
    status = write();
    std::error_code ignored;  // the error to report is the one before
    if (!status.ok()) fs::remove_all(PartialFolder(final_dir), ignored);
  }
  params.ReleaseAll();
  return AgreeOn(status, comm, "writing the final model");
}

}  // namespace simpo
