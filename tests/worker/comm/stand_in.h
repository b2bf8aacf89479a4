#ifndef SIMPO_TESTS_WORKER_COMM_STAND_IN_H_
#define SIMPO_TESTS_WORKER_COMM_STAND_IN_H_

#include <ATen/core/Tensor.h>
#include <nccl.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "worker/comm/collectives.h"

// A stand-in for libnccl and for cuda_calls.h on host memory; ranks are threads of one process, each with
// a device of its number. Streams are threads with a queue, so what runs too early or is not waited for
// is seen. Tensors of float and bfloat16 count as device memory, those of other types as host memory:
// the trainer has its weights and gradients on one side, votes and statistics on the other.
namespace simpo::stand_in {

// One call, by the device that made it. Streams: "current", "comm"; events by their number on the device.
struct Call {
  std::string name;  // "ncclAllReduce", "RecordEvent", ...
  std::string stream;
  int event = -1;
  const void* from = nullptr;
  const void* to = nullptr;
  size_t count = 0;
  ncclDataType_t type = ncclNumTypes;
  int root = -1;
};

struct Faults {
  int in_progress_polls = 0;  // how often every call answers ncclInProgress before it is through
  // By rank and number of the collective (from 0):
  std::map<std::pair<int, int64_t>, ncclResult_t> call_errors;   // the call itself returns it
  std::map<std::pair<int, int64_t>, ncclResult_t> async_errors;  // found later, by ncclCommGetAsyncError
  std::map<std::pair<int, int64_t>, bool> hangs;                 // never ends
  bool abort_hangs = false;                                      // ncclCommAbort blocks until Reset
};

// Waits until all streams are idle, then forgets calls and faults.
void Reset(const Faults& faults = {});
std::vector<Call> Calls(int device);
int Count(int device, const std::string& name);
// Misuse that real libraries answer with a crash, a hang or wrong numbers; empty if there was none.
std::vector<std::string> Problems();

// Whether `data` lies in what DeviceEmpty (or PinnedEmpty) gave and still holds.
bool IsDeviceMemory(const void* data);
bool IsPinnedMemory(const void* data);

// By default the current stream is in step with its thread, as tensor code on the CPU is. With false it
// is a queue as on a GPU: what it does is given with LaunchOnCurrentStream.
void SetInStep(bool in_step);
void LaunchOnCurrentStream(std::function<void()> work);
void SynchronizeCurrentStream();

// Runs rank_main once per rank on threads, with collectives over NCCL. An exception is its rank's text.
std::vector<std::string> RunRanks(int ranks, const std::function<void(Collectives&)>& rank_main,
                                  const NcclOptions& options = {});
// The process of this rank is gone: its peers find out by ncclRemoteError.
void Die(int rank);

}  // namespace simpo::stand_in

#endif  // SIMPO_TESTS_WORKER_COMM_STAND_IN_H_
