#ifndef SIMPO_WORKER_DATA_ISOLATED_H_
#define SIMPO_WORKER_DATA_ISOLATED_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace simpo {

// What each thread of isolated work is busy with, in memory that the parent sees. Thread-safe.
class BusyWith {
 public:
  // `place` is what this thread does from now on ("train.jsonl:7"); empty: nothing.
  void Set(std::string_view place);

 private:
  friend absl::StatusOr<std::string> RunIsolated(const struct IsolationLimits& limits,
                                                 const std::function<absl::StatusOr<std::string>(BusyWith&)>& work);
  static constexpr int kThreads = 64;  // more share slots
  static constexpr size_t kPlaceBytes = 256;
  std::string Places() const;
  std::atomic<uint64_t> changes_ = 0;
  char places_[kThreads][kPlaceBytes] = {};
};

struct IsolationLimits {
  int64_t memory_bytes = 0;  // on top of what the process has; 0: none
  int stall_seconds = 1800;  // without any BusyWith::Set
};

// Runs `work` in a child process and returns what it returned. For work on files of strangers: when the
// child crashes, wants more memory than it may have or stalls, that is an INVALID_ARGUMENT that names
// what its threads were busy with. The child is a fork, so nothing that `work` changes in memory is seen
// here. Call it before other threads hold locks that `work` needs. Not limited in memory under the
// address sanitizer.
absl::StatusOr<std::string> RunIsolated(const IsolationLimits& limits,
                                        const std::function<absl::StatusOr<std::string>(BusyWith&)>& work);

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_ISOLATED_H_
