#include "worker/comm/world.h"

#include <unistd.h>

#include <algorithm>
#include <optional>
#include <thread>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/host_name.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kPoll{50};
constexpr milliseconds kLeaveTimeout{10'000};
constexpr milliseconds kLeaveAfterErrorTimeout{2'000};

bool IsSet(const GetEnv& getenv, const char* name) {
  const char* value = getenv(name);
  return value != nullptr && *value != '\0';
}

// The first of `names` that is set, as a number in [least, most].
absl::StatusOr<int> Number(const GetEnv& getenv, const std::vector<const char*>& names, int least, int most,
                           std::optional<int> fallback = std::nullopt) {
  for (const char* name : names) {
    if (!IsSet(getenv, name)) continue;
    int value = 0;
    if (absl::SimpleAtoi(getenv(name), &value) && value >= least && value <= most) return value;
    return absl::FailedPreconditionError(absl::StrCat("environment variable ", name, " is '", getenv(name),
                                                      "'; it must be a number from ", least, " to ", most));
  }
  if (fallback) return *fallback;
  return absl::FailedPreconditionError(absl::StrCat("environment variable ", names[0], " is not set"));
}

constexpr int kMaxRanks = 1'000'000;

absl::StatusOr<RankInfo> Read(const GetEnv& getenv, RankInfo::StartedBy started_by,
                              const std::vector<const char*>& rank, const std::vector<const char*>& world_size,
                              const std::vector<const char*>& local_rank, const std::vector<const char*>& local_size) {
  RankInfo info{.started_by = started_by};
  SIMPO_ASSIGN_OR_RETURN(info.world_size, Number(getenv, world_size, 1, kMaxRanks));
  SIMPO_ASSIGN_OR_RETURN(info.rank, Number(getenv, rank, 0, info.world_size - 1));
  SIMPO_ASSIGN_OR_RETURN(info.local_rank, Number(getenv, local_rank, 0, info.world_size - 1, 0));
  SIMPO_ASSIGN_OR_RETURN(info.local_size, Number(getenv, local_size, 1, info.world_size, info.local_rank + 1));
  return info;
}

std::vector<uint8_t> Bytes(const std::string& text) { return {text.begin(), text.end()}; }
std::string Text(const std::vector<uint8_t>& bytes) { return {bytes.begin(), bytes.end()}; }

std::string MyName(int rank) { return absl::StrCat("rank ", rank, " on ", HostName(), " (process ", getpid(), ")"); }

// One rank at the store.
class Meeting {
 public:
  Meeting(const RankInfo& me, const MeetingPlace& place, c10d::TCPStore& store)
      : me_(me), place_(place), store_(store) {}

  absl::StatusOr<std::string> Meet(const std::string& of_rank_0) {
    absl::StatusOr<std::string> bytes = WaitForAll(of_rank_0);
    // Who serves the store leaves last, so that all find what they came for, or why they cannot.
    store_.add(Key("left"), 1);
    if (me_.rank != 0 || !place_.served_by_rank_0) return bytes;
    const auto deadline = Clock::now() + (bytes.ok() ? kLeaveTimeout : kLeaveAfterErrorTimeout);
    while (store_.add(Key("left"), 0) < me_.world_size && Clock::now() < deadline) std::this_thread::sleep_for(kPoll);
    return bytes;
  }

 private:
  absl::StatusOr<std::string> WaitForAll(const std::string& of_rank_0) {
    SIMPO_RETURN_IF_ERROR(Introduce());
    if (me_.rank == 0) store_.set(Key("bytes"), Bytes(of_rank_0));
    store_.add(Key("come"), 1);
    const auto deadline = Clock::now() + place_.timeout;
    while (store_.add(Key("come"), 0) < me_.world_size) {
      if (store_.check({Key("error")})) return absl::FailedPreconditionError(Text(store_.get(Key("error"))));
      if (Clock::now() > deadline) return absl::UnavailableError(FirstSaid("missing", Missing()));
      std::this_thread::sleep_for(kPoll);
    }
    return Text(store_.get(Key("bytes")));
  }

  std::string Key(const std::string& name) const { return absl::StrCat("simpo/", place_.round, "/", name); }

  // The value that the first rank to say one has given.
  std::string FirstSaid(const std::string& name, const std::string& mine) {
    return Text(store_.compareSet(Key(name), {}, Bytes(mine)));
  }

  // Says who this is; finds out whether somebody else says the same.
  absl::Status Introduce() {
    const std::string name = MyName(me_.rank);
    const std::string first = FirstSaid(absl::StrCat("rank/", me_.rank), name);
    if (first != name) {
      return Refuse(absl::StrCat("two processes have one number: ", first, " and ", name,
                                 ". Every process of the gang needs a RANK (or JOB_COMPLETION_INDEX) of its own."));
    }
    const std::string world = FirstSaid("world_size", absl::StrCat(me_.world_size, " ranks says ", name));
    if (int theirs = 0; absl::SimpleAtoi(world.substr(0, world.find(' ')), &theirs) && theirs != me_.world_size) {
      return Refuse(absl::StrCat("the ranks disagree on the size of the gang: ", world, ", ", me_.world_size,
                                 " ranks says ", name, ". WORLD_SIZE must be the same everywhere."));
    }
    return absl::OkStatus();
  }

  // An error that every rank is to hear.
  absl::Status Refuse(const std::string& message) { return absl::FailedPreconditionError(FirstSaid("error", message)); }

  std::string Missing() {
    std::vector<int> missing;
    for (int rank = 0; rank < me_.world_size; ++rank) {
      if (!store_.check({Key(absl::StrCat("rank/", rank))})) missing.push_back(rank);
    }
    return absl::StrCat(NameRanks(missing, me_.world_size), " did not come to ", place_.host, ":", place_.port,
                        " within ", place_.timeout.count() / 1000.0,
                        " s. See their logs; if they run, see whether they reach that address.");
  }

  const RankInfo& me_;
  const MeetingPlace& place_;
  c10d::TCPStore& store_;
};

}  // namespace

absl::StatusOr<RankInfo> RankFromEnvironment(const GetEnv& getenv) {
  using StartedBy = RankInfo::StartedBy;
  // mpirun first: a shell or a pod around it may have set the others too.
  if (IsSet(getenv, "OMPI_COMM_WORLD_SIZE")) {
    return Read(getenv, StartedBy::kMpi, {"OMPI_COMM_WORLD_RANK"}, {"OMPI_COMM_WORLD_SIZE"},
                {"OMPI_COMM_WORLD_LOCAL_RANK"}, {"OMPI_COMM_WORLD_LOCAL_SIZE"});
  }
  if (IsSet(getenv, "SLURM_PROCID") && (IsSet(getenv, "PMIX_RANK") || IsSet(getenv, "PMI_RANK"))) {
    return Read(getenv, StartedBy::kMpi, {"SLURM_PROCID"}, {"SLURM_NTASKS", "SLURM_NPROCS"}, {"SLURM_LOCALID"},
                {"SLURM_NTASKS_PER_NODE"});
  }
  const std::vector<const char*> rank = {"RANK", "JOB_COMPLETION_INDEX"};
  const bool has_rank = IsSet(getenv, rank[0]) || IsSet(getenv, rank[1]);
  if (!has_rank && !IsSet(getenv, "WORLD_SIZE")) return RankInfo{};
  absl::StatusOr<RankInfo> info =
      Read(getenv, StartedBy::kEnvironment, rank, {"WORLD_SIZE"}, {"LOCAL_RANK"}, {"LOCAL_WORLD_SIZE"});
  if (info.ok()) return info;
  return absl::FailedPreconditionError(
      absl::StrCat(info.status().message(),
                   ". A gang without mpirun takes RANK (or JOB_COMPLETION_INDEX) and WORLD_SIZE from the "
                   "environment; to run alone, unset both."));
}

absl::StatusOr<MeetingPlace> MeetingPlaceFromEnvironment(const GetEnv& getenv) {
  if (!IsSet(getenv, "MASTER_ADDR")) {
    return absl::FailedPreconditionError(
        "environment variable MASTER_ADDR is not set: ranks without mpirun or a coordinator meet at rank 0. Set it to "
        "rank 0's host name or address, and MASTER_PORT to a free port there.");
  }
  MeetingPlace place{.host = getenv("MASTER_ADDR")};
  SIMPO_ASSIGN_OR_RETURN(const int port, Number(getenv, {"MASTER_PORT"}, 1, 65535, 29500));
  place.port = static_cast<uint16_t>(port);
  // torchrun's agent serves a store at this address already.
  const char* agent = getenv("TORCHELASTIC_USE_AGENT_STORE");
  place.served_by_rank_0 = agent == nullptr || std::string(agent) != "True";
  if (IsSet(getenv, "TORCHELASTIC_RESTART_COUNT")) place.round = getenv("TORCHELASTIC_RESTART_COUNT");
  return place;
}

absl::StatusOr<std::string> MeetOverTcp(const RankInfo& me, const MeetingPlace& place, const std::string& of_rank_0) {
  const bool serves = me.rank == 0 && place.served_by_rank_0;
  c10::intrusive_ptr<c10d::TCPStore> store;
  const std::string address = absl::StrCat(place.host, ":", place.port);
  try {
    c10d::TCPStoreOptions options;
    options.port = place.port;
    options.isServer = serves;
    options.waitWorkers = false;  // it would not say who is missing
    options.timeout = place.timeout;
    store = c10::make_intrusive<c10d::TCPStore>(place.host, options);
  } catch (const c10::Error& error) {
    const std::string why(error.what_without_backtrace());
    if (serves) {
      return absl::UnavailableError(
          absl::StrCat("rank 0 cannot serve the meeting place ", address, ": ", why,
                       ". MASTER_ADDR must be this host, MASTER_PORT free, and one process only RANK 0."));
    }
    return absl::UnavailableError(absl::StrCat("rank ", me.rank, " cannot reach rank 0 at ", address, " within ",
                                               place.timeout.count() / 1000.0, " s: ", why,
                                               ". See whether rank 0 runs, and MASTER_ADDR and MASTER_PORT."));
  }
  try {
    return Meeting(me, place, *store).Meet(of_rank_0);
  } catch (const c10::Error& error) {
    return absl::UnavailableError(absl::StrCat("rank ", me.rank, " lost the meeting place at ", address, ": ",
                                               error.what_without_backtrace(),
                                               ". Rank 0 has probably ended: see its log."));
  }
}

std::string NameRanks(const std::vector<int>& ranks, int world_size) {
  std::string names;
  for (size_t i = 0; i < ranks.size();) {
    size_t last = i;
    while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) ++last;
    absl::StrAppend(&names, names.empty() ? "" : ", ", ranks[i]);
    if (last > i) absl::StrAppend(&names, last == i + 1 ? ", " : "-", ranks[last]);
    i = last + 1;
  }
  return absl::StrCat(ranks.size() == 1 ? "rank " : "ranks ", names, " of ", world_size);
}

}  // namespace simpo
