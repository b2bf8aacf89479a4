#ifndef SIMPO_SIMPOCTL_COMMANDS_H_
#define SIMPO_SIMPOCTL_COMMANDS_H_

#include <CLI/CLI.hpp>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "simpoctl/client.h"

namespace simpo {

// What the command line asked for. Each Add...() declares a command with its options, and puts what is
// to be done into `run` when the command is the one that was given. `run` returns the exit code.
struct CommandLine {
  std::string address;                    // --address; empty: not given
  std::string token_file, ca, cert, key;  // likewise
  bool insecure = false;
  std::function<absl::StatusOr<int>(Client&)> run;   // needs a coordinator
  std::function<absl::StatusOr<int>()> run_offline;  // needs none
};

void AddSubmit(CLI::App& app, CommandLine& line);  // submit.cc
void AddList(CLI::App& app, CommandLine& line);    // jobs.cc
void AddGet(CLI::App& app, CommandLine& line);
void AddDescribe(CLI::App& app, CommandLine& line);
void AddCancel(CLI::App& app, CommandLine& line);
void AddPriority(CLI::App& app, CommandLine& line);
void AddCheckpoint(CLI::App& app, CommandLine& line);
void AddNodes(CLI::App& app, CommandLine& line);
void AddDrain(CLI::App& app, CommandLine& line);
void AddUndrain(CLI::App& app, CommandLine& line);
void AddWatch(CLI::App& app, CommandLine& line);  // streams.cc
void AddWait(CLI::App& app, CommandLine& line);
void AddLogs(CLI::App& app, CommandLine& line);
void AddMetrics(CLI::App& app, CommandLine& line);
void AddVersion(CLI::App& app, CommandLine& line);  // about.cc
void AddCompletion(CLI::App& app, CommandLine& line);
void AddHelp(CLI::App& app, CommandLine& line);

// The completion script of a shell ("bash" or "zsh") for the commands and options of `app`.
std::string CompletionScript(const CLI::App& app, const std::string& shell);

}  // namespace simpo

#endif  // SIMPO_SIMPOCTL_COMMANDS_H_
