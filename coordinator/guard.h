#ifndef SIMPO_COORDINATOR_GUARD_H_
#define SIMPO_COORDINATOR_GUARD_H_

#include <grpcpp/server_context.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/audit_log.h"
#include "coordinator/rate_limit.h"
#include "coordinator/tokens.h"
#include "simpo/v1/job.pb.h"

namespace simpo {

// Who makes a call.
struct Caller {
  std::string user;          // empty: nobody has to say who they are here
  Role role = Role::kAdmin;  // what they may do
  std::string peer;          // address
};

// What a method asks of its caller. The table in guard.cc has a row for every method of both services; a method
// without one is refused to all.
struct MethodRule {
  std::string_view method;  // such as TrainingService/GetJob
  enum class Proof {
    kRole,    // a token or certificate of at least `role`
    kSecret,  // the attempt's own secret; WorkerService checks it
  } proof;
  Role role;
  bool changes;  // goes into the audit log when it succeeds too
  bool streams;  // counts against the streams that a user may have
};
const MethodRule* FindRule(std::string_view method);

// Decides for every users' call, before anything else is done, whether it may be made: the only place that does.
// Thread-safe.
class Guard {
 public:
  struct Options {
    std::filesystem::path token_file;  // without it nobody needs a token
    bool client_certificates = false;  // callers must have shown one
    double calls_per_second = 0;       // of each user with a token; 0: no limit
    int streams_per_user = 0;          // at a time, of each user with a token; 0: no limit
    AuditLog* audit = nullptr;         // of changes; outlives this; empty: none
    AuditLog* refusals = nullptr;      // of what was refused or failed: a flood of it drives no change out of `audit`
  };
  explicit Guard(Options options) : options_(std::move(options)), tokens_(options_.token_file) {}

  // What a call brings along.
  struct Credentials {
    std::string authorization;  // the metadata of that name
    bool certificate = false;   // TLS has checked one
    std::string certificate_name;
    std::string peer;
  };
  // `job` is what the request names, for the audit log. UNAUTHENTICATED, PERMISSION_DENIED and RESOURCE_EXHAUSTED say
  // what to do, and are in the audit log by then.
  absl::StatusOr<Caller> Admit(std::string_view method, const Credentials& credentials, const std::string& job);
  absl::StatusOr<Caller> Admit(std::string_view method, const grpc::CallbackServerContext& context,
                               const std::string& job);
  // PERMISSION_DENIED unless the caller may change this job.
  static absl::Status CheckMayChange(const Caller& caller, const v1::Job& job);

  // A place among the user's streams, given back when it is destroyed. RESOURCE_EXHAUSTED: they have too many.
  absl::StatusOr<std::shared_ptr<void>> OpenStream(std::string_view method, const Caller& caller,
                                                   const std::string& job);

  // Notes how a call ended that was to change something; refusals that Admit made are noted already.
  void Note(std::string_view method, const Caller& caller, const std::string& job, const absl::Status& outcome);

  // Whether the tokens can be checked, see TokenStore.
  absl::Status tokens_status() { return tokens_.status(); }
  // Whether callers have to say who they are.
  bool asks() { return options_.client_certificates || tokens_.Required(); }

 private:
  absl::StatusOr<Caller> Identify(const Credentials& credentials);
  absl::Status CheckRate(const Caller& caller);
  void CloseStream(const std::string& user);

  const Options options_;
  TokenStore tokens_;
  std::mutex mutex_;
  std::map<std::string, TokenBucket> buckets_;  // guarded by mutex_; by user
  std::map<std::string, int> streams_;          // guarded by mutex_; by user
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_GUARD_H_
