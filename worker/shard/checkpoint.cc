#include "worker/shard/checkpoint.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/status_macros.h"
#include "worker/model/safetensors.h"
#include "worker/shard/agree_on.h"
#include "worker/shard/checkpoint_writer.h"
#include "worker/shard/replace_folder.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

const at::Tensor& Part(const Bucket& bucket, int part) {
  return part == 0 ? bucket.master : part == 1 ? bucket.exp_avg : bucket.exp_avg_sq;
}

std::string ShapeText(const std::vector<int64_t>& sizes) { return absl::StrCat("[", absl::StrJoin(sizes, ", "), "]"); }

// Whether the model's tensors, and their places, are the checkpoint's.
absl::Status CheckLayout(const fs::path& path, const CheckpointManifest& manifest, const ShardedParams& params) {
  std::map<std::string, std::pair<const CheckpointManifest::Layout*, const CheckpointManifest::Slot*>> stored;
  for (const CheckpointManifest::Layout& bucket : manifest.buckets) {
    for (const CheckpointManifest::Slot& slot : bucket.slots) stored[slot.name] = {&bucket, &slot};
  }
  const std::string other = absl::StrCat("checkpoint ", path.string(), " is of another model: ");
  for (const Bucket& bucket : params.buckets()) {
    for (const ParamSlot& slot : bucket.slots) {
      const auto it = stored.find(slot.spec.name);
      const bool absent = it == stored.end();
      if (absent || it->second.second->shape != slot.spec.shape) {
        return absl::InvalidArgumentError(
            absl::StrCat(other, slot.spec.name, " has shape ", ShapeText(slot.spec.shape), " in the model and ",
                         absent ? "does not exist" : ShapeText(it->second.second->shape), " in the checkpoint"));
      }
      const auto& [layout, place] = it->second;
      const bool covered = place->offset + slot.numel <= layout->shard_numel * manifest.world_size;
      if (layout->name != bucket.name || place->offset != slot.offset || !covered) {
        return absl::InvalidArgumentError(
            absl::StrCat("checkpoint ", path.string(), " is laid out in another way: ", slot.spec.name, " is at ",
                         place->offset, " of ", layout->name, ", not at ", slot.offset, " of ", bucket.name));
      }
      stored.erase(it);
    }
  }
  if (stored.empty()) return absl::OkStatus();
  const auto& [name, place] = *stored.begin();
  return absl::InvalidArgumentError(absl::StrCat(other, name, " has shape ", ShapeText(place.second->shape),
                                                 " in the checkpoint and does not exist in the model"));
}

// Copies what the shard of `stored_rank` holds of this rank's slice of one bucket.
absl::Status ReadOverlap(const SafetensorsFile& file, int stored_rank, int64_t stored_numel, int64_t mine_begin,
                         const Bucket& bucket) {
  const int64_t stored_begin = stored_rank * stored_numel;
  const int64_t begin = std::max(mine_begin, stored_begin);
  const int64_t end = std::min(mine_begin + bucket.master.numel(), stored_begin + stored_numel);
  if (begin >= end) return absl::OkStatus();
  for (int part = 0; part < 3; ++part) {
    const std::string name = absl::StrCat(bucket.name, ".", kCheckpointParts[part]);
    const SafetensorsEntry* entry = file.Find(name);
    if (entry == nullptr || entry->dtype != at::kFloat || entry->shape != std::vector<int64_t>{stored_numel}) {
      return absl::DataLossError(
          absl::StrCat(file.path().string(), ": tensor ", name, " is missing or not F32 [", stored_numel, "]"));
    }
    const at::Tensor source = file.View(*entry).narrow(0, begin - stored_begin, end - begin);
    Part(bucket, part).narrow(0, begin - mine_begin, end - begin).copy_(source);
    file.Drop(*entry);
  }
  return absl::OkStatus();
}

// Fills this rank's slice of every bucket from the shards that hold parts of it.
absl::Status ReadShards(const fs::path& path, const CheckpointManifest& manifest, ShardedParams& params) {
  std::map<std::string, int64_t> stored_numel;
  for (const CheckpointManifest::Layout& bucket : manifest.buckets) {
    stored_numel[bucket.name] = bucket.shard_numel;
  }
  for (int stored_rank = 0; stored_rank < manifest.world_size; ++stored_rank) {
    const fs::path name = path / manifest.files[stored_rank].name;
    const absl::StatusOr<std::unique_ptr<SafetensorsFile>> file = SafetensorsFile::Open(name);
    if (!file.ok()) return absl::DataLossError(file.status().message());
    for (const Bucket& bucket : params.buckets()) {
      SIMPO_RETURN_IF_ERROR(ReadOverlap(**file, stored_rank, stored_numel[bucket.name], bucket.owned_begin, bucket));
    }
  }
  return absl::OkStatus();
}

struct StepFolder {
  int64_t step = 0;
  bool replaced = false;  // step-N.old: a crash came between the renames that replaced step-N
  fs::path path;
};

// The checkpoint folders by their names, newest first; a replaced one after its replacement.
absl::StatusOr<std::vector<StepFolder>> ListSteps(const fs::path& checkpoints_dir) {
  std::vector<StepFolder> steps;
  std::error_code error;
  const fs::directory_iterator folder(checkpoints_dir, error);
  if (error == std::errc::no_such_file_or_directory) return steps;
  for (const auto& item : folder) {
    std::string name = item.path().filename().string();
    const bool replaced = name.ends_with(".old");
    if (replaced) name.resize(name.size() - 4);
    const bool is_step = name.starts_with("step-") && name.size() > 5 && name.size() <= 20 &&
                         name.find_first_not_of("0123456789", 5) == std::string::npos;
    if (is_step) steps.push_back({std::stoll(name.substr(5)), replaced, item.path()});
  }
  if (error) {
    return absl::UnavailableError(absl::StrCat("cannot list ", checkpoints_dir.string(), ": ", error.message()));
  }
  std::sort(steps.begin(), steps.end(), [](const StepFolder& a, const StepFolder& b) {
    return std::pair(-a.step, a.replaced) < std::pair(-b.step, b.replaced);
  });
  return steps;
}

}  // namespace

std::string CheckpointName(int64_t step) { return absl::StrFormat("step-%06d", step); }

absl::StatusOr<fs::path> SaveCheckpoint(const fs::path& checkpoints_dir, const ShardedParams& params,
                                        const TrainerState& state, Collectives& comm) {
  CheckpointWriter writer({.checkpoints_dir = checkpoints_dir}, comm);
  SIMPO_RETURN_IF_ERROR(writer.Begin(params, state, /*in_background=*/false));
  SIMPO_ASSIGN_OR_RETURN(const CheckpointWriter::Report report, writer.Finish());
  return report.path;
}

absl::StatusOr<std::optional<fs::path>> LatestCheckpoint(const fs::path& checkpoints_dir, Collectives& comm,
                                                         std::vector<std::string>* skipped) {
  // Rank 0's list is everybody's, whatever the others see.
  absl::StatusOr<std::vector<StepFolder>> steps = std::vector<StepFolder>();
  if (comm.rank() == 0) steps = ListSteps(checkpoints_dir);
  SIMPO_RETURN_IF_ERROR(AgreeOn(steps.status(), comm, "listing the checkpoints"));
  for (size_t i = 0;; ++i) {
    fs::path path = BroadcastText(i < steps->size() ? (*steps)[i].path.string() : "", 0, comm);
    if (path.empty()) return std::nullopt;
    const absl::StatusOr<CheckpointManifest> manifest = ReadManifest(path);
    absl::Status status = manifest.status();
    if (status.ok()) status = CheckShardFiles(path, *manifest, comm.rank(), comm.world_size());
    status = AgreeOn(status, comm, "checking a checkpoint");
    if (status.ok()) return path;
    if (skipped != nullptr) skipped->emplace_back(status.message());
  }
}

absl::StatusOr<std::optional<fs::path>> LatestCheckpoint(const fs::path& checkpoints_dir,
                                                         std::vector<std::string>* skipped) {
  return LatestCheckpoint(checkpoints_dir, *MakeSingleRankCollectives(), skipped);
}

absl::Status RemovePartials(const fs::path& checkpoints_dir) {
  std::error_code error;
  std::vector<fs::path> partials;
  for (const auto& item : fs::directory_iterator(checkpoints_dir, error)) {
    if (item.path().extension() == ".partial") partials.push_back(item.path());
  }
  for (fs::path& path : partials) SIMPO_RETURN_IF_ERROR(RemovePartial(path.replace_extension()));
  return absl::OkStatus();
}

absl::StatusOr<TrainerState> LoadCheckpoint(const fs::path& path, ShardedParams& params, Collectives& comm) {
  const absl::StatusOr<CheckpointManifest> manifest = ReadManifest(path);
  absl::Status status = manifest.status();
  if (status.ok()) status = CheckLayout(path, *manifest, params);
  if (status.ok()) status = CheckShardFiles(path, *manifest, comm.rank(), comm.world_size());
  SIMPO_RETURN_IF_ERROR(AgreeOn(status, comm, "checking the checkpoint"));
  SIMPO_RETURN_IF_ERROR(AgreeOn(ReadShards(path, *manifest, params), comm, "reading the checkpoint"));
  params.SpreadAll();
  return manifest->state;
}

absl::Status PruneCheckpoints(const fs::path& checkpoints_dir, int keep, std::span<const fs::path> protect) {
  if (keep <= 0) return absl::OkStatus();
  const auto normal = [](const fs::path& path) { return fs::absolute(path).lexically_normal(); };
  const auto is_protected = [&](const StepFolder& folder) {
    return std::any_of(protect.begin(), protect.end(),
                       [&](const fs::path& path) { return normal(path) == normal(folder.path); });
  };
  SIMPO_ASSIGN_OR_RETURN(const std::vector<StepFolder> steps, ListSteps(checkpoints_dir));
  auto others = keep - std::count_if(steps.begin(), steps.end(), is_protected);  // that may stay
  int64_t newer_step = -1;
  for (const StepFolder& folder : steps) {
    const bool leftover = folder.step == newer_step;  // the replaced folder of a step that is there
    newer_step = folder.step;
    if (is_protected(folder) || (!leftover && others-- > 0)) continue;
    SIMPO_RETURN_IF_ERROR(RemoveFolder(folder.path));
  }
  return absl::OkStatus();
}

}  // namespace simpo
