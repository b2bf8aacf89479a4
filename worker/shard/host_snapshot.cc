#include "worker/shard/host_snapshot.h"

#include <ATen/ATen.h>
#include <sys/mman.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "common/host_name.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
constexpr int64_t kAlignment = 64;

int64_t Padded(const at::Tensor& tensor) {
  return (static_cast<int64_t>(tensor.nbytes()) + kAlignment - 1) / kAlignment * kAlignment;
}

// The number after `key` in a file of "key value" lines; with an empty key, the file's first number.
std::optional<int64_t> NumberIn(const fs::path& path, std::string_view key) {
  std::ifstream file(path);
  std::string word;
  while (!key.empty() && file >> word && word != key) {
  }
  int64_t value = 0;
  if (!(file >> value)) return std::nullopt;
  return value;
}

// "max", no limit, is no number.
int64_t LimitOfControlGroup(const fs::path& folder) { return NumberIn(folder / "memory.max", "").value_or(kUnlimited); }

// What the control group at `folder` can still take; its cached files can be given up.
int64_t LeftInControlGroup(const fs::path& folder) {
  const int64_t most = LimitOfControlGroup(folder);
  const std::optional<int64_t> used = NumberIn(folder / "memory.current", "");
  if (most == kUnlimited || !used) return kUnlimited;
  return most - *used + NumberIn(folder / "memory.stat", "inactive_file").value_or(0);
}

// The least of `key` of /proc/meminfo and of what the control groups of this process say.
int64_t LeastOf(std::string_view key, int64_t (*of_group)(const fs::path& folder)) {
  int64_t least = NumberIn("/proc/meminfo", key).value_or(kUnlimited / 1024) * 1024;
  // Version 2 of control groups: one line, "0::/path"; a limit may stand at any level.
  std::string line;
  std::ifstream("/proc/self/cgroup") >> line;
  if (!line.starts_with("0::/")) return least;
  const fs::path root = "/sys/fs/cgroup";
  for (fs::path group = line.substr(4);; group = group.parent_path()) {
    least = std::min(least, of_group(root / group));
    if (group.empty()) return least;
  }
}

}  // namespace

int64_t BytesOf(const NamedTensors& tensors) {
  int64_t bytes = 0;
  for (const auto& [name, tensor] : tensors) bytes += static_cast<int64_t>(tensor.nbytes());
  return bytes;
}

absl::StatusOr<NamedTensors> CopyToHost(const NamedTensors& tensors) {
  size_t bytes = 0;
  for (const auto& [name, tensor] : tensors) bytes += static_cast<size_t>(Padded(tensor));
  // Not from the allocator, which keeps what it is given back.
  void* const base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED)
    return absl::ResourceExhaustedError(absl::StrCat("no memory for a copy of ", bytes, " bytes"));
  madvise(base, bytes, MADV_HUGEPAGE);
  const std::shared_ptr<void> region(base, [bytes](void* data) { munmap(data, bytes); });
  NamedTensors copies;
  int64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    at::Tensor copy = at::from_blob(
        static_cast<char*>(base) + offset, tensor.sizes(), [region](void*) {}, tensor.options().device(at::kCPU));
    copy.copy_(tensor);
    copies.emplace_back(name, std::move(copy));
    offset += Padded(tensor);
  }
  return copies;
}

int64_t TotalMemory() { return LeastOf("MemTotal:", LimitOfControlGroup); }

int64_t AvailableMemory() { return LeastOf("MemAvailable:", LeftInControlGroup); }

int RanksOnThisHost(Collectives& comm) {
  at::Tensor names_W = at::zeros({comm.world_size()}, at::kLong);
  auto* names = names_W.data_ptr<int64_t>();
  const auto mine = static_cast<int64_t>(std::hash<std::string>()(HostName()) >> 1);
  names[comm.rank()] = mine;
  comm.AllReduce(names_W);
  return static_cast<int>(std::count(names, names + comm.world_size(), mine));
}

}  // namespace simpo
