// The NCCL side of the stand-in: the functions of libnccl that collectives_nccl.cc calls.
#include <ATen/ATen.h>
#include <nccl.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <set>

#include "tests/worker/comm/stand_in.h"
#include "tests/worker/comm/stand_in_state.h"

using simpo::stand_in::Call;
using simpo::stand_in::Device;
using simpo::stand_in::Faults;
using simpo::stand_in::Log;
using simpo::stand_in::Problem;
using simpo::stand_in::TheState;

namespace {

// One rank's call of one collective.
struct Part {
  const char* name;
  const char* from;
  char* to;
  size_t count;
  ncclDataType_t type;
  int root;
};

// The ranks that hold one unique id.
struct Group {
  std::mutex mutex;
  std::condition_variable changed;
  int world_size = 0;
  std::set<int> joined, dead, leaving;
  struct Op {
    std::map<int, Part> parts;
    bool done = false;
    int left = 0;
  };
  std::map<int64_t, Op> ops;
};

std::mutex g_groups_mutex;
std::map<std::string, std::shared_ptr<Group>> g_groups;

struct CommState {
  std::shared_ptr<Group> group;
  int rank = 0;
  std::atomic<int> async_error = ncclSuccess;
  std::atomic<bool> aborted = false;
};

at::ScalarType ScalarType(ncclDataType_t type) {
  switch (type) {
    case ncclFloat32:
      return at::kFloat;
    case ncclBfloat16:
      return at::kBFloat16;
    case ncclFloat64:
      return at::kDouble;
    case ncclInt64:
      return at::kLong;
    default:
      return at::kByte;
  }
}

at::Tensor TensorAt(const char* data, size_t count, ncclDataType_t type) {
  return at::from_blob(const_cast<char*>(data), {static_cast<int64_t>(count)}, ScalarType(type));
}

bool Match(const Group::Op& op) {
  const Part& first = op.parts.begin()->second;
  for (const auto& [rank, part] : op.parts) {
    if (std::strcmp(part.name, first.name) != 0 || part.count != first.count || part.type != first.type ||
        part.root != first.root) {
      Problem(c10::str("ranks meet in different collectives: ", first.name, " of ", first.count, ", rank ", rank,
                       " in ", part.name, " of ", part.count));
      return false;
    }
  }
  return true;
}

// All ranks have come; all memory is at hand. Sums are made in the order of the ranks.
void CarryOut(const Group& group, const Group::Op& op) {
  if (!Match(op)) return;
  const std::string name = op.parts.at(0).name;
  const size_t count = op.parts.at(0).count;
  const ncclDataType_t type = op.parts.at(0).type;
  const auto world = static_cast<size_t>(group.world_size);
  const auto slice = static_cast<int64_t>(count);
  if (name == "ncclAllReduce" || name == "ncclReduceScatter") {
    const bool scatter = name == "ncclReduceScatter";
    const size_t all = scatter ? count * world : count;
    at::Tensor sum = TensorAt(op.parts.at(0).from, all, type).clone();
    for (int rank = 1; rank < group.world_size; ++rank) sum.add_(TensorAt(op.parts.at(rank).from, all, type));
    for (const auto& [rank, part] : op.parts) {
      // Nobody is to rely on what is left of the other slices.
      if (scatter && at::isFloatingType(sum.scalar_type())) TensorAt(part.from, all, type).fill_(std::nan(""));
      TensorAt(part.to, count, type).copy_(scatter ? sum.narrow(0, rank * slice, slice) : sum);
    }
  } else if (name == "ncclAllGather") {
    std::vector<at::Tensor> slices;
    for (const auto& [rank, part] : op.parts) slices.push_back(TensorAt(part.from, count, type).clone());
    const at::Tensor whole = at::cat(slices);
    for (const auto& [rank, part] : op.parts) TensorAt(part.to, count * world, type).copy_(whole);
  } else {
    const Part& root = op.parts.at(op.parts.at(0).root);
    const at::Tensor value = TensorAt(root.from, count, type).clone();
    for (const auto& [rank, part] : op.parts) TensorAt(part.to, count, type).copy_(value);
  }
}

// Runs on the stream's thread. Blocks until all ranks have come or this one aborts, as a kernel does.
void Meet(CommState& comm, int64_t number, const Part& part, bool hangs) {
  Group& group = *comm.group;
  std::unique_lock lock(group.mutex);
  if (comm.aborted) return;
  if (hangs) {
    group.changed.wait(lock, [&] { return comm.aborted.load(); });
    return;
  }
  Group::Op& op = group.ops[number];
  op.parts.emplace(comm.rank, part);
  if (static_cast<int>(op.parts.size()) == group.world_size) {
    CarryOut(group, op);
    op.done = true;
    group.changed.notify_all();
  }
  group.changed.wait(lock, [&] {
    if (!op.done && !group.dead.empty()) comm.async_error = ncclRemoteError;
    return op.done || comm.aborted;
  });
  if (!op.done) op.parts.erase(comm.rank);
  if (op.done && ++op.left == group.world_size) group.ops.erase(number);
}

}  // namespace

struct ncclComm {
  const std::shared_ptr<CommState> state = std::make_shared<CommState>();
  int device = 0;
  int64_t collectives = 0;
  int polls_left = 0;  // ncclInProgress so often
  bool finalized = false;
};

namespace {

ncclResult_t Begin(ncclComm* comm, const ncclResult_t now = ncclSuccess) {
  const std::lock_guard lock(TheState().mutex);
  comm->polls_left = TheState().faults.in_progress_polls;
  return comm->polls_left > 0 ? ncclInProgress : now;
}

ncclResult_t Collective(const Part& part, ncclComm* comm, cudaStream_t stream) {
  Log({.name = part.name,
       .stream = stream->name,
       .from = part.from,
       .to = part.to,
       .count = part.count,
       .type = part.type,
       .root = part.root},
      Device());
  if (comm->polls_left > 0) Problem("a collective begins while the communicator is in progress");
  if (comm->device != Device()) Problem("a collective begins on another device than the communicator's");
  const std::pair key(comm->state->rank, comm->collectives++);
  Faults faults;
  {
    const std::lock_guard lock(TheState().mutex);
    faults = TheState().faults;
  }
  if (const auto error = faults.call_errors.find(key); error != faults.call_errors.end()) return error->second;
  if (const auto error = faults.async_errors.find(key); error != faults.async_errors.end()) {
    stream->Add([state = comm->state, code = error->second] { state->async_error = code; });
  }
  stream->Add([state = comm->state, number = key.second, part, hangs = faults.hangs.contains(key)] {
    Meet(*state, number, part, hangs);
  });
  return Begin(comm);
}

void Leave(ncclComm* comm) {
  {
    const std::lock_guard lock(comm->state->group->mutex);
    comm->state->aborted = true;
    comm->state->group->changed.notify_all();
  }
  delete comm;
}

}  // namespace

namespace simpo::stand_in {

void Die(int rank) {
  const std::lock_guard groups_lock(g_groups_mutex);
  for (auto& [id, group] : g_groups) {
    const std::lock_guard lock(group->mutex);
    group->dead.insert(rank);
    group->changed.notify_all();
  }
}

}  // namespace simpo::stand_in

extern "C" {

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<int> next = 1;
  std::memset(id, 0, sizeof(*id));
  // Also after a zero byte: ids are bytes, not text.
  id->internal[64] = static_cast<char>(next);
  id->internal[65] = static_cast<char>(next++ >> 8);
  Log({.name = "ncclGetUniqueId"}, Device());
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* out, int world_size, ncclUniqueId id, int rank, ncclConfig_t* config) {
  Log({.name = "ncclCommInitRankConfig", .count = static_cast<size_t>(world_size), .root = rank}, Device());
  if (config->blocking != 0) Problem("the communicator blocks");
  auto* comm = new ncclComm;
  comm->device = Device();
  comm->state->rank = rank;
  {
    const std::lock_guard lock(g_groups_mutex);
    std::shared_ptr<Group>& group = g_groups[std::string(id.internal, sizeof(id.internal))];
    if (group == nullptr) group = std::make_shared<Group>();
    comm->state->group = group;
  }
  Group& group = *comm->state->group;
  const std::lock_guard lock(group.mutex);
  group.world_size = world_size;
  if (!group.joined.insert(rank).second) Problem(c10::str("two ranks ", rank));
  *out = comm;
  (void)Begin(comm);
  return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  Group& group = *comm->state->group;
  const std::lock_guard lock(group.mutex);
  *state = static_cast<ncclResult_t>(comm->state->async_error.load());
  if (*state != ncclSuccess) return ncclSuccess;
  const bool waits = static_cast<int>(group.joined.size()) < group.world_size;
  if (waits || comm->polls_left > 0) *state = ncclInProgress;
  if (!waits && comm->polls_left > 0) --comm->polls_left;
  return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  if (op != ncclSum) Problem("not a sum");
  return Collective({"ncclAllReduce", static_cast<const char*>(from), static_cast<char*>(to), count, type, -1}, comm,
                    stream);
}
ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
  if (op != ncclSum) Problem("not a sum");
  return Collective({"ncclReduceScatter", static_cast<const char*>(from), static_cast<char*>(to), count, type, -1},
                    comm, stream);
}
ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  return Collective({"ncclAllGather", static_cast<const char*>(from), static_cast<char*>(to), count, type, -1}, comm,
                    stream);
}
ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return Collective({"ncclBroadcast", static_cast<const char*>(from), static_cast<char*>(to), count, type, root}, comm,
                    stream);
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  Log({.name = "ncclCommFinalize"}, Device());
  comm->finalized = true;
  return Begin(comm);
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  Log({.name = "ncclCommDestroy"}, Device());
  if (!comm->finalized || comm->polls_left > 0) Problem("a communicator that is not finalized is destroyed");
  Leave(comm);
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  Log({.name = "ncclCommAbort"}, Device());
  {
    std::unique_lock lock(TheState().mutex);
    TheState().changed.wait(lock, [] { return !TheState().faults.abort_hangs; });
  }
  Leave(comm);
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) {
  static thread_local std::string text;
  text = c10::str("NCCL result ", static_cast<int>(result));
  return text.c_str();
}
const char* ncclGetLastError(ncclComm_t) { return "what the stand-in says"; }

}  // extern "C"
