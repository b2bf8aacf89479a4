#ifndef SIMPO_COORDINATOR_AUDIT_LOG_H_
#define SIMPO_COORDINATOR_AUDIT_LOG_H_

#include <cstdint>
#include <filesystem>
#include <mutex>
#include <string>

namespace simpo {

// Who did what: one JSON object a line, in a file that only its owner may read. A full audit.jsonl is renamed to
// audit.1.jsonl, that one to audit.2.jsonl and so on; the oldest goes. Thread-safe.
class AuditLog {
 public:
  struct Entry {
    std::string user;     // empty: not known
    std::string role;     // empty: none
    std::string peer;     // address
    std::string method;   // such as CancelJob
    std::string job;      // id, or what the caller named; empty: none
    std::string outcome;  // OK, or the code of the refusal
    std::string reason;   // of a refusal
  };
  explicit AuditLog(std::filesystem::path file, int64_t max_bytes = 16 << 20, int kept = 4);
  ~AuditLog();
  AuditLog(const AuditLog&) = delete;
  AuditLog& operator=(const AuditLog&) = delete;

  // Never fails a call: what cannot be written is said in the coordinator's log.
  void Write(const Entry& entry);

 private:
  void Open();    // with mutex_ held
  void Rotate();  // with mutex_ held

  const std::filesystem::path file_;
  const int64_t max_bytes_;
  const int kept_;
  std::mutex mutex_;
  int fd_ = -1;              // guarded by mutex_
  int64_t bytes_ = 0;        // guarded by mutex_
  bool complained_ = false;  // guarded by mutex_
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_AUDIT_LOG_H_
