#include "worker/data/isolated.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <new>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace simpo {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr bool kLimitsMemory = false;  // AddressSanitizer reserves terabytes
#else
constexpr bool kLimitsMemory = true;
#endif

// Bytes that count against RLIMIT_DATA now.
int64_t DataBytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmData:")) return strtoll(line.c_str() + 7, nullptr, 10) * 1024;
  }
  return 0;
}

void LimitChild(const IsolationLimits& limits) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  setenv("RUST_BACKTRACE", "0", /*overwrite=*/1);
  const rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) ::signal(signal, SIG_DFL);
  if (kLimitsMemory && limits.memory_bytes > 0) {
    const auto most = static_cast<rlim_t>(DataBytes() + limits.memory_bytes);
    const rlimit data{most, most};
    setrlimit(RLIMIT_DATA, &data);
  }
}

void WriteAll(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t size = write(fd, bytes.data(), bytes.size());
    if (size < 0 && errno == EINTR) continue;
    if (size <= 0) return;  // the parent is gone
    bytes.remove_prefix(static_cast<size_t>(size));
  }
}

// The answer on the pipe: one byte, the status code, then the text.
[[noreturn]] void RunChild(int fd, const IsolationLimits& limits, BusyWith& busy,
                           const std::function<absl::StatusOr<std::string>(BusyWith&)>& work) {
  LimitChild(limits);
  absl::StatusOr<std::string> result = absl::InternalError("");
  try {
    result = work(busy);
  } catch (const std::bad_alloc&) {
    raise(SIGABRT);
  } catch (const std::exception& error) {
    result = absl::InternalError(error.what());
  }
  WriteAll(fd, std::string(1, static_cast<char>(result.status().code())));
  WriteAll(fd, result.ok() ? std::string_view(*result)
                           : std::string_view(result.status().message().data(), result.status().message().size()));
  _exit(0);
}

std::string EndOf(int status, const IsolationLimits& limits) {
  if (WIFSIGNALED(status)) {
    const std::string signal = strsignal(WTERMSIG(status));
    const std::string memory =
        limits.memory_bytes > 0 ? absl::StrCat(", of which it may have ", limits.memory_bytes >> 20, " MiB") : "";
    if (WTERMSIG(status) == SIGABRT || WTERMSIG(status) == SIGKILL)
      return absl::StrCat("ran out of memory", memory, ", or failed (", signal, ")");
    return absl::StrCat("crashed (", signal, ")");
  }
  return absl::StrCat("ended with exit status ", WEXITSTATUS(status));
}

}  // namespace

void BusyWith::Set(std::string_view place) {
  static std::atomic<int> next_thread = 0;
  thread_local const int slot = next_thread++ % kThreads;
  const size_t size = std::min(place.size(), kPlaceBytes - 1);
  memcpy(places_[slot], place.data(), size);
  places_[slot][size] = '\0';
  changes_.fetch_add(1, std::memory_order_relaxed);
}

std::string BusyWith::Places() const {
  std::set<std::string> places;
  for (const auto& place : places_) {
    if (const std::string text(place, strnlen(place, kPlaceBytes)); !text.empty()) places.insert(text);
  }
  return places.empty() ? "its data" : absl::StrJoin(places, " or ");
}

absl::StatusOr<std::string> RunIsolated(const IsolationLimits& limits,
                                        const std::function<absl::StatusOr<std::string>(BusyWith&)>& work) {
  int pipe_ends[2];
  void* shared = mmap(nullptr, sizeof(BusyWith), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED || pipe2(pipe_ends, O_CLOEXEC) != 0) {
    return absl::UnavailableError(absl::StrCat("cannot prepare a process for reading the data: ", strerror(errno)));
  }
  auto* busy = new (shared) BusyWith();
  const pid_t child = fork();
  if (child == 0) RunChild(pipe_ends[1], limits, *busy, work);
  close(pipe_ends[1]);
  if (child < 0) {
    close(pipe_ends[0]);
    return absl::UnavailableError(absl::StrCat("cannot start a process for reading the data: ", strerror(errno)));
  }
  using Clock = std::chrono::steady_clock;
  std::string answer;
  uint64_t changes = 0;
  bool stalled = false;
  for (Clock::time_point moved = Clock::now(); !stalled;) {
    pollfd wait{pipe_ends[0], POLLIN, 0};
    if (poll(&wait, 1, /*timeout_ms=*/200) > 0) {
      char buffer[1 << 16];
      const ssize_t size = read(pipe_ends[0], buffer, sizeof(buffer));
      if (size == 0 || (size < 0 && errno != EINTR)) break;
      if (size > 0) answer.append(buffer, static_cast<size_t>(size));
    }
    if (const uint64_t now = busy->changes_; now != changes) {
      changes = now;
      moved = Clock::now();
    }
    stalled = Clock::now() - moved > std::chrono::seconds(limits.stall_seconds);
  }
  if (stalled) kill(child, SIGKILL);
  close(pipe_ends[0]);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  const std::string places = busy->Places();
  munmap(shared, sizeof(BusyWith));
  if (stalled) {
    return absl::InvalidArgumentError(
        absl::StrCat(places, ": no progress in ", limits.stall_seconds,
                     " seconds; is the row, the chat template or the tokenizer made so?"));
  }
  if (WIFSIGNALED(status) || WEXITSTATUS(status) != 0 || answer.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(places, ": the process that read it ", EndOf(status, limits),
                                                   "; is the row, the chat template or the tokenizer made so?"));
  }
  const auto code = static_cast<absl::StatusCode>(answer[0]);
  if (code != absl::StatusCode::kOk) return absl::Status(code, answer.substr(1));
  return answer.substr(1);
}

}  // namespace simpo
