#include "coordinator/token_command.h"

#include <time.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/status_macros.h"
#include "coordinator/tokens.h"

namespace simpo {
namespace {

constexpr int kDefaultDays = 90;

struct TokenOptions {
  std::string role, user, id;
  int days = kDefaultDays;
};

std::string Day(int64_t unix_s) {
  const time_t time = unix_s;
  tm utc = {};
  gmtime_r(&time, &utc);
  char text[32];
  strftime(text, sizeof(text), "%Y-%m-%d %H:%M", &utc);
  return text;
}

absl::Status Create(const std::filesystem::path& file, const TokenOptions& options) {
  const int64_t now_s = time(nullptr);
  SIMPO_ASSIGN_OR_RETURN(const NewToken made, MakeToken(*ParseRole(options.role), options.user, options.days, now_s));
  const bool is_first = absl::IsNotFound(ReadTokens(file).status());
  SIMPO_RETURN_IF_ERROR(AddToken(file, made.token));
  std::printf("%s\n", made.text.c_str());
  std::fflush(stdout);
  const std::string until = made.token.expires_s == 0 ? "without end" : "until " + Day(made.token.expires_s) + " UTC";
  std::fprintf(stderr,
               "This is shown once: %s's token (id %s, role %s, %s). It goes into SIMPO_TOKEN, or into a file that "
               "simpoctl --token-file names.\n",
               made.token.user.c_str(), made.token.id.c_str(), options.role.c_str(), until.c_str());
  if (is_first) {
    std::fprintf(
        stderr,
        "It is the first one: from now on every call needs a token, and jobs may use paths below allowed_roots "
        "and DATA_DIR/outputs only. Jobs that wait for their next attempt with other paths will fail then: set "
        "allowed_roots and restart the coordinator first.\n");
  }
  return absl::OkStatus();
}

absl::Status List(const std::filesystem::path& file) {
  const absl::StatusOr<std::vector<Token>> tokens = ReadTokens(file);
  if (!tokens.ok() && !absl::IsNotFound(tokens.status())) return tokens.status();
  std::error_code error;
  if (!tokens.ok() && std::filesystem::exists(file.string() + kRequiredMark, error)) {
    return absl::NotFoundError(absl::StrCat("the token file ", file.string(),
                                            " has gone, and every call is refused; restore it from a backup, or make a "
                                            "token: simpo-coordinator token create"));
  }
  if (!tokens.ok()) {
    std::fprintf(stderr, "There are no tokens: nobody is asked for one.\n");
    return absl::OkStatus();
  }
  if (tokens->empty()) std::fprintf(stderr, "All tokens are revoked: nobody gets in.\n");
  const int64_t now_s = time(nullptr);
  std::string table = absl::StrFormat("%-10s %-8s %-24s %-18s %s\n", "ID", "ROLE", "USER", "CREATED", "EXPIRES");
  for (const Token& token : *tokens) {
    const bool over = token.expires_s != 0 && token.expires_s <= now_s;
    absl::StrAppend(&table, absl::StrFormat("%-10s %-8s %-24s %-18s %s%s\n", token.id, RoleName(token.role), token.user,
                                            Day(token.created_s), token.expires_s == 0 ? "never" : Day(token.expires_s),
                                            over ? " (expired)" : ""));
  }
  std::printf("%s", table.c_str());
  return absl::OkStatus();
}

absl::Status Revoke(const std::filesystem::path& file, const std::string& id) {
  std::string user;
  for (const Token& token : ReadTokens(file).value_or(std::vector<Token>())) {
    if (token.id == id) user = token.user;
  }
  SIMPO_RETURN_IF_ERROR(RevokeToken(file, id));
  std::printf("token %s of %s is revoked\n", id.c_str(), user.c_str());
  return absl::OkStatus();
}

}  // namespace

void AddTokenCommands(CLI::App& app, std::function<absl::Status(const std::filesystem::path&)>* run) {
  auto options = std::make_shared<TokenOptions>();
  CLI::App* token = app.add_subcommand("token", "Make, list and revoke users' tokens; once there is one, all need one");
  token->require_subcommand(1)->fallthrough();
  CLI::App* create = token->add_subcommand("create", "Print a new token, once; only its hash is kept");
  create->add_option("--role", options->role, "read, submit (also jobs of one's own) or admin (all)")
      ->required()
      ->check(CLI::IsMember({"read", "submit", "admin"}));
  create->add_option("--user", options->user, "Whose it is; their jobs carry this name")->required();
  create->add_option("--days", options->days, "Days until it expires; 0: never")->capture_default_str();
  create->fallthrough()->callback(
      [run, options] { *run = [options](const std::filesystem::path& file) { return Create(file, *options); }; });
  CLI::App* list = token->add_subcommand("list", "List the tokens by their ids");
  list->fallthrough()->callback([run] { *run = &List; });
  CLI::App* revoke = token->add_subcommand("revoke", "Make a token useless, at once");
  revoke->add_option("id", options->id, "The token's id, from `token list`")->required();
  revoke->fallthrough()->callback(
      [run, options] { *run = [options](const std::filesystem::path& file) { return Revoke(file, options->id); }; });
}

}  // namespace simpo
