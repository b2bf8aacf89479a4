#include "coordinator/rpc_errors.h"

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "common/text.h"
#include "simpo/v1/error_details.pb.h"

namespace simpo {
namespace {

constexpr char kErrorInfoType[] = "type.googleapis.com/google.rpc.ErrorInfo";
constexpr char kBadRequestType[] = "type.googleapis.com/google.rpc.BadRequest";
constexpr char kDomain[] = "simpo";
// Both travel in the trailer, which clients take up to 8 KiB of, the details in base64.
constexpr size_t kMaxMessageBytes = 2800;
constexpr size_t kMaxDetailBytes = 3000;
constexpr size_t kMaxFieldBytes = 160;
constexpr size_t kMaxDescriptionBytes = 900;
constexpr size_t kMaxFileNameBytes = 200;

// As many whole lines as fit, and that there are more. In the trailer all but plain ASCII takes three bytes.
std::string Shortened(absl::string_view message) {
  std::string text = ToUtf8(std::string_view(message.data(), message.size()));
  size_t encoded = 0, end = 0;
  for (; end < text.size() && encoded <= kMaxMessageBytes; ++end) {
    encoded += text[end] >= 0x20 && text[end] <= 0x7e && text[end] != '%' ? 1 : 3;
  }
  if (encoded <= kMaxMessageBytes) return text;
  const size_t line_end = text.rfind('\n', end);
  const std::string kept = line_end == std::string::npos ? ToUtf8(text, end - 1) : text.substr(0, line_end);
  return absl::StrCat(kept, "\n... and more; `simpoctl submit --dry-run` lists everything");
}

// Whatever was sent, it is told in single lines.
std::vector<FieldViolation> Showable(std::vector<FieldViolation> violations) {
  for (FieldViolation& violation : violations) {
    violation.field = OneLine(violation.field, kMaxFieldBytes);
    violation.description = OneLine(violation.description, kMaxDescriptionBytes);
  }
  return violations;
}

absl::Status WithViolations(const std::string& message, const std::vector<FieldViolation>& violations) {
  absl::Status status = absl::InvalidArgumentError(message);
  v1::BadRequest details;
  for (const FieldViolation& violation : violations) {
    v1::BadRequest::FieldViolation& field = *details.add_field_violations();
    field.set_field(violation.field);
    field.set_description(violation.description);
    if (details.ByteSizeLong() > kMaxDetailBytes) {
      details.mutable_field_violations()->RemoveLast();
      break;
    }
  }
  status.SetPayload(kBadRequestType, absl::Cord(details.SerializeAsString()));
  return status;
}

}  // namespace

absl::Status BadRequestError(const std::vector<FieldViolation>& violations, std::string_view file_name) {
  const std::vector<FieldViolation> shown = Showable(violations);
  return WithReason(WithViolations(FormatViolations(shown, OneLine(file_name, kMaxFileNameBytes)), shown), "BAD_JOB");
}

absl::Status BadFieldsError(const std::vector<FieldViolation>& wrong) {
  const std::vector<FieldViolation> violations = Showable(wrong);
  const std::string message = absl::StrJoin(violations, "; ", [](std::string* out, const FieldViolation& violation) {
    absl::StrAppend(out, violation.field, ": ", violation.description);
  });
  return WithReason(WithViolations(message, violations), "BAD_REQUEST");
}

absl::Status WithReason(absl::Status status, std::string_view reason) {
  v1::ErrorInfo info;
  info.set_reason(std::string(reason));
  info.set_domain(kDomain);
  status.SetPayload(kErrorInfoType, absl::Cord(info.SerializeAsString()));
  return status;
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  if (!status.GetPayload(kErrorInfoType)) {
    return ToGrpcStatus(WithReason(status, absl::StatusCodeToString(status.code())));
  }
  const std::string message = Shortened(status.message());
  v1::RpcStatus details;
  details.set_code(static_cast<int>(status.code()));
  if (message.size() < 512) details.set_message(message);
  status.ForEachPayload([&](absl::string_view type, const absl::Cord& payload) {
    google::protobuf::Any& any = *details.add_details();
    any.set_type_url(std::string(type));
    any.set_value(std::string(payload));
  });
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message, details.SerializeAsString());
}

}  // namespace simpo
