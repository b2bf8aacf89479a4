#include "simpoctl/exit_codes.h"

#include "absl/strings/str_format.h"

namespace simpo {
namespace {

struct ExitCodeRow {
  int code;
  const char* meaning;
};

constexpr ExitCodeRow kRows[] = {
    {kExitOk, "done; for wait, watch and submit --wait/--follow: the job succeeded"},
    {kExitError, "error; the message says which and what to do"},
    {kExitUsage, "bad usage, or a job file that cannot run, or a rank or attempt that a job does not have"},
    {kExitNotAllowed, "not allowed"},
    {kExitJobFailed, "the job failed"},
    {kExitNotFinished, "the job has not finished: wait --timeout ran out, or Ctrl-C detached"},
    {kExitNotFound, "there is no such job"},
    {kExitJobCancelled, "the job was cancelled"},
};

}  // namespace

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kInvalidArgument:
      return kExitUsage;
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnauthenticated:
      return kExitNotAllowed;
    case absl::StatusCode::kNotFound:
      return kExitNotFound;
    default:
      return kExitError;
  }
}

int ExitCodeOf(v1::JobState state) {
  switch (state) {
    case v1::JOB_STATE_SUCCEEDED:
      return kExitOk;
    case v1::JOB_STATE_FAILED:
      return kExitJobFailed;
    case v1::JOB_STATE_CANCELLED:
      return kExitJobCancelled;
    default:
      return kExitNotFinished;
  }
}

std::string ExitCodesHelp() {
  std::string text = "Exit codes of simpoctl:\n";
  for (const ExitCodeRow& row : kRows) absl::StrAppendFormat(&text, "  %3d  %s\n", row.code, row.meaning);
  return text;
}

}  // namespace simpo
