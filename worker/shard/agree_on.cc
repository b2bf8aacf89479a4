#include "worker/shard/agree_on.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

constexpr int64_t kMaxTextBytes = 4096;

}  // namespace

std::string BroadcastText(const std::string& text, int root, Collectives& comm) {
  at::Tensor bytes = at::zeros({kMaxTextBytes}, at::kByte);
  char* data = static_cast<char*>(bytes.data_ptr());
  if (comm.rank() == root) std::copy_n(text.data(), std::min<size_t>(text.size(), kMaxTextBytes), data);
  comm.Broadcast(bytes, root);
  return std::string(data, strnlen(data, kMaxTextBytes));
}

absl::Status AgreeOn(const absl::Status& mine, Collectives& comm, std::string_view what) {
  at::Tensor codes_W = at::zeros({comm.world_size()}, at::kLong);
  auto* codes = codes_W.data_ptr<int64_t>();
  codes[comm.rank()] = static_cast<int64_t>(mine.code());
  comm.AllReduce(codes_W);
  const auto failed = [](int64_t code) { return code != 0; };
  const auto first = static_cast<int>(std::find_if(codes, codes + comm.world_size(), failed) - codes);
  if (first == comm.world_size()) return absl::OkStatus();
  const std::string reason = BroadcastText(std::string(mine.message()), first, comm);
  if (!mine.ok()) return mine;
  return absl::Status(static_cast<absl::StatusCode>(codes[first]),
                      absl::StrCat(std::string(what), " failed on rank ", first, ": ", reason));
}

}  // namespace simpo
