#include "coordinator/guard.h"

#include <grpc/grpc_security_constants.h>

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/status_macros.h"
#include "coordinator/rpc_errors.h"

namespace simpo {
namespace {

constexpr char kAuthorizationKey[] = "authorization";
constexpr char kScheme[] = "Bearer ";
constexpr size_t kMaxBuckets = 10'000;

using Proof = MethodRule::Proof;
constexpr MethodRule kRules[] = {
    // method, proof, role, changes something, is a stream
    {"TrainingService/SubmitJob", Proof::kRole, Role::kSubmit, true, false},
    {"TrainingService/GetJob", Proof::kRole, Role::kRead, false, false},
    {"TrainingService/ListJobs", Proof::kRole, Role::kRead, false, false},
    {"TrainingService/CancelJob", Proof::kRole, Role::kSubmit, true, false},      // one's own, see CheckMayChange
    {"TrainingService/SetPriority", Proof::kRole, Role::kSubmit, true, false},    // likewise
    {"TrainingService/CheckpointJob", Proof::kRole, Role::kSubmit, true, false},  // likewise
    {"TrainingService/WatchJob", Proof::kRole, Role::kRead, false, true},
    {"TrainingService/StreamLogs", Proof::kRole, Role::kRead, false, true},
    {"TrainingService/ListMetrics", Proof::kRole, Role::kRead, false, false},
    {"TrainingService/ListNodes", Proof::kRole, Role::kRead, false, false},
    {"TrainingService/DrainNode", Proof::kRole, Role::kAdmin, true, false},
    {"TrainingService/UndrainNode", Proof::kRole, Role::kAdmin, true, false},
    {"TrainingService/GetServerInfo", Proof::kRole, Role::kRead, false, false},
    {"http/metrics", Proof::kRole, Role::kRead, false, false},
    {"WorkerService/Attach", Proof::kSecret, Role::kRead, false, true},
    {"WorkerService/Register", Proof::kSecret, Role::kRead, false, false},
};

std::string ShortName(std::string_view method) {
  const size_t slash = method.rfind('/');
  return std::string(slash == std::string_view::npos ? method : method.substr(slash + 1));
}

absl::Status NoToken() {
  return WithReason(absl::UnauthenticatedError("this coordinator asks for a token: set SIMPO_TOKEN, or name its file "
                                               "with --token-file; an administrator makes one with "
                                               "`simpo-coordinator token create`"),
                    "TOKEN_MISSING");
}

}  // namespace

const MethodRule* FindRule(std::string_view method) {
  const auto* found =
      std::find_if(std::begin(kRules), std::end(kRules), [&](const MethodRule& rule) { return rule.method == method; });
  return found == std::end(kRules) ? nullptr : found;
}

absl::StatusOr<Caller> Guard::Identify(const Credentials& credentials) {
  Caller caller{.peer = credentials.peer};
  if (options_.client_certificates) {
    if (!credentials.certificate) {
      return WithReason(
          absl::UnauthenticatedError("this coordinator asks for a client certificate: name yours with --cert and --key "
                                     "(SIMPO_CERT, SIMPO_KEY)"),
          "CERTIFICATE_MISSING");
    }
    caller.user = credentials.certificate_name;
  }
  if (!tokens_.Required()) return caller;
  if (credentials.authorization.empty()) return NoToken();
  const bool bearer = absl::StartsWithIgnoreCase(credentials.authorization, kScheme);
  if (!bearer) {
    return WithReason(absl::UnauthenticatedError("the metadata 'authorization' must be 'Bearer TOKEN'"),
                      "TOKEN_MALFORMED");
  }
  std::string_view text = credentials.authorization;
  text.remove_prefix(sizeof(kScheme) - 1);
  const int64_t now_s =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  const absl::StatusOr<Token> token = tokens_.Find(text, now_s);
  if (absl::IsUnauthenticated(token.status())) {
    return WithReason(absl::UnauthenticatedError(absl::StrCat(std::string(token.status().message()),
                                                              "; ask an administrator for a new one "
                                                              "(simpo-coordinator token create)")),
                      "TOKEN_INVALID");
  }
  if (!token.ok()) return WithReason(token.status(), "TOKENS_UNREADABLE");
  caller.user = token->user;
  caller.role = token->role;
  return caller;
}

absl::Status Guard::CheckRate(const Caller& caller) {
  if (options_.calls_per_second <= 0 || caller.user.empty()) return absl::OkStatus();
  const auto now = std::chrono::steady_clock::now();
  const std::lock_guard lock(mutex_);
  if (buckets_.size() >= kMaxBuckets) buckets_.clear();
  const double rate = options_.calls_per_second;
  if (buckets_.try_emplace(caller.user, rate, std::max(1.0, 2 * rate), now).first->second.Take(now)) {
    return absl::OkStatus();
  }
  return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                        "user ", caller.user, " makes more than ", rate,
                        " calls a second; wait a moment, or have --calls-per-second raised on the coordinator")),
                    "RATE_LIMITED");
}

absl::StatusOr<Caller> Guard::Admit(std::string_view method, const Credentials& credentials, const std::string& job) {
  Caller caller{.peer = credentials.peer};
  // Also of a call that is refused for want of a token.
  if (options_.client_certificates) caller.user = credentials.certificate_name;
  const absl::Status status = [&]() -> absl::Status {
    const MethodRule* rule = FindRule(method);
    if (rule == nullptr || rule->proof != Proof::kRole) {
      return WithReason(absl::PermissionDeniedError(absl::StrCat("nobody may call ", ShortName(method))), "NO_RULE");
    }
    SIMPO_ASSIGN_OR_RETURN(caller, Identify(credentials));
    SIMPO_RETURN_IF_ERROR(CheckRate(caller));
    if (caller.role >= rule->role) return absl::OkStatus();
    return WithReason(absl::PermissionDeniedError(absl::StrCat(
                          "the token of ", caller.user, " has the role ", std::string(RoleName(caller.role)), "; ",
                          ShortName(method), " needs ", std::string(RoleName(rule->role)),
                          ". An administrator makes such a token with `simpo-coordinator "
                          "token create --role ",
                          std::string(RoleName(rule->role)), "`")),
                      "ROLE_TOO_LOW");
  }();
  if (status.ok()) return caller;
  Note(method, caller, job, status);
  return status;
}

absl::StatusOr<Caller> Guard::Admit(std::string_view method, const grpc::CallbackServerContext& context,
                                    const std::string& job) {
  Credentials credentials{.peer = context.peer()};
  const auto found = context.client_metadata().find(kAuthorizationKey);
  if (found != context.client_metadata().end()) {
    credentials.authorization = std::string(found->second.data(), found->second.size());
  }
  if (options_.client_certificates) {
    const std::shared_ptr<const grpc::AuthContext> auth = context.auth_context();
    credentials.certificate = auth != nullptr && auth->IsPeerAuthenticated();
    if (credentials.certificate) {
      const std::vector<grpc::string_ref> names = auth->FindPropertyValues(GRPC_X509_CN_PROPERTY_NAME);
      if (!names.empty()) credentials.certificate_name = std::string(names[0].data(), names[0].size());
    }
  }
  return Admit(method, credentials, job);
}

absl::Status Guard::CheckMayChange(const Caller& caller, const v1::Job& job) {
  if (caller.role == Role::kAdmin || caller.user == job.user()) return absl::OkStatus();
  return WithReason(absl::PermissionDeniedError(absl::StrCat("job ", job.id(), " is ", job.user(), "'s; ", caller.user,
                                                             " may change only jobs of their own. Ask ", job.user(),
                                                             " or an administrator")),
                    "NOT_YOUR_JOB");
}

absl::StatusOr<std::shared_ptr<void>> Guard::OpenStream(std::string_view method, const Caller& caller,
                                                        const std::string& job) {
  if (options_.streams_per_user <= 0 || caller.user.empty()) return std::shared_ptr<void>();
  {
    const std::lock_guard lock(mutex_);
    int& open = streams_[caller.user];
    if (open < options_.streams_per_user) {
      ++open;
      return std::shared_ptr<void>(this, [this, user = caller.user](void*) { CloseStream(user); });
    }
  }
  const absl::Status status = WithReason(
      absl::ResourceExhaustedError(absl::StrCat("user ", caller.user, " has ", options_.streams_per_user,
                                                " streams (watch, logs --follow) open already; end some first")),
      "TOO_MANY_STREAMS");
  Note(method, caller, job, status);
  return status;
}

void Guard::CloseStream(const std::string& user) {
  const std::lock_guard lock(mutex_);
  if (--streams_[user] == 0) streams_.erase(user);
}

void Guard::Note(std::string_view method, const Caller& caller, const std::string& job, const absl::Status& outcome) {
  AuditLog* const log = outcome.ok() ? options_.audit : options_.refusals;
  if (log == nullptr) return;
  const bool known = !caller.user.empty() && !absl::IsUnauthenticated(outcome);
  log->Write({.user = caller.user,
              .role = known ? std::string(RoleName(caller.role)) : "",
              .peer = caller.peer,
              .method = ShortName(method),
              .job = job,
              .outcome = absl::StatusCodeToString(outcome.code()),
              .reason = std::string(outcome.message())});
}

}  // namespace simpo
