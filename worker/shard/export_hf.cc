#include "worker/shard/export_hf.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/atomic_file.h"
#include "common/file_system.h"
#include "common/status_macros.h"
#include "worker/model/json_fields.h"
#include "worker/model/read_model_config.h"
#include "worker/model/safetensors.h"
#include "worker/shard/agree_on.h"
#include "worker/shard/checkpoint_manifest.h"
#include "worker/shard/replace_folder.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
constexpr int64_t kMaxJsonBytes = 64 << 20;
constexpr int64_t kMaxTokenizerBytes = 1 << 30;

// The source's config.json with the dtype of what stands beside it.
absl::StatusOr<std::string> ConfigFor(const fs::path& source, at::ScalarType dtype) {
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(source, kMaxJsonBytes));
  SIMPO_RETURN_IF_ERROR(ParseJsonObject(text, source.string()).status());
  auto json = nlohmann::ordered_json::parse(text);  // once more, to keep the order of its fields
  // transformers 4 reads torch_dtype, transformers 5 both.
  const char* name = dtype == at::kBFloat16 ? "bfloat16" : "float32";
  if (json.contains("dtype")) json["dtype"] = name;
  if (json.contains("torch_dtype") || !json.contains("dtype")) json["torch_dtype"] = name;
  return json.dump(2) + "\n";
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

// The weights of a model in files of at most max_bytes (more when one tensor is larger), written one
// tensor after the other.
class WeightFiles {
 public:
  WeightFiles(fs::path folder, const std::vector<SafetensorsWriter::TensorSpec>& weights, int64_t max_bytes)
      : folder_(std::move(folder)) {
    int64_t bytes = 0;
    for (const SafetensorsWriter::TensorSpec& weight : weights) {
      int64_t size = static_cast<int64_t>(c10::elementSize(weight.dtype));
      for (int64_t extent : weight.shape) size *= extent;
      if (files_.empty() || (bytes > 0 && bytes + size > max_bytes)) {
        files_.emplace_back();
        bytes = 0;
      }
      files_.back().push_back(weight);
      bytes += size;
      total_ += size;
    }
  }

  // The next weight, in the order of the constructor's list.
  absl::Status Append(const at::Tensor& weight) {
    if (writer_ == nullptr) {
      SIMPO_ASSIGN_OR_RETURN(writer_,
                             SafetensorsWriter::Create(folder_ / NameOf(file_), files_[file_], {{"format", "pt"}}));
    }
    SIMPO_RETURN_IF_ERROR(writer_->Append(weight));
    if (++in_file_ < files_[file_].size()) return absl::OkStatus();
    SIMPO_RETURN_IF_ERROR(writer_->Finish().status());
    writer_.reset();
    in_file_ = 0;
    ++file_;
    return absl::OkStatus();
  }

  // After the last weight.
  absl::Status WriteIndex() {
    if (files_.size() == 1) return absl::OkStatus();
    nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
    for (size_t i = 0; i < files_.size(); ++i) {
      for (const SafetensorsWriter::TensorSpec& weight : files_[i]) weight_map[weight.name] = NameOf(i);
    }
    const nlohmann::ordered_json index = {{"metadata", {{"total_size", total_}}}, {"weight_map", weight_map}};
    return WriteHfFiles(folder_, {{"model.safetensors.index.json", index.dump(2) + "\n"}});
  }

 private:
  std::string NameOf(size_t file) const {
    if (files_.size() == 1) return "model.safetensors";
    return absl::StrFormat("model-%05d-of-%05d.safetensors", file + 1, files_.size());
  }

  const fs::path folder_;
  std::vector<std::vector<SafetensorsWriter::TensorSpec>> files_;
  int64_t total_ = 0;  // bytes
  std::unique_ptr<SafetensorsWriter> writer_;
  size_t file_ = 0, in_file_ = 0;  // where the next weight goes
};

absl::Status AddIfThere(const fs::path& folder, std::initializer_list<const char*> names, HfFiles* files) {
  for (const char* name : names) {
    if (!fs::exists(folder / name)) continue;
    SIMPO_ASSIGN_OR_RETURN(std::string text, ReadFile(folder / name, kMaxTokenizerBytes));
    files->emplace_back(name, std::move(text));
  }
  return absl::OkStatus();
}

// Rank 0's part of ExportHf before the weights.
absl::Status BeginExport(const fs::path& final_dir, const ModelConfig& config, const fs::path& model_dir,
                         const HfFiles& files) {
  SIMPO_RETURN_IF_ERROR(StartFolder(final_dir));
  SIMPO_RETURN_IF_ERROR(WriteHfFiles(PartialFolder(final_dir), files));
  return CheckConfig(PartialFolder(final_dir), config, model_dir);
}

// One tensor's masters out of the shards that hold parts of it.
absl::Status Assemble(const CheckpointManifest::Layout& bucket, const CheckpointManifest::Slot& slot,
                      const std::vector<std::unique_ptr<SafetensorsFile>>& shards, at::Tensor* weight) {
  const std::string name = absl::StrCat(bucket.name, ".master");
  const at::Tensor flat = weight->view({-1});
  for (size_t rank = 0; rank < shards.size(); ++rank) {
    const int64_t shard_begin = static_cast<int64_t>(rank) * bucket.shard_numel;
    const int64_t begin = std::max(slot.offset, shard_begin);
    const int64_t end = std::min(slot.offset + flat.numel(), shard_begin + bucket.shard_numel);
    if (begin >= end) continue;
    const SafetensorsEntry* entry = shards[rank]->Find(name);
    if (entry == nullptr || entry->dtype != at::kFloat || entry->shape != std::vector<int64_t>{bucket.shard_numel}) {
      return absl::DataLossError(absl::StrCat(shards[rank]->path().string(), ": tensor ", name,
                                              " is missing or not F32 [", bucket.shard_numel, "]"));
    }
    flat.narrow(0, begin - slot.offset, end - begin)
        .copy_(shards[rank]->View(*entry).narrow(0, begin - shard_begin, end - begin));
    shards[rank]->Drop(*entry);
  }
  return absl::OkStatus();
}

absl::Status WriteCheckpointWeights(const fs::path& checkpoint, const CheckpointManifest& manifest,
                                    const fs::path& folder, int64_t max_file_bytes) {
  const at::ScalarType dtype = manifest.compute_dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
  std::vector<std::unique_ptr<SafetensorsFile>> shards;
  for (const CheckpointManifest::File& file : manifest.files) {
    SIMPO_ASSIGN_OR_RETURN(auto shard, SafetensorsFile::Open(checkpoint / file.name));
    shards.push_back(std::move(shard));
  }
  std::vector<SafetensorsWriter::TensorSpec> specs;
  for (const CheckpointManifest::Layout& bucket : manifest.buckets) {
    for (const CheckpointManifest::Slot& slot : bucket.slots) specs.push_back({slot.name, dtype, slot.shape});
  }
  WeightFiles files(folder, specs, max_file_bytes);
  for (const CheckpointManifest::Layout& bucket : manifest.buckets) {
    for (const CheckpointManifest::Slot& slot : bucket.slots) {
      at::Tensor weight = at::empty(slot.shape, dtype);
      SIMPO_RETURN_IF_ERROR(Assemble(bucket, slot, shards, &weight));
      SIMPO_RETURN_IF_ERROR(files.Append(weight));
    }
  }
  return files.WriteIndex();
}

absl::StatusOr<HfFiles> CheckpointHfFiles(const fs::path& checkpoint, const CheckpointManifest& manifest) {
  if (manifest.hf_files.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat(checkpoint.string(),
                     " carries no config.json: an earlier version wrote it. Resume from it once with "
                     "resume_from_checkpoint and save_strategy, and export what that run saves"));
  }
  HfFiles files;
  for (const CheckpointManifest::File& file : manifest.hf_files) {
    SIMPO_ASSIGN_OR_RETURN(std::string text, ReadFile(checkpoint / kHfFilesFolder / file.name, kMaxTokenizerBytes));
    files.emplace_back(file.name, std::move(text));
  }
  return files;
}

}  // namespace

absl::StatusOr<HfFiles> ReadHfFiles(const fs::path& model_dir, const fs::path& tokenizer_dir,
                                    const std::string& chat_template, at::ScalarType dtype) {
  HfFiles files;
  SIMPO_ASSIGN_OR_RETURN(std::string config, ConfigFor(model_dir / "config.json", dtype));
  files.emplace_back("config.json", std::move(config));
  SIMPO_RETURN_IF_ERROR(AddIfThere(model_dir, {"generation_config.json"}, &files));
  SIMPO_RETURN_IF_ERROR(AddIfThere(tokenizer_dir,
                                   {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"},
                                   &files));
  // The template's file wins over one within tokenizer_config.json.
  if (chat_template.empty()) {
    SIMPO_RETURN_IF_ERROR(AddIfThere(tokenizer_dir, {"chat_template.jinja"}, &files));
  } else {
    files.emplace_back("chat_template.jinja", chat_template);
  }
  return files;
}

absl::Status WriteHfFiles(const fs::path& folder, const HfFiles& files) {
  for (const auto& [name, content] : files) {
    OutputFile file(folder / name);
    SIMPO_RETURN_IF_ERROR(file.Write(content.data(), content.size()));
    SIMPO_RETURN_IF_ERROR(file.Sync());
  }
  return absl::OkStatus();
}

absl::Status ExportHf(const fs::path& final_dir, ShardedParams& params, const ModelConfig& config,
                      const fs::path& model_dir, const fs::path& tokenizer_dir, const std::string& chat_template,
                      Collectives& comm, int64_t max_file_bytes) {
  absl::Status status;
  std::optional<WeightFiles> weights;  // rank 0
  if (comm.rank() == 0) {
    const absl::StatusOr<HfFiles> files = ReadHfFiles(model_dir, tokenizer_dir, chat_template, params.compute_dtype());
    status = files.ok() ? BeginExport(final_dir, config, model_dir, *files) : files.status();
    std::vector<SafetensorsWriter::TensorSpec> specs;
    for (const Bucket& bucket : params.buckets()) {
      for (const ParamSlot& slot : bucket.slots) {
        specs.push_back({slot.spec.name, params.compute_dtype(), slot.spec.shape});
      }
    }
    weights.emplace(PartialFolder(final_dir), specs, max_file_bytes);
  }
  // All ranks take part to the end, whatever rank 0 meets.
  for (int64_t i = 0; i < params.num_buckets(); ++i) {
    params.Gather(i);
    const Bucket& bucket = params.buckets()[i];
    for (size_t s = 0; s < bucket.slots.size() && comm.rank() == 0 && status.ok(); ++s) {
      status = weights->Append(SlotOf(bucket.weights, bucket.slots[s]));
    }
    comm.activity().Moved();
    params.Release(i);
  }
  if (comm.rank() == 0) {
    if (status.ok()) status = weights->WriteIndex();
    if (status.ok()) status = PublishFolder(final_dir);
    if (!status.ok()) RemovePartial(final_dir).IgnoreError();
  }
  return AgreeOn(status, comm, "writing the final model");
}

absl::Status ExportCheckpoint(const fs::path& checkpoint, const fs::path& to, int64_t max_file_bytes) {
  std::error_code error;
  if (fs::exists(to, error) && !(fs::is_directory(to, error) && fs::is_empty(to, error))) {
    return absl::FailedPreconditionError(
        absl::StrCat(to.string(), " is there already; give another folder with --to, or remove it"));
  }
  SIMPO_ASSIGN_OR_RETURN(const CheckpointManifest manifest, ReadManifest(checkpoint));
  SIMPO_RETURN_IF_ERROR(CheckShardFiles(checkpoint, manifest, 0, 1));
  SIMPO_ASSIGN_OR_RETURN(const HfFiles files, CheckpointHfFiles(checkpoint, manifest));
  const auto write = [&]() -> absl::Status {
    SIMPO_RETURN_IF_ERROR(StartFolder(to));
    SIMPO_RETURN_IF_ERROR(WriteHfFiles(PartialFolder(to), files));
    SIMPO_RETURN_IF_ERROR(WriteCheckpointWeights(checkpoint, manifest, PartialFolder(to), max_file_bytes));
    return PublishFolder(to);
  };
  absl::Status status = write();
  if (!status.ok()) RemovePartial(to).IgnoreError();
  return status;
}

}  // namespace simpo
