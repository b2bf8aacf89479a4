// A training run without training, as the simulated gang runs it and the tests expect it.
#ifndef SIMPO_TESTS_CHAOS_SIMULATED_RUN_H_
#define SIMPO_TESTS_CHAOS_SIMULATED_RUN_H_

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"

namespace simpo {

// The state of a run after a step follows from the state before it, and the loss from the state: whoever resumes
// from a wrong place, takes a step twice or leaves one out has other losses from there on.
class SimulatedRun {
 public:
  explicit SimulatedRun(uint64_t seed) : state_(seed) {}
  void Step() { state_ = state_ * 6364136223846793005u + 1442695040888963407u; }
  uint64_t state() const { return state_; }
  double loss() const { return static_cast<double>(state_ >> 11) * 0x1.0p-53; }

 private:
  uint64_t state_;
};

// What a job's file asks of the simulated gang; labels carry what no key does.
struct SimulatedJob {
  int ranks = 1;
  int steps = 10;
  int step_ms = 10;
  int save_steps = 4;
  uint64_t seed = 1;
  int faults = 0;            // attempts, from the first, that end with 75 halfway
  int exit_code = 0;         // at the end; 2: refused while it is prepared, 3: refused halfway
  int max_restarts = 1'000;  // since processes are killed too
  std::string output_dir;    // empty: the coordinator's choice
};

inline std::string SimulatedJobYaml(const SimulatedJob& job) {
  std::string yaml = absl::StrCat(
      "model_name_or_path: org/model\ndataset_mixer: {org/data: 1.0}\nglobal_batch_size: 8\nsave_strategy: steps\n",
      "max_steps: ", job.steps, "\nsave_steps: ", job.save_steps, "\nseed: ", job.seed,
      "\nmax_restarts: ", job.max_restarts, "\nresources: {ranks_per_node: ", job.ranks, ", threads_per_rank: 1}\n",
      "labels: {step_ms: \"", job.step_ms, "\", faults: \"", job.faults, "\", exit: \"", job.exit_code, "\"}\n");
  if (!job.output_dir.empty()) absl::StrAppend(&yaml, "output_dir: ", job.output_dir, "\n");
  return yaml;
}

// The file to which every start and end of a gang is appended, a line each: "prepare FOLDER", "start JOB ATTEMPT PID",
// "end JOB ATTEMPT CODE" and, when an earlier attempt of the job still runs, "overlap JOB ATTEMPT".
inline constexpr char kJournalVariable[] = "SIMPO_SIMULATED_JOURNAL";

}  // namespace simpo

#endif  // SIMPO_TESTS_CHAOS_SIMULATED_RUN_H_
