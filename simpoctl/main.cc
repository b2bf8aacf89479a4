// simpoctl: the command line of the SimPO training service. Data goes to standard output, everything
// else to standard error.
#include <grpc/support/log.h>

#include <cstdlib>
#include <exception>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "common/tls_files.h"
#include "simpoctl/commands.h"
#include "simpoctl/exit_codes.h"
#include "simpoctl/terminal.h"

namespace simpo {
namespace {

// How the same coordinator is reached in the commands that we advise.
std::string OwnCommand(const CommandLine& line) {
  std::string command = "simpoctl";
  for (const auto& [flag, value] :
       {std::pair("--address", line.address), std::pair("--token-file", line.token_file), std::pair("--ca", line.ca),
        std::pair("--cert", line.cert), std::pair("--key", line.key)}) {
    if (!value.empty()) absl::StrAppend(&command, " ", flag, " ", value);
  }
  if (line.insecure) command += " --insecure";
  return command;
}

absl::StatusOr<Client::Credentials> CredentialsOf(const CommandLine& line, const std::string& address) {
  Client::Credentials credentials{.tls = TlsFilesOfEnvironment()};
  if (!line.ca.empty()) credentials.tls.ca = line.ca;
  if (!line.cert.empty()) credentials.tls.cert = line.cert;
  if (!line.key.empty()) credentials.tls.key = line.key;
  SIMPO_ASSIGN_OR_RETURN(credentials.texts, ReadTlsFiles(credentials.tls));
  SIMPO_ASSIGN_OR_RETURN(credentials.token,
                         TokenFor(address, line.token_file, !credentials.tls.ca.empty(), line.insecure));
  return credentials;
}

absl::StatusOr<int> RunCommand(const CommandLine& line) {
  if (line.run_offline) return line.run_offline();
  const absl::StatusOr<std::string> address = CoordinatorAddress(line.address);
  if (!address.ok()) return address.status();
  SIMPO_ASSIGN_OR_RETURN(Client::Credentials credentials, CredentialsOf(line, *address));
  Client client(*address, OwnCommand(line), std::move(credentials));
  return line.run(client);
}

int Report(const absl::Status& status) {
  const std::string message(status.message());
  // Several lines are the places of a job file, which editors jump to as they are.
  PrintErr(absl::StrCat(message.find('\n') == std::string::npos ? "simpoctl: " : "", message, "\n"));
  return ExitCodeOf(status);
}

void Declare(CLI::App& app, CommandLine& line) {
  app.require_subcommand(0, 1);  // none is told below, in better words
  app.fallthrough();             // --address may stand after the command too
  app.add_option("--address", line.address,
                 absl::StrCat("The coordinator, HOST:PORT (default: SIMPO_ADDRESS, else ", kDefaultAddress, ")"));
  app.add_option("--token-file", line.token_file, "File with your token (default: the variable SIMPO_TOKEN)");
  app.add_option("--ca", line.ca, "Authority of the coordinator's certificate, a PEM file (default: SIMPO_CA)");
  app.add_option("--cert", line.cert, "Your certificate, where one is asked for (default: SIMPO_CERT)");
  app.add_option("--key", line.key, "Its private key (default: SIMPO_KEY)");
  app.add_flag("--insecure", line.insecure, "Let the token travel unencrypted to another machine");
  app.set_version_flag("--version", "simpoctl " SIMPO_VERSION);
  AddSubmit(app, line);
  AddList(app, line);
  AddGet(app, line);
  AddDescribe(app, line);
  AddWatch(app, line);
  AddLogs(app, line);
  AddMetrics(app, line);
  AddCancel(app, line);
  AddWait(app, line);
  AddPriority(app, line);
  AddCheckpoint(app, line);
  AddNodes(app, line);
  AddDrain(app, line);
  AddUndrain(app, line);
  AddVersion(app, line);
  AddCompletion(app, line);
  AddHelp(app, line);
  app.footer("Ctrl-C never ends a job. More: simpoctl help job-file, simpoctl help exit-codes.");
}

int Main(int argc, char** argv) {
  CLI::App app("Trains models with SimPO: submits job files to a simpo-coordinator and follows them.", "simpoctl");
  CommandLine line;
  Declare(app, line);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    PrintErr(absl::StrCat("simpoctl: ", error.what(), "\nSee: simpoctl --help, or simpoctl help COMMAND\n"));
    return kExitUsage;
  }
  if (!line.run && !line.run_offline) {
    PrintErr("simpoctl: a command is required, for example: simpoctl submit job.yaml --follow\nSee: simpoctl --help\n");
    return kExitUsage;
  }
  const absl::StatusOr<int> code = RunCommand(line);
  const absl::Status flushed = FlushOut();
  if (!code.ok()) return Report(code.status());
  if (!flushed.ok()) return Report(flushed);
  return *code;
}

}  // namespace
}  // namespace simpo

int main(int argc, char** argv) {
  // gRPC's own log would repeat what our messages say.
  if (std::getenv("GRPC_VERBOSITY") == nullptr) gpr_set_log_function([](gpr_log_func_args*) {});
  try {
    return simpo::Main(argc, argv);
  } catch (const std::exception& error) {
    simpo::PrintErr(absl::StrCat("simpoctl: ", error.what(), "\n"));
    return simpo::kExitError;
  }
}
