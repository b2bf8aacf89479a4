#include "worker/shard/checkpoint_writer.h"

#include <ATen/ATen.h>

#include <chrono>
#include <cstring>
#include <exception>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/atomic_file.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "worker/model/safetensors.h"
#include "worker/shard/agree_on.h"
#include "worker/shard/checkpoint.h"
#include "worker/shard/replace_folder.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr int64_t kDigestLength = 64;

double Seconds(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }

// This rank's slice of every bucket, under the names of the format.
NamedTensors ShardOf(const ShardedParams& params, const Collectives& comm) {
  NamedTensors tensors;
  for (const Bucket& bucket : params.buckets()) {
    const at::Tensor* const parts[] = {&bucket.master, &bucket.exp_avg, &bucket.exp_avg_sq};
    for (int part = 0; part < 3; ++part) {
      at::Tensor slice = *parts[part];
      // Stage 0 holds everything on every rank; each writes its slice all the same.
      if (params.zero_stage() == 0) {
        slice = slice.narrow(0, comm.rank() * bucket.shard_numel, bucket.shard_numel);
      }
      tensors.emplace_back(absl::StrCat(bucket.name, ".", kCheckpointParts[part]), std::move(slice));
    }
  }
  return tensors;
}

// Every rank's digest, on every rank.
std::vector<std::string> GatherDigests(const std::string& mine, Collectives& comm) {
  at::Tensor digests = at::zeros({comm.world_size() * kDigestLength}, at::kByte);
  char* text = static_cast<char*>(digests.data_ptr());
  std::memcpy(text + comm.rank() * kDigestLength, mine.data(), kDigestLength);
  comm.AllGather(digests);
  std::vector<std::string> result;
  result.reserve(comm.world_size());
  for (int rank = 0; rank < comm.world_size(); ++rank) {
    result.emplace_back(text + rank * kDigestLength, kDigestLength);
  }
  return result;
}

// The manifest but for its files.
CheckpointManifest Describe(const ShardedParams& params, const TrainerState& state, int world_size) {
  CheckpointManifest manifest{.state = state,
                              .world_size = world_size,
                              .zero_stage = params.zero_stage(),
                              .compute_dtype = params.compute_dtype() == at::kBFloat16 ? "bfloat16" : "float32"};
  for (const Bucket& bucket : params.buckets()) {
    CheckpointManifest::Layout layout{.name = bucket.name, .shard_numel = bucket.shard_numel};
    for (const ParamSlot& slot : bucket.slots) {
      layout.slots.push_back({slot.spec.name, slot.spec.shape, slot.offset});
    }
    manifest.buckets.push_back(std::move(layout));
  }
  return manifest;
}

}  // namespace

CheckpointWriter::CheckpointWriter(Options options, Collectives& comm)
    : options_(std::move(options)), comm_(comm), ranks_on_host_(RanksOnThisHost(comm)) {}

CheckpointWriter::~CheckpointWriter() {
  given_up_ = true;
  if (thread_.joinable()) thread_.join();
}

absl::Status CheckpointWriter::StartFolders() {
  SIMPO_RETURN_IF_ERROR(RemovePartials(options_.checkpoints_dir));
  SIMPO_RETURN_IF_ERROR(StartFolder(report_.path));
  if (options_.hf_files.empty()) return absl::OkStatus();
  return MakeFolders(PartialFolder(report_.path) / kHfFilesFolder);
}

absl::Status CheckpointWriter::Begin(const ShardedParams& params, const TrainerState& state, bool in_background) {
  TORCH_CHECK(!under_way_, "a checkpoint is under way");
  const auto begin = Clock::now();
  report_ = {.path = options_.checkpoints_dir / CheckpointName(state.step)};
  absl::Status status;
  if (comm_.rank() == 0) {
    status = StartFolders();
    if (!status.ok()) RemovePartial(report_.path).IgnoreError();
  }
  SIMPO_RETURN_IF_ERROR(AgreeOn(status, comm_, "making the checkpoint folder"));

  manifest_ = Describe(params, state, comm_.world_size());
  tensors_ = ShardOf(params, comm_);
  report_.bytes = BytesOf(tensors_);
  if (in_background) {
    // The other ranks of this host copy theirs at the same time; a tenth more, for everything else.
    const int64_t need = (report_.bytes + report_.bytes / 10) * ranks_on_host_;
    const int64_t available = options_.available_memory();
    absl::StatusOr<NamedTensors> copies = absl::ResourceExhaustedError("");
    if (need <= available) copies = CopyToHost(tensors_);
    report_.in_background = copies.ok();
    if (copies.ok()) {
      tensors_ = *std::move(copies);
    } else {
      LOG_INFO(
          absl::StrFormat("rank %d writes its shard while training waits: a copy for the background needs "
                          "%.1f GB on this host, which has %.1f GB left",
                          comm_.rank(), static_cast<double>(need) / 1e9, static_cast<double>(available) / 1e9));
    }
  }
  under_way_ = true;
  shard_done_ = false;
  if (report_.in_background) {
    thread_ = std::thread([this] { WriteFiles(); });
  } else {
    WriteFiles();
  }
  report_.blocked_seconds = Seconds(begin);
  return absl::OkStatus();
}

void CheckpointWriter::WriteFiles() {
  const auto begin = Clock::now();
  try {
    shard_status_ = WriteShard();
  } catch (const std::exception& error) {
    shard_status_ = absl::UnavailableError(absl::StrCat("cannot write ", report_.path.string(), ": ", error.what()));
  }
  tensors_.clear();
  report_.writing_seconds = Seconds(begin);
  shard_done_ = true;
}

absl::Status CheckpointWriter::WriteShard() {
  const fs::path partial = PartialFolder(report_.path);
  if (comm_.rank() == 0 && !options_.hf_files.empty()) {
    SIMPO_RETURN_IF_ERROR(WriteHfFiles(partial / kHfFilesFolder, options_.hf_files));
    SIMPO_RETURN_IF_ERROR(SyncPath(partial / kHfFilesFolder));
    for (const auto& [name, content] : options_.hf_files) {
      manifest_.hf_files.push_back({name, static_cast<int64_t>(content.size()), Sha256(content)});
    }
  }
  std::vector<SafetensorsWriter::TensorSpec> specs;
  for (const auto& [name, tensor] : tensors_) specs.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
  const fs::path file = partial / CheckpointShardName(comm_.rank(), comm_.world_size());
  SIMPO_ASSIGN_OR_RETURN(const auto writer, SafetensorsWriter::Create(file, specs, {}));
  for (const auto& [name, tensor] : tensors_) {
    if (given_up_) return absl::CancelledError(absl::StrCat("the run ended while it wrote ", file.string()));
    SIMPO_RETURN_IF_ERROR(writer->Append(tensor));
  }
  SIMPO_ASSIGN_OR_RETURN(const SafetensorsWriter::Written written, writer->Finish());
  digest_ = written.sha256;
  return absl::OkStatus();
}

absl::Status CheckpointWriter::Publish(const std::vector<std::string>& digests) {
  const fs::path partial = PartialFolder(report_.path);
  for (int rank = 0; rank < manifest_.world_size; ++rank) {
    const std::string name = CheckpointShardName(rank, manifest_.world_size);
    std::error_code error;
    const auto bytes = static_cast<int64_t>(fs::file_size(partial / name, error));
    if (error) {
      return absl::FailedPreconditionError(absl::StrCat("rank 0 does not see ", (partial / name).string(), " of rank ",
                                                        rank, ": ", error.message(),
                                                        "; output_dir must be on a file system that all ranks share"));
    }
    manifest_.files.push_back({name, bytes, digests[rank]});
  }
  SIMPO_RETURN_IF_ERROR(WriteFileAtomically(partial / "manifest.json", FormatManifest(manifest_)));
  return PublishFolder(report_.path);
}

absl::StatusOr<CheckpointWriter::Report> CheckpointWriter::Finish() {
  TORCH_CHECK(under_way_, "no checkpoint is under way");
  const auto begin = Clock::now();
  if (thread_.joinable()) thread_.join();
  under_way_ = false;
  absl::Status status = AgreeOn(shard_status_, comm_, "writing a checkpoint shard");
  if (status.ok()) {
    const std::vector<std::string> digests = GatherDigests(digest_, comm_);
    absl::Status published;
    if (comm_.rank() == 0) published = Publish(digests);
    status = AgreeOn(published, comm_, "finishing the checkpoint");
  }
  if (!status.ok()) {
    if (comm_.rank() == 0) RemovePartial(report_.path).IgnoreError();
    return status;
  }
  report_.blocked_seconds += Seconds(begin);
  return report_;
}

}  // namespace simpo
