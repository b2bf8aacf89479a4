#ifndef SIMPO_COORDINATOR_RPC_ERRORS_H_
#define SIMPO_COORDINATOR_RPC_ERRORS_H_

#include <grpcpp/support/status.h>

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "common/job_config_yaml.h"

namespace simpo {

// INVALID_ARGUMENT that lists every violation, for people in the message and for programs as
// google.rpc.BadRequest among the payloads.
absl::Status BadRequestError(const std::vector<FieldViolation>& violations, std::string_view file_name);

// The same for the fields of a request that is no job file.
absl::Status BadFieldsError(const std::vector<FieldViolation>& violations);

// `status` with a stable reason, for programs, as google.rpc.ErrorInfo among the payloads.
absl::Status WithReason(absl::Status status, std::string_view reason);

// The same error on the wire, its payloads as status details. One without a reason gets that of its
// code, such as NOT_FOUND.
grpc::Status ToGrpcStatus(const absl::Status& status);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_RPC_ERRORS_H_
