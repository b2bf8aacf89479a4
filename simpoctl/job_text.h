#ifndef SIMPO_SIMPOCTL_JOB_TEXT_H_
#define SIMPO_SIMPOCTL_JOB_TEXT_H_

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "simpo/v1/job.pb.h"
#include "simpo/v1/training_service.pb.h"
#include "simpoctl/terminal.h"

// What the commands print about jobs: pure functions of what the coordinator answered.
namespace simpo {

// A job as JSON; the keys are the API's, the state without its prefix, times in ISO 8601.
nlohmann::ordered_json JobToJson(const v1::Job& job);
// A job with its attempts, events and advice.
nlohmann::ordered_json DescriptionToJson(const v1::GetJobResponse& response);

// One line per job under a heading. `now` gives the ages.
std::string JobTable(const std::vector<v1::Job>& jobs, const google::protobuf::Timestamp& now);
// All that there is to know: state and why, progress, places, attempts, events, advice, next commands.
// `command` is how simpoctl is called; `http_address` may be empty.
std::string DescribeText(const v1::GetJobResponse& response, const std::string& command,
                         const std::string& http_address);
// What one can do next with a job in its state, a command per line.
std::string NextCommands(const v1::Job& job, const std::string& command, const std::string& http_address);
// The nodes with their slots and the jobs on them.
std::string NodeTable(const std::vector<v1::NodeState>& nodes);
nlohmann::ordered_json NodesToJson(const std::vector<v1::NodeState>& nodes);
// How a job ended, in a few lines.
std::string EndSummary(const v1::Job& job, const std::string& command, const TerminalLook& look);

}  // namespace simpo

#endif  // SIMPO_SIMPOCTL_JOB_TEXT_H_
