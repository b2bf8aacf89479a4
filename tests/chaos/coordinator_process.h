// A simpo-coordinator as a process of its own, and what /proc says of the processes that it has started.
#ifndef SIMPO_TESTS_CHAOS_COORDINATOR_PROCESS_H_
#define SIMPO_TESTS_CHAOS_COORDINATOR_PROCESS_H_

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "coordinator/attempt_files.h"

namespace simpo {

// The folder of the built programs.
inline std::filesystem::path ProgramsDir() { return std::filesystem::read_symlink("/proc/self/exe").parent_path(); }

// Started at once; killed at the end if it is still there. Thread-safe but for the constructor.
class CoordinatorProcess {
 public:
  // Its log is appended to `log`. Start it from a thread that lives on: it is killed when that thread ends.
  CoordinatorProcess(const std::vector<std::string>& flags, const std::filesystem::path& log) {
    std::vector<std::string> command = {(ProgramsDir() / "simpo-coordinator").string()};
    command.insert(command.end(), flags.begin(), flags.end());
    std::vector<char*> argv;
    for (std::string& word : command) argv.push_back(word.data());
    argv.push_back(nullptr);
    const int log_file = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    int ends[2] = {-1, -1};
    if (log_file < 0 || pipe2(ends, O_CLOEXEC) != 0) std::abort();
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      rlimit files = {};  // as most shells give it, whatever this program has
      getrlimit(RLIMIT_NOFILE, &files);
      files.rlim_cur = std::min<rlim_t>(1'024, files.rlim_max);
      setrlimit(RLIMIT_NOFILE, &files);
      dup2(ends[1], STDOUT_FILENO);
      dup2(log_file, STDERR_FILENO);
      execv(argv[0], argv.data());
      _exit(127);
    }
    close(ends[1]);
    close(log_file);
    reader_ = std::thread([this, from = ends[0]] { ReadAddress(from); });
  }
  ~CoordinatorProcess() {
    Kill();
    reader_.join();
  }

  pid_t pid() const { return pid_; }
  // Waits for the line that tells the address; empty when it has ended before.
  std::string WaitUntilReady() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ended_ || !address_.empty(); });
    return address_;
  }
  void Kill() { End(SIGKILL); }
  // In order. Returns what waitpid says.
  int Stop() { return End(SIGTERM); }
  // Whether it has ended by itself.
  bool HasEnded() {
    const std::lock_guard lock(mutex_);
    return reaped_ || waitpid(pid_, &status_, WNOHANG) == pid_ ? (reaped_ = true) : false;
  }

 private:
  int End(int signal) {
    const std::lock_guard lock(mutex_);
    if (std::exchange(reaped_, true)) return status_;
    kill(pid_, signal);
    waitpid(pid_, &status_, 0);
    return status_;
  }
  void ReadAddress(int from) {
    std::string text;
    char buffer[4096];
    for (ssize_t count; (count = read(from, buffer, sizeof(buffer))) > 0;) {
      text.append(buffer, static_cast<size_t>(count));
      const size_t begin = text.find("ready: grpc ");
      const size_t end = text.find(',', begin);
      if (begin == std::string::npos || end == std::string::npos) continue;
      const std::lock_guard lock(mutex_);
      address_ = text.substr(begin + 12, end - begin - 12);
      changed_.notify_all();
    }
    close(from);
    const std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  }

  pid_t pid_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string address_;  // guarded by mutex_
  bool ended_ = false;   // guarded by mutex_
  bool reaped_ = false;  // guarded by mutex_
  int status_ = 0;       // guarded by mutex_
  std::thread reader_;
};

// A process of an attempt below a data folder.
struct AttemptProcess {
  pid_t pid = 0;
  bool supervisor = false;
};

// Every one that runs: supervisors by their command line, all others by their environment.
inline std::vector<AttemptProcess> AttemptProcesses(const std::filesystem::path& data_dir) {
  const auto read = [](const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string text;
    for (std::string part; std::getline(file, part, '\0'); text += '\0') text += part;
    return text;
  };
  const std::string attempts = (data_dir / "attempts").string() + "/";
  std::vector<AttemptProcess> found;
  std::error_code error;
  for (std::filesystem::directory_iterator entry("/proc", error), end; !error && entry != end; entry.increment(error)) {
    pid_t pid = 0;
    if (!absl::SimpleAtoi(entry->path().filename().string(), &pid)) continue;
    const std::string proc = absl::StrCat("/proc/", pid, "/");
    const std::string stat = read(proc + "stat");
    const size_t name_end = stat.rfind(')');
    if (name_end == std::string::npos || name_end + 2 >= stat.size() || stat[name_end + 2] == 'Z') continue;
    const std::string command = read(proc + "cmdline");
    const bool supervisor = command.find(std::string("supervise\0--attempt-dir\0", 24) + attempts) != std::string::npos;
    const bool gang = !supervisor && read(proc + "environ").find(absl::StrCat(kSecretFileVariable, "=", attempts)) !=
                                         std::string::npos;
    if (supervisor || gang) found.push_back({pid, supervisor});
  }
  return found;
}

// Folders in shared memory that attempts of these jobs have left behind.
inline std::vector<std::string> ScratchFolders(const std::filesystem::path& data_dir) {
  std::vector<std::string> found;
  std::error_code error;
  for (const char* base : {"/dev/shm", "/tmp"}) {
    for (std::filesystem::directory_iterator entry(base, error), end; !error && entry != end; entry.increment(error)) {
      const std::string name = entry->path().filename().string();  // simpo-JOB-ATTEMPT
      const size_t dash = name.rfind('-');
      if (name.starts_with("simpo-") && dash > 6 &&
          std::filesystem::exists(data_dir / "attempts" / name.substr(6, dash - 6), error)) {
        found.push_back(entry->path().string());
      }
      error.clear();
    }
  }
  return found;
}

// A figure of /proc/PID/status in its own unit, such as VmRSS in KiB; -1: no such process.
inline int64_t ProcessFigure(pid_t pid, const std::string& name) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/status"));
  for (std::string word; file >> word;) {
    int64_t value = 0;
    if (word == name + ":" && file >> value) return value;
  }
  return -1;
}

inline int64_t OpenFiles(pid_t pid) {
  std::error_code error;
  int64_t count = 0;
  for (std::filesystem::directory_iterator entry(absl::StrCat("/proc/", pid, "/fd"), error), end;
       !error && entry != end; entry.increment(error)) {
    ++count;
  }
  return count;
}

}  // namespace simpo

#endif  // SIMPO_TESTS_CHAOS_COORDINATOR_PROCESS_H_
