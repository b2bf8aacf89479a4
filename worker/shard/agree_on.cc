#include "worker/shard/agree_on.h"

#include <ATen/ATen.h>

#include <string>

#include "absl/strings/str_cat.h"

namespace simpo {

absl::Status AgreeOn(const absl::Status& mine, Collectives& comm, std::string_view what) {
  at::Tensor codes_W = at::zeros({comm.world_size()}, at::kLong);
  auto* codes = codes_W.data_ptr<int64_t>();
  codes[comm.rank()] = static_cast<int64_t>(mine.code());
  comm.AllReduce(codes_W);
  if (!mine.ok()) return mine;
  for (int rank = 0; rank < comm.world_size(); ++rank) {
    if (codes[rank] == 0) continue;
    return absl::Status(
        static_cast<absl::StatusCode>(codes[rank]),
        absl::StrCat(std::string(what), " failed on rank ", rank, ", whose log has the reason"));
  }
  return absl::OkStatus();
}

}  // namespace simpo
