// Compiled into the worker itself, with SIMPO_CUDA where it is linked with the CUDA libraries.
#include "worker/comm/join_world.h"

#include <ATen/ATen.h>
#include <mpi.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#ifdef SIMPO_CUDA
#include "worker/comm/cuda_calls.h"
#endif

namespace simpo {
namespace {

bool HasMpi() {
  int started = 0;
  MPI_Initialized(&started);
  return started != 0;
}

#ifdef SIMPO_CUDA
absl::Status ReadSeconds(const char* name, std::chrono::milliseconds* value) {
  const char* text = std::getenv(name);
  int seconds = 0;
  if (text == nullptr || *text == '\0') return absl::OkStatus();
  if (!absl::SimpleAtoi(text, &seconds) || seconds < 1) {
    return absl::FailedPreconditionError(
        absl::StrCat("environment variable ", name, " is '", text, "'; it must be a number of seconds from 1"));
  }
  *value = std::chrono::seconds(seconds);
  return absl::OkStatus();
}

// Each rank of a machine takes the GPU of its number there, or the only one that it was given.
absl::Status TakeGpu(const RankInfo& me) {
  const int gpus = cuda::DeviceCount();
  if (gpus == 0) {
    return absl::FailedPreconditionError(
        "no GPU is visible to this process: see nvidia-smi and CUDA_VISIBLE_DEVICES, or set resources.device: cpu");
  }
  if (gpus > 1 && me.local_rank >= gpus) {
    return absl::FailedPreconditionError(absl::StrCat("rank ", me.rank, " is number ", me.local_rank,
                                                      " on its machine, which shows ", gpus,
                                                      " GPUs: start at most one rank per GPU"));
  }
  cuda::UseDevice(gpus == 1 ? 0 : me.local_rank);
  return absl::OkStatus();
}

std::string ShareOverMpi(Collectives& mpi, std::string bytes) {
  at::Tensor size = at::full({1}, static_cast<int64_t>(bytes.size()), at::kLong);
  mpi.Broadcast(size, 0);
  bytes.resize(static_cast<size_t>(size.item<int64_t>()));
  mpi.Broadcast(at::from_blob(bytes.data(), {size.item<int64_t>()}, at::kByte), 0);
  return bytes;
}

absl::StatusOr<std::unique_ptr<Collectives>> JoinGpus(const RankInfo& me, std::unique_ptr<Collectives> mpi,
                                                      const Meet& at_coordinator) {
  SIMPO_RETURN_IF_ERROR(TakeGpu(me));
  NcclOptions options;
  SIMPO_RETURN_IF_ERROR(ReadSeconds("SIMPO_NCCL_TIMEOUT_S", &options.timeout));
  SIMPO_RETURN_IF_ERROR(ReadSeconds("SIMPO_JOIN_TIMEOUT_S", &options.connect_timeout));
  absl::Status not_met;
  const auto share = [&](const std::string& of_rank_0) {
    if (mpi != nullptr) return ShareOverMpi(*mpi, of_rank_0);
    absl::StatusOr<std::string> bytes;
    if (at_coordinator != nullptr) {
      bytes = at_coordinator(of_rank_0, options.connect_timeout);
    } else {
      absl::StatusOr<MeetingPlace> place = MeetingPlaceFromEnvironment(&std::getenv);
      if (place.ok()) place->timeout = options.connect_timeout;
      bytes = place.ok() ? MeetOverTcp(me, *place, of_rank_0) : place.status();
    }
    not_met = bytes.status();
    if (!bytes.ok()) throw std::runtime_error(std::string(bytes.status().message()));
    return *std::move(bytes);
  };
  try {
    return mpi != nullptr ? MakeNcclCollectives(mpi->rank(), mpi->world_size(), share, options)
                          : MakeNcclCollectives(me.rank, me.world_size, share, options);
  } catch (const std::exception& error) {
    return not_met.ok() ? absl::UnavailableError(error.what()) : not_met;
  }
}
#else
absl::StatusOr<std::unique_ptr<Collectives>> JoinGpus(const RankInfo&, std::unique_ptr<Collectives>, const Meet&) {
  return CheckDevice(/*on_gpus=*/true);
}
#endif

}  // namespace

absl::Status CheckDevice(bool on_gpus) {
#ifdef SIMPO_CUDA
  constexpr bool kHasCuda = true;
#else
  constexpr bool kHasCuda = false;
#endif
  if (kHasCuda || !on_gpus) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "resources.device is cuda, but this simpo-worker is built for the CPU: build it with 'make build PRESET=cuda' "
      "(docs/gpu.md), or set resources.device: cpu");
}

absl::StatusOr<std::unique_ptr<Collectives>> JoinWorld(const RankInfo& me, bool on_gpus, const Meet& at_coordinator) {
  std::unique_ptr<Collectives> mpi;
  if (me.started_by != RankInfo::StartedBy::kEnvironment) {
    // The thread that waits in MPI gives its core to the ranks that compute, unless the user says otherwise.
    setenv("OMPI_MCA_mpi_yield_when_idle", "1", /*overwrite=*/0);
    int provided = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided);
    mpi = MakeMpiCollectives();
  }
  if (on_gpus) return JoinGpus(me, std::move(mpi), at_coordinator);
  if (mpi != nullptr) return mpi;
  if (me.world_size == 1) return MakeSingleRankCollectives();
  return absl::FailedPreconditionError(absl::StrCat(
      "RANK and WORLD_SIZE ask for a gang of ", me.world_size,
      " ranks without mpirun, and on CPUs ranks talk over MPI: start them with mpirun, or set resources.device: cuda"));
}

void LeaveWorld() {
  if (HasMpi()) MPI_Finalize();
}

void EndGang(int exit_code) {
  std::fflush(nullptr);
  if (HasMpi()) MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

}  // namespace simpo
