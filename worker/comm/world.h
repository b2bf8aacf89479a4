#ifndef SIMPO_WORKER_COMM_WORLD_H_
#define SIMPO_WORKER_COMM_WORLD_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace simpo {

using GetEnv = std::function<const char*(const char*)>;  // as std::getenv

// Where this process stands in its gang, as whoever started it says, before any rank talks to another.
struct RankInfo {
  enum class StartedBy {
    kNobody,       // alone
    kMpi,          // mpirun or srun: ranks know each other from MPI, which has the last word on these numbers
    kEnvironment,  // torchrun, a Kubernetes Indexed Job: RANK and WORLD_SIZE, no MPI
  };
  StartedBy started_by = StartedBy::kNobody;
  int rank = 0;
  int world_size = 1;
  int local_rank = 0;  // among those on this machine
  int local_size = 1;
};
// Reads OMPI_COMM_WORLD_* (mpirun), SLURM_* beside PMIX_RANK or PMI_RANK (srun), or RANK (else
// JOB_COMPLETION_INDEX), WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. An error names the variable.
absl::StatusOr<RankInfo> RankFromEnvironment(const GetEnv& getenv);

// Where ranks that have no MPI meet: a key-value store of torch that rank 0, or torchrun's agent, serves.
struct MeetingPlace {
  std::string host;
  uint16_t port = 0;
  bool served_by_rank_0 = true;
  std::string round = "0";  // keys of an earlier start of the same gang are not taken for this one's
  std::chrono::milliseconds timeout{300'000};
};
// MASTER_ADDR, MASTER_PORT and what torchrun adds to them.
absl::StatusOr<MeetingPlace> MeetingPlaceFromEnvironment(const GetEnv& getenv);

// Gives every rank the bytes of rank 0 once all have come. Every rank of the gang calls it once per round.
// When the time is up the error names the ranks that have not come; two processes with one number, or with
// different world sizes, are an error on every rank.
absl::StatusOr<std::string> MeetOverTcp(const RankInfo& me, const MeetingPlace& place, const std::string& of_rank_0);

// "ranks 1, 4-6 of 8"
std::string NameRanks(const std::vector<int>& ranks, int world_size);

}  // namespace simpo

#endif  // SIMPO_WORKER_COMM_WORLD_H_
