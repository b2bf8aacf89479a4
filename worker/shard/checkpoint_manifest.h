#ifndef SIMPO_WORKER_SHARD_CHECKPOINT_MANIFEST_H_
#define SIMPO_WORKER_SHARD_CHECKPOINT_MANIFEST_H_

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace simpo {

// What a run is besides its tensors.
struct TrainerState {
  int64_t step = 0;  // optimizer steps done
  int64_t steps_planned = 0;
  int64_t global_batch_size = 0;
  int64_t pairs_seen = 0;
  int64_t tokens_seen = 0;
  int64_t seed = 0;
  std::map<std::string, double> extra;  // kept bit for bit, except which NaN it is
};

// manifest.json of a checkpoint: docs/checkpoint_format.md.
struct CheckpointManifest {
  struct Slot {
    std::string name;
    std::vector<int64_t> shape;
    int64_t offset = 0;  // elements from the bucket's start
  };
  struct Layout {
    std::string name;
    int64_t shard_numel = 0;
    std::vector<Slot> slots;
  };
  struct File {
    std::string name;
    int64_t bytes = 0;
    std::string sha256;
  };
  TrainerState state;
  int world_size = 1;
  int zero_stage = 0;         // of the run that wrote it; the shards do not depend on it
  std::string compute_dtype;  // "float32" or "bfloat16": of the run, and of an export
  std::vector<Layout> buckets;
  std::vector<File> files;     // one per rank, in order
  std::vector<File> hf_files;  // in kHfFilesFolder; none in a checkpoint of format 1
};

// The folder within a checkpoint that holds what an HF model folder has beside the weights.
inline constexpr const char* kHfFilesFolder = "hf";

// The file of `rank`'s shard: "shard-00000-of-00002.safetensors".
std::string CheckpointShardName(int rank, int world_size);

std::string FormatManifest(const CheckpointManifest& manifest);

// Parses the text of a manifest; `where` names it in errors. DATA_LOSS when its own checksum does not fit
// or a field is missing or of another type.
absl::StatusOr<CheckpointManifest> ParseManifest(const std::string& text, const std::string& where);

// Parses `path`/manifest.json. NOT_FOUND when there is none.
absl::StatusOr<CheckpointManifest> ReadManifest(const std::filesystem::path& path);

// The text of a manifest with its own checksum filled in.
std::string SignManifest(std::string text);

// Compares the sizes and SHA-256 of the files first, first + stride, ... of the manifest (shards, then the
// others) with those in `path`, so that ranks can share the work. DATA_LOSS names the first file that is missing or
// differs.
absl::Status CheckShardFiles(const std::filesystem::path& path, const CheckpointManifest& manifest, size_t first,
                             size_t stride);

}  // namespace simpo

#endif  // SIMPO_WORKER_SHARD_CHECKPOINT_MANIFEST_H_
