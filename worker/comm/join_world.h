#ifndef SIMPO_WORKER_COMM_JOIN_WORLD_H_
#define SIMPO_WORKER_COMM_JOIN_WORLD_H_

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/comm/collectives.h"
#include "worker/comm/world.h"

namespace simpo {

// Meets the other ranks somewhere and gives each the bytes of rank 0; as MeetOverTcp.
using Meet = std::function<absl::StatusOr<std::string>(const std::string& of_rank_0, std::chrono::milliseconds)>;

// Whether this build has what the device needs; an error says how to get it.
absl::Status CheckDevice(bool on_gpus);

// Joins the gang that this process was started for. On CPUs ranks talk over MPI. On GPUs they talk over NCCL,
// whose id they get over MPI where mpirun or srun started them, else from `at_coordinator`, else, where that
// is null, at MASTER_ADDR. Environment: SIMPO_JOIN_TIMEOUT_S, SIMPO_NCCL_TIMEOUT_S. MPI runs afterwards
// unless the gang was started without it.
absl::StatusOr<std::unique_ptr<Collectives>> JoinWorld(const RankInfo& me, bool on_gpus, const Meet& at_coordinator);

// The end of a rank that has finished together with its peers.
void LeaveWorld();

// The end of a rank that fails alone: its peers may be waiting in a collective that it will never reach.
// MPI ends them; without MPI their NCCL sees this process end.
[[noreturn]] void EndGang(int exit_code);

}  // namespace simpo

#endif  // SIMPO_WORKER_COMM_JOIN_WORLD_H_
