#include "worker/shard/checkpoint.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/atomic_file.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/model/safetensors.h"
#include "worker/shard/agree_on.h"
#include "worker/shard/replace_folder.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

constexpr const char* kParts[] = {"master", "exp_avg", "exp_avg_sq"};
constexpr int64_t kDigestLength = 64;

const at::Tensor& Part(const Bucket& bucket, int part) {
  return part == 0 ? bucket.master : part == 1 ? bucket.exp_avg : bucket.exp_avg_sq;
}

std::string ShapeText(const std::vector<int64_t>& sizes) { return absl::StrCat("[", absl::StrJoin(sizes, ", "), "]"); }

// Writes this rank's shard and returns its SHA-256.
absl::StatusOr<std::string> WriteShard(const fs::path& folder, const ShardedParams& params, Collectives& comm) {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const Bucket& bucket : params.buckets()) {
    for (int part = 0; part < 3; ++part) {
      at::Tensor slice = Part(bucket, part);
      // Stage 0 holds everything on every rank; each writes its slice all the same.
      if (params.zero_stage() == 0) {
        slice = slice.narrow(0, comm.rank() * bucket.shard_numel, bucket.shard_numel);
      }
      tensors.emplace_back(absl::StrCat(bucket.name, ".", kParts[part]), slice);
    }
  }
  const fs::path file = folder / CheckpointShardName(comm.rank(), comm.world_size());
  SIMPO_RETURN_IF_ERROR(WriteSafetensors(file, tensors, {}).status());
  return Sha256OfFile(file);
}

// Every rank's digest, on every rank.
std::vector<std::string> GatherDigests(const std::string& mine, Collectives& comm) {
  at::Tensor digests = at::zeros({comm.world_size() * kDigestLength}, at::kByte);
  char* text = static_cast<char*>(digests.data_ptr());
  std::memcpy(text + comm.rank() * kDigestLength, mine.data(), kDigestLength);
  comm.AllGather(digests);
  std::vector<std::string> result;
  for (int rank = 0; rank < comm.world_size(); ++rank) {
    result.emplace_back(text + rank * kDigestLength, kDigestLength);
  }
  return result;
}

absl::Status WriteManifest(const fs::path& folder, const ShardedParams& params, const TrainerState& state,
                           const std::vector<std::string>& digests) {
  CheckpointManifest manifest{
      .state = state, .world_size = static_cast<int>(digests.size()), .zero_stage = params.zero_stage()};
  for (const Bucket& bucket : params.buckets()) {
    CheckpointManifest::Layout layout{.name = bucket.name, .shard_numel = bucket.shard_numel};
    for (const ParamSlot& slot : bucket.slots) {
      layout.slots.push_back({slot.spec.name, slot.spec.shape, slot.offset});
    }
    manifest.buckets.push_back(std::move(layout));
  }
  for (int rank = 0; rank < manifest.world_size; ++rank) {
    const std::string name = CheckpointShardName(rank, manifest.world_size);
    std::error_code error;
    const auto bytes = static_cast<int64_t>(fs::file_size(folder / name, error));
    if (error) {
      return absl::FailedPreconditionError(absl::StrCat("rank 0 does not see ", (folder / name).string(), " of rank ",
                                                        rank, ": ", error.message(),
                                                        "; output_dir must be on a file system that all ranks share"));
    }
    manifest.files.push_back({name, bytes, digests[rank]});
  }
  return WriteFileAtomically(folder / "manifest.json", FormatManifest(manifest));
}

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
    const std::string name = absl::StrCat(bucket.name, ".", kParts[part]);
    const SafetensorsEntry* entry = file.Find(name);
    if (entry == nullptr || entry->dtype != at::kFloat || entry->shape != std::vector<int64_t>{stored_numel}) {
      return absl::DataLossError(
          absl::StrCat(file.path().string(), ": tensor ", name, " is missing or not F32 [", stored_numel, "]"));
    }
    const at::Tensor source = file.View(*entry).narrow(0, begin - stored_begin, end - begin);
    Part(bucket, part).narrow(0, begin - mine_begin, end - begin).copy_(source);
  }
  return absl::OkStatus();
}

// Fills this rank's slice of every bucket from the shards that hold parts of it.
absl::Status ReadShards(const fs::path& path, const CheckpointManifest& manifest, ShardedParams& params,
                        Collectives& comm) {
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

// Removes what runs that were cut off left half-made.
absl::Status RemovePartials(const fs::path& checkpoints_dir) {
  std::error_code error;
  std::vector<fs::path> partials;
  for (const auto& item : fs::directory_iterator(checkpoints_dir, error)) {
    if (item.path().extension() == ".partial") partials.push_back(item.path());
  }
  for (const fs::path& path : partials) {
    fs::remove_all(path, error);
    if (error) {
      return absl::UnavailableError(absl::StrCat("cannot remove ", path.string(), ": ", error.message()));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<fs::path> WriteCheckpoint(const fs::path& path, const ShardedParams& params, const TrainerState& state,
                                         Collectives& comm) {
  absl::Status status;
  if (comm.rank() == 0) {
    status = RemovePartials(path.parent_path());
    if (status.ok()) status = StartFolder(path);
  }
  SIMPO_RETURN_IF_ERROR(AgreeOn(status, comm, "making the checkpoint folder"));
  const fs::path partial = PartialFolder(path);
  const absl::StatusOr<std::string> digest = WriteShard(partial, params, comm);
  SIMPO_RETURN_IF_ERROR(AgreeOn(digest.status(), comm, "writing a checkpoint shard"));
  const std::vector<std::string> digests = GatherDigests(*digest, comm);
  if (comm.rank() == 0) {
    status = WriteManifest(partial, params, state, digests);
    if (status.ok()) status = PublishFolder(path);
  }
  SIMPO_RETURN_IF_ERROR(AgreeOn(status, comm, "finishing the checkpoint"));
  return path;
}

}  // namespace

absl::StatusOr<fs::path> SaveCheckpoint(const fs::path& checkpoints_dir, const ShardedParams& params,
                                        const TrainerState& state, Collectives& comm) {
  const fs::path path = checkpoints_dir / absl::StrFormat("step-%06d", state.step);
  absl::StatusOr<fs::path> result = WriteCheckpoint(path, params, state, comm);
  if (!result.ok() && comm.rank() == 0) {
    std::error_code ignored;  // the error to report is the one before
    fs::remove_all(PartialFolder(path), ignored);
  }
  return result;
}

absl::StatusOr<std::optional<fs::path>> LatestCheckpoint(const fs::path& checkpoints_dir,
                                                         std::vector<std::string>* skipped) {
  SIMPO_ASSIGN_OR_RETURN(const std::vector<StepFolder> steps, ListSteps(checkpoints_dir));
  for (const StepFolder& folder : steps) {
    const absl::StatusOr<CheckpointManifest> manifest = ReadManifest(folder.path);
    const absl::Status status = manifest.ok() ? CheckShardFiles(folder.path, *manifest, 0, 1) : manifest.status();
    if (status.ok()) return folder.path;
    if (skipped != nullptr) skipped->emplace_back(status.message());
  }
  return std::nullopt;
}

absl::StatusOr<TrainerState> LoadCheckpoint(const fs::path& path, ShardedParams& params, Collectives& comm) {
  const absl::StatusOr<CheckpointManifest> manifest = ReadManifest(path);
  absl::Status status = manifest.status();
  if (status.ok()) status = CheckLayout(path, *manifest, params);
  if (status.ok()) status = CheckShardFiles(path, *manifest, comm.rank(), comm.world_size());
  SIMPO_RETURN_IF_ERROR(AgreeOn(status, comm, "checking the checkpoint"));
  SIMPO_RETURN_IF_ERROR(AgreeOn(ReadShards(path, *manifest, params, comm), comm, "reading the checkpoint"));
  params.SpreadAll();
  return manifest->state;
}

absl::Status PruneCheckpoints(const fs::path& checkpoints_dir, int keep, std::span<const fs::path> protect) {
  if (keep <= 0) return absl::OkStatus();
  const auto normal = [](const fs::path& path) { return fs::absolute(path).lexically_normal(); };
  SIMPO_ASSIGN_OR_RETURN(const std::vector<StepFolder> steps, ListSteps(checkpoints_dir));
  int kept = 0;
  int64_t newer_step = -1;
  for (const StepFolder& folder : steps) {
    const bool leftover = folder.step == newer_step;  // the replaced folder of a step that is there
    newer_step = folder.step;
    if (!leftover && ++kept <= keep) continue;
    const bool is_protected = std::any_of(protect.begin(), protect.end(),
                                          [&](const fs::path& path) { return normal(path) == normal(folder.path); });
    if (!is_protected) SIMPO_RETURN_IF_ERROR(RemoveFolder(folder.path));
  }
  return absl::OkStatus();
}

}  // namespace simpo
