#ifndef SIMPO_COORDINATOR_TOKEN_COMMAND_H_
#define SIMPO_COORDINATOR_TOKEN_COMMAND_H_

#include <filesystem>
#include <functional>

#include "absl/status/status.h"

namespace CLI {
class App;
}

namespace simpo {

// `simpo-coordinator token create|list|revoke`: changes the token file, which a coordinator that runs reads again by
// itself. `run` becomes what the command line asks for, and stays empty when it asks for none of these.
void AddTokenCommands(CLI::App& app, std::function<absl::Status(const std::filesystem::path& token_file)>* run);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_TOKEN_COMMAND_H_
