#ifndef SIMPO_COORDINATOR_SUBMISSION_H_
#define SIMPO_COORDINATOR_SUBMISSION_H_

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "common/job_config.h"
#include "common/job_config_yaml.h"
#include "coordinator/allowed_roots.h"
#include "simpo/v1/training_service.pb.h"

namespace simpo {

// A checked request to run a job.
struct Submission {
  v1::Job job;  // name, user, priority, labels, ranks, slots, max_restarts; neither id nor output_dir
  JobConfig config;
  std::string request_digest;              // equal for equal requests
  std::vector<std::string> notes;          // what the user should know
  std::map<std::string, int> lines;        // as of ParsedJob
  std::vector<FieldViolation> violations;  // every reason to refuse it; empty: it may run
};

// Parses and checks a request: the fields of the request itself, the job file, that the job fits in
// `slots_total`, that its local inputs lie below `roots` and can be read on this host, and that its output folder lies
// there and can be made; the config then names it without links and dots. Looks at the file system, stores nothing.
// Thread-safe.
Submission CheckSubmission(const v1::SubmitJobRequest& request, int slots_total,
                           const AllowedRoots& roots = AllowedRoots());

// Identifies what is asked for, without request_id and validate_only.
std::string RequestDigest(const v1::SubmitJobRequest& request);

// Why this absolute folder can neither be written to nor be made, or "" when it can or that cannot be told now.
std::string ProblemOfFolder(const std::string& folder);

// Makes a folder. Why it can never be made, or "": it is there, or it may be better the next time.
std::string MakeFolder(const std::string& folder);

// Why a job may not write to this absolute folder, or nothing: it cannot, or the folder holds something that is neither
// to be gone on with nor to be overwritten.
std::vector<FieldViolation> CheckOutputDir(const JobConfig& config, const std::string& output_dir);

// Whether one folder is, or lies in, the other. Both as in a checked submission: without links and dots.
bool FoldersOverlap(std::string_view a, std::string_view b);

// A job's name as a part of a file name.
std::string FileNameOf(const std::string& job_name);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_SUBMISSION_H_
