#include "coordinator/audit_log.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/log.h"

namespace simpo {
namespace {

constexpr size_t kMaxTextBytes = 512;  // of what a caller chose

std::string TimeNow() {
  const auto now = std::chrono::system_clock::now();
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count();
  const time_t seconds = ms / 1000;
  tm utc = {};
  gmtime_r(&seconds, &utc);
  char text[32];
  strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &utc);
  return absl::StrFormat("%s.%03dZ", text, ms % 1000);
}

}  // namespace

AuditLog::AuditLog(std::filesystem::path file, int64_t max_bytes, int kept)
    : file_(std::move(file)), max_bytes_(max_bytes), kept_(kept) {}

AuditLog::~AuditLog() {
  if (fd_ >= 0) close(fd_);
}

void AuditLog::Open() {
  fd_ = open(file_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
  struct stat info = {};
  bytes_ = fd_ >= 0 && fstat(fd_, &info) == 0 ? info.st_size : 0;
}

void AuditLog::Rotate() {
  close(fd_);
  fd_ = -1;
  const auto numbered = [&](int number) {
    return file_.parent_path() / absl::StrCat(file_.stem().string(), ".", number, file_.extension().string());
  };
  std::error_code ignored;  // one that is missing
  for (int number = kept_ - 1; number >= 1; --number) {
    std::filesystem::rename(numbered(number), numbered(number + 1), ignored);
  }
  std::filesystem::rename(file_, numbered(1), ignored);
  Open();
}

void AuditLog::Write(const Entry& entry) {
  const auto cut = [](const std::string& text) { return text.substr(0, kMaxTextBytes); };
  const nlohmann::ordered_json json = {{"time", TimeNow()},           {"user", cut(entry.user)},
                                       {"role", entry.role},          {"peer", cut(entry.peer)},
                                       {"method", cut(entry.method)}, {"job", cut(entry.job)},
                                       {"outcome", entry.outcome},    {"reason", cut(entry.reason)}};
  const std::string line = json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  const std::lock_guard lock(mutex_);
  if (fd_ < 0) Open();
  if (fd_ >= 0 && bytes_ > 0 && bytes_ + static_cast<int64_t>(line.size()) > max_bytes_) Rotate();
  const bool written = fd_ >= 0 && write(fd_, line.data(), line.size()) == static_cast<ssize_t>(line.size());
  if (written) {
    bytes_ += static_cast<int64_t>(line.size());
    complained_ = false;
  } else if (!std::exchange(complained_, true)) {
    LOG_ERROR(absl::StrCat("cannot write the audit log ", file_.string(), ": ", std::strerror(errno)));
  }
}

}  // namespace simpo
