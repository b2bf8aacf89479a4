#ifndef SIMPO_COORDINATOR_SUBMISSION_H_
#define SIMPO_COORDINATOR_SUBMISSION_H_

#include <string>
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
  std::vector<FieldViolation> violations;  // every reason to refuse it; empty: it may run
};

// Parses and checks a request: the fields of the request itself, the job file, that the job fits in
// `slots_total`, and that its local inputs lie below `roots` and can be read on this host. Looks at the
// file system, stores nothing. Thread-safe.
Submission CheckSubmission(const v1::SubmitJobRequest& request, int slots_total,
                           const AllowedRoots& roots = AllowedRoots());

// Identifies what is asked for, without request_id and validate_only.
std::string RequestDigest(const v1::SubmitJobRequest& request);

// Why a job may not write to this absolute folder, or nothing: it holds something that is neither to
// be gone on with nor to be overwritten.
std::vector<FieldViolation> CheckOutputDir(const JobConfig& config, const std::string& output_dir);

// A job's name as a part of a file name.
std::string FileNameOf(const std::string& job_name);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_SUBMISSION_H_
