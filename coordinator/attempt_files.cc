#include "coordinator/attempt_files.h"

#include <stdlib.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
#include "common/file_system.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

constexpr int64_t kMaxBytes = 1 << 16;

void to_json(nlohmann::json& json, const AttemptSpec& spec) {
  json = {{"job_id", spec.job_id},
          {"attempt", spec.attempt},
          {"ranks", spec.ranks},
          {"threads_per_rank", spec.threads_per_rank},
          {"resume_latest", spec.resume_latest},
          {"worker", spec.worker},
          {"mpirun", spec.mpirun},
          {"log_dir", spec.log_dir},
          {"output_dir", spec.output_dir},
          {"coordinator", spec.coordinator},
          {"log_limit_bytes", spec.log_limit_bytes}};
}

// Reads a file that this program wrote; anything else in it is an error, not an exception.
template <typename T, typename Decode>
absl::StatusOr<T> ReadJson(const std::filesystem::path& path, Decode decode) {
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxBytes));
  try {
    return decode(nlohmann::json::parse(text));
  } catch (const nlohmann::json::exception& error) {
    return absl::DataLossError(absl::StrCat(path.string(), " is damaged: ", error.what()));
  }
}

}  // namespace

absl::Status WriteAttemptSpec(const AttemptFiles& files, const AttemptSpec& spec) {
  nlohmann::json json;
  to_json(json, spec);
  try {
    return WriteFileAtomically(files.Spec(), json.dump(2) + "\n");
  } catch (const nlohmann::json::exception& error) {  // a path that is not UTF-8
    return absl::InvalidArgumentError(absl::StrCat("cannot write ", files.Spec().string(), ": ", error.what()));
  }
}

absl::StatusOr<AttemptSpec> ReadAttemptSpec(const AttemptFiles& files) {
  return ReadJson<AttemptSpec>(files.Spec(), [](const nlohmann::json& json) {
    return AttemptSpec{.job_id = json.at("job_id"),
                       .attempt = json.at("attempt"),
                       .ranks = json.at("ranks"),
                       .threads_per_rank = json.at("threads_per_rank"),
                       .resume_latest = json.at("resume_latest"),
                       .worker = json.at("worker"),
                       .mpirun = json.at("mpirun"),
                       .log_dir = json.at("log_dir"),
                       .output_dir = json.at("output_dir"),
                       .coordinator = json.at("coordinator"),
                       .log_limit_bytes = json.value("log_limit_bytes", int64_t{0})};
  });
}

absl::Status WriteSupervisor(const AttemptFiles& files, const ProcessIdentity& identity) {
  const nlohmann::json json = {
      {"pid", identity.pid}, {"start_time", identity.start_time}, {"boot_id", identity.boot_id}};
  return WriteFileAtomically(files.Supervisor(), json.dump() + "\n");
}

absl::StatusOr<ProcessIdentity> ReadSupervisor(const AttemptFiles& files) {
  return ReadJson<ProcessIdentity>(files.Supervisor(), [](const nlohmann::json& json) {
    return ProcessIdentity{.pid = json.at("pid"), .start_time = json.at("start_time"), .boot_id = json.at("boot_id")};
  });
}

absl::Status WriteExit(const AttemptFiles& files, const AttemptExit& exit) {
  const nlohmann::json json = {{"exit_code", exit.exit_code}, {"phase", exit.phase}, {"time_ms", exit.time_ms}};
  return WriteFileAtomically(files.Exit(), json.dump() + "\n");
}

absl::StatusOr<AttemptExit> ReadExit(const AttemptFiles& files) {
  return ReadJson<AttemptExit>(files.Exit(), [](const nlohmann::json& json) {
    return AttemptExit{.exit_code = json.at("exit_code"), .phase = json.at("phase"), .time_ms = json.at("time_ms")};
  });
}

absl::StatusOr<std::filesystem::path> MakeScratch(const AttemptFiles& files, const AttemptSpec& spec) {
  absl::Status status;
  for (const char* base : {"/dev/shm", "/tmp"}) {
    std::string dir = absl::StrCat(base, "/simpo-", spec.job_id, "-", spec.attempt, "-XXXXXX");
    if (mkdtemp(dir.data()) != nullptr) {
      status = WriteFileAtomically(files.Scratch(), dir);
      if (status.ok()) return dir;
      rmdir(dir.c_str());  // nobody would find it any more
      return status;
    }
    status = ErrnoStatus("make a scratch folder in", base);
  }
  return status;
}

void RemoveScratch(const AttemptFiles& files) {
  const absl::StatusOr<std::string> dir = ReadFile(files.Scratch(), kMaxBytes);
  if (!dir.ok() || dir->empty()) return;
  std::error_code error;
  std::filesystem::remove_all(*dir, error);
}

}  // namespace simpo
