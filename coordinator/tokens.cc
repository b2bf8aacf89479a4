#include "coordinator/tokens.h"

#include <openssl/crypto.h>
#include <sys/random.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
#include "common/log.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "coordinator/file_lock.h"

namespace simpo {
namespace {

constexpr int64_t kMaxFileBytes = 16 << 20;
constexpr size_t kMaxUserBytes = 128;
constexpr int kMaxDays = 36500;
constexpr int64_t kSecondsPerDay = 86400;
constexpr std::chrono::milliseconds kLockPatience{5000};

struct RoleRow {
  Role role;
  std::string_view name;
};
constexpr RoleRow kRoles[] = {{Role::kRead, "read"}, {Role::kSubmit, "submit"}, {Role::kAdmin, "admin"}};

absl::StatusOr<std::string> RandomHex(size_t bytes) {
  std::string raw(bytes, '\0');
  if (getrandom(raw.data(), raw.size(), 0) != static_cast<ssize_t>(raw.size())) {
    return absl::UnavailableError("the kernel gives no random bytes");
  }
  return absl::BytesToHexString(raw);
}

// Two programs that change the file at the same time would lose one change.
absl::StatusOr<FileLock> LockTokens(const std::filesystem::path& file) {
  const std::filesystem::path lock_file = file.string() + ".lock";
  const auto end = std::chrono::steady_clock::now() + kLockPatience;
  while (true) {
    absl::StatusOr<FileLock> lock = FileLock::Acquire(lock_file);
    if (!absl::IsAlreadyExists(lock.status())) return lock;
    if (std::chrono::steady_clock::now() > end) {
      return absl::UnavailableError(absl::StrCat("another program is changing ", file.string(), "; try again"));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

absl::Status WriteTokens(const std::filesystem::path& file, const std::vector<Token>& tokens) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const Token& token : tokens) {
    list.push_back({{"id", token.id},
                    {"sha256", token.sha256},
                    {"role", std::string(RoleName(token.role))},
                    {"user", token.user},
                    {"created_s", token.created_s},
                    {"expires_s", token.expires_s}});
  }
  return WriteFileAtomically(file, list.dump(2) + "\n", 0600);
}

// Those of a file that may not be there yet.
absl::StatusOr<std::vector<Token>> ReadTokensOrNone(const std::filesystem::path& file) {
  absl::StatusOr<std::vector<Token>> tokens = ReadTokens(file);
  if (absl::IsNotFound(tokens.status())) return std::vector<Token>();
  return tokens;
}

bool SameFile(const struct stat& a, const struct stat& b) {
  return a.st_dev == b.st_dev && a.st_ino == b.st_ino && a.st_size == b.st_size && a.st_mode == b.st_mode &&
         a.st_mtim.tv_sec == b.st_mtim.tv_sec && a.st_mtim.tv_nsec == b.st_mtim.tv_nsec;
}

}  // namespace

std::string_view RoleName(Role role) {
  for (const RoleRow& row : kRoles) {
    if (row.role == role) return row.name;
  }
  return "none";
}

std::optional<Role> ParseRole(std::string_view name) {
  for (const RoleRow& row : kRoles) {
    if (row.name == name) return row.role;
  }
  return std::nullopt;
}

absl::StatusOr<NewToken> MakeToken(Role role, const std::string& user, int days, int64_t now_s) {
  const bool one_line = std::none_of(user.begin(), user.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
  if (user.empty() || user.size() > kMaxUserBytes || !one_line) {
    return absl::InvalidArgumentError(
        absl::StrCat("--user must be the user's name: one line of 1 to ", kMaxUserBytes, " bytes"));
  }
  if (days < 0 || days > kMaxDays) {
    return absl::InvalidArgumentError(absl::StrCat("--days must be 1 to ", kMaxDays, ", or 0 for a token without end"));
  }
  SIMPO_ASSIGN_OR_RETURN(const std::string id, RandomHex(4));
  SIMPO_ASSIGN_OR_RETURN(const std::string secret, RandomHex(32));
  NewToken result;
  result.text = absl::StrCat("simpo_", id, "_", secret);
  result.token = {.id = id,
                  .sha256 = Sha256(result.text),
                  .role = role,
                  .user = user,
                  .created_s = now_s,
                  .expires_s = days == 0 ? 0 : now_s + days * kSecondsPerDay};
  return result;
}

absl::StatusOr<std::vector<Token>> ReadTokens(const std::filesystem::path& file) {
  struct stat info = {};
  if (stat(file.c_str(), &info) == 0 && (info.st_mode & 077) != 0) {
    return absl::PermissionDeniedError(
        absl::StrCat("others may read or write ", file.string(), "; run: chmod 600 ", file.string()));
  }
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(file, kMaxFileBytes));
  try {
    std::vector<Token> tokens;
    for (const nlohmann::json& item : nlohmann::json::parse(text)) {
      const std::optional<Role> role = ParseRole(item.at("role").get<std::string>());
      if (!role) return absl::DataLossError(absl::StrCat(file.string(), " is damaged: a role is unknown"));
      tokens.push_back({.id = item.at("id"),
                        .sha256 = item.at("sha256"),
                        .role = *role,
                        .user = item.at("user"),
                        .created_s = item.at("created_s"),
                        .expires_s = item.at("expires_s")});
    }
    return tokens;
  } catch (const nlohmann::json::exception& error) {
    return absl::DataLossError(absl::StrCat(file.string(), " is damaged: ", error.what()));
  }
}

absl::Status AddToken(const std::filesystem::path& file, const Token& token) {
  SIMPO_ASSIGN_OR_RETURN(const FileLock lock, LockTokens(file));
  SIMPO_ASSIGN_OR_RETURN(std::vector<Token> tokens, ReadTokensOrNone(file));
  tokens.push_back(token);
  return WriteTokens(file, tokens);
}

absl::Status RevokeToken(const std::filesystem::path& file, const std::string& id) {
  SIMPO_ASSIGN_OR_RETURN(const FileLock lock, LockTokens(file));
  SIMPO_ASSIGN_OR_RETURN(std::vector<Token> tokens, ReadTokensOrNone(file));
  if (std::erase_if(tokens, [&](const Token& token) { return token.id == id; }) == 0) {
    return absl::NotFoundError(absl::StrCat("there is no token '", id, "'; see: simpo-coordinator token list"));
  }
  return WriteTokens(file, tokens);
}

bool SecretsEqual(std::string_view a, std::string_view b) {
  return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

void TokenStore::Refresh() {
  const absl::Status earlier = status_;
  Look();
  if (status_ == earlier) return;
  if (status_.ok()) {
    LOG_INFO(absl::StrCat("the token file ", file_.string(), " can be used again"));
  } else {
    LOG_WARNING(absl::StrCat("nobody gets in: ", std::string(status_.message())));
  }
}

void TokenStore::Look() {
  const std::filesystem::path mark = file_.string() + kRequiredMark;
  struct stat now = {};
  if (stat(file_.c_str(), &now) != 0) {
    const bool is_gone = errno == ENOENT;
    struct stat of_mark = {};
    required_ = required_ || !is_gone || stat(mark.c_str(), &of_mark) == 0 || errno != ENOENT;
    seen_ = {};
    tokens_.clear();
    status_ = !required_ ? absl::OkStatus()
                         : absl::UnavailableError(absl::StrCat(
                               "the token file ", file_.string(), is_gone ? " has gone" : " cannot be looked at",
                               "; restore it from a backup, or make a token: simpo-coordinator token create"));
    return;
  }
  // The next coordinator asks for tokens too, should the file be lost.
  if (!std::exchange(required_, true)) std::ofstream(mark).close();
  if (SameFile(now, seen_)) return;
  absl::StatusOr<std::vector<Token>> tokens = ReadTokens(file_);
  // Only contents can be relied on until the file changes. What else stands in the way, such as too many open files,
  // may pass without that, and is tried again at the next call.
  const bool was_read = tokens.ok() || absl::IsDataLoss(tokens.status()) || absl::IsOutOfRange(tokens.status());
  seen_ = {};
  if (was_read) seen_ = now;
  status_ = tokens.status();
  tokens_.clear();
  if (tokens.ok()) tokens_ = *std::move(tokens);
}

absl::Status TokenStore::status() {
  const std::lock_guard lock(mutex_);
  Refresh();
  return status_;
}

bool TokenStore::Required() {
  const std::lock_guard lock(mutex_);
  Refresh();
  return required_;
}

absl::StatusOr<Token> TokenStore::Find(std::string_view text, int64_t now_s) {
  const std::string digest = Sha256(text);
  const std::lock_guard lock(mutex_);
  Refresh();
  if (!status_.ok()) {
    return absl::UnavailableError(
        absl::StrCat("the coordinator cannot check tokens: ", std::string(status_.message())));
  }
  const Token* found = nullptr;
  for (const Token& token : tokens_) {
    if (SecretsEqual(token.sha256, digest)) found = &token;  // always to the end
  }
  if (found == nullptr) return absl::UnauthenticatedError("the token is not known here; it may have been revoked");
  if (found->expires_s != 0 && now_s >= found->expires_s) {
    return absl::UnauthenticatedError(absl::StrCat("the token ", found->id, " of ", found->user, " has expired"));
  }
  return *found;
}

}  // namespace simpo
