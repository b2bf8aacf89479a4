#ifndef SIMPO_COORDINATOR_TOKENS_H_
#define SIMPO_COORDINATOR_TOKENS_H_

#include <sys/stat.h>

#include <cstdint>
#include <filesystem>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace simpo {

inline constexpr char kTokensFile[] = "tokens.json";  // in the data directory
inline constexpr char kRequiredMark[] = ".required";  // behind its name: tokens are asked for, see TokenStore

// What a user may do; each may all that the one before may.
enum class Role {
  kRead = 1,    // see jobs, logs and metrics
  kSubmit = 2,  // submit jobs; end one's own
  kAdmin = 3,   // all, for every job
};
std::string_view RoleName(Role role);
std::optional<Role> ParseRole(std::string_view name);

// What is kept of a token: nothing by which it could be used.
struct Token {
  std::string id;      // names it in lists; part of its text
  std::string sha256;  // of its text
  Role role = Role::kRead;
  std::string user;
  int64_t created_s = 0;  // Unix time
  int64_t expires_s = 0;  // 0: never
};

struct NewToken {
  std::string text;  // for its user alone, once
  Token token;
};
// INVALID_ARGUMENT when the name is empty, longer than 128 bytes, or no single line. `days` 0: for ever.
absl::StatusOr<NewToken> MakeToken(Role role, const std::string& user, int days, int64_t now_s);

// --- the token file: JSON, mode 0600. It is replaced as a whole, under a lock beside it.
// NOT_FOUND: there is none. PERMISSION_DENIED: others may read or write it. DATA_LOSS: it is damaged.
absl::StatusOr<std::vector<Token>> ReadTokens(const std::filesystem::path& file);
absl::Status AddToken(const std::filesystem::path& file, const Token& token);
// NOT_FOUND when there is no such token. The file stays when the last one goes, so that the door stays shut.
absl::Status RevokeToken(const std::filesystem::path& file, const std::string& id);

// Whether two texts are equal, in a time that tells nothing of where they differ.
bool SecretsEqual(std::string_view a, std::string_view b);

// The tokens that count now: the file is read again whenever it has changed. Once there were tokens, they are asked
// for, also when the file has gone or cannot be read; the mark beside it says so to later processes. Thread-safe.
class TokenStore {
 public:
  explicit TokenStore(std::filesystem::path file) : file_(std::move(file)) {}

  // UNAVAILABLE: the file has gone. Any other error: it is there and cannot be used. Each change is logged.
  absl::Status status();
  // Whether callers need a token.
  bool Required();
  // UNAUTHENTICATED: unknown or expired; UNAVAILABLE: the file cannot be used.
  absl::StatusOr<Token> Find(std::string_view text, int64_t now_s);

 private:
  void Refresh();  // with mutex_ held, as Look
  void Look();

  const std::filesystem::path file_;
  std::mutex mutex_;
  bool required_ = false;      // guarded by mutex_
  struct stat seen_ = {};      // guarded by mutex_; of the file that was read last
  absl::Status status_;        // guarded by mutex_; of reading it
  std::vector<Token> tokens_;  // guarded by mutex_
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_TOKENS_H_
