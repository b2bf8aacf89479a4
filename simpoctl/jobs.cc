#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <memory>
#include <thread>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "common/text.h"
#include "simpoctl/commands.h"
#include "simpoctl/exit_codes.h"
#include "simpoctl/format.h"
#include "simpoctl/job_text.h"
#include "simpoctl/terminal.h"

namespace simpo {
namespace {

constexpr int kLargestPage = 1000;

struct ListOptions {
  std::vector<std::string> states;
  std::string user;
  std::vector<std::string> labels;
  int limit = 50;
  std::string output = "table";
};

constexpr std::chrono::milliseconds kPoll{500};

struct DrainOptions {
  std::string node;
  std::string reason;
  bool keep_running = false;
};

struct JobOptions {
  std::string job;
  bool yes = false;
  bool wait = false;
  int priority = 0;
  std::string output = "table";
};

struct JobList {
  std::vector<v1::Job> jobs;
  bool more = false;  // than the limit
};

absl::StatusOr<JobList> FetchJobs(Client& client, const ListOptions& options) {
  v1::ListJobsRequest request;
  request.set_user(options.user);
  for (const std::string& name : options.states) {
    const v1::JobState state = ParseState(name);
    if (state == v1::JOB_STATE_UNSPECIFIED) {
      return absl::InvalidArgumentError(absl::StrCat("--state: '", OneLine(name),
                                                     "' is no state; they are QUEUED, LAUNCHING, RUNNING, RESTARTING, "
                                                     "PREEMPTING, CANCELLING, SUCCEEDED, FAILED and CANCELLED"));
    }
    request.add_states(state);
  }
  for (const std::string& label : options.labels) {
    const size_t equals = label.find('=');
    if (equals == std::string::npos || equals == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("--label: '", OneLine(label), "' must be KEY=VALUE, as in the labels of a job file"));
    }
    const std::string key = label.substr(0, equals);
    if (!request.mutable_labels()->insert({key, label.substr(equals + 1)}).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("--label: '", OneLine(key), "' is there twice; a job has one value of it, so none could match"));
    }
  }
  JobList list;
  do {
    request.set_page_size(std::min(kLargestPage, options.limit - static_cast<int>(list.jobs.size())));
    SIMPO_ASSIGN_OR_RETURN(v1::ListJobsResponse response, client.ListJobs(request));
    for (v1::Job& job : *response.mutable_jobs()) list.jobs.push_back(std::move(job));
    request.set_page_token(response.next_page_token());
    list.more = !response.next_page_token().empty();
  } while (list.more && static_cast<int>(list.jobs.size()) < options.limit);
  return list;
}

absl::StatusOr<int> List(Client& client, const ListOptions& options) {
  SIMPO_ASSIGN_OR_RETURN(const JobList list, FetchJobs(client, options));
  const std::vector<v1::Job>& jobs = list.jobs;
  if (options.output == "table") {
    if (jobs.empty()) PrintErr("No jobs.\n");
    if (!jobs.empty()) PrintOut(JobTable(jobs, Now()));
  } else if (options.output == "name") {
    for (const v1::Job& job : jobs) PrintOut(job.id() + "\n");
  } else {
    nlohmann::ordered_json json = nlohmann::ordered_json::array();
    for (const v1::Job& job : jobs) json.push_back(JobToJson(job));
    PrintOut(json.dump(2) + "\n");
  }
  if (list.more) {
    PrintErr(absl::StrCat("These are the newest ", jobs.size(),
                          "; there are more. See --limit, --state, --user, --label\n"));
  }
  return kExitOk;
}

absl::StatusOr<int> Get(Client& client, const JobOptions& options) {
  SIMPO_ASSIGN_OR_RETURN(const v1::GetJobResponse response, client.GetJob(options.job));
  const v1::Job& job = response.job();
  if (options.output == "table") PrintOut(JobTable({job}, Now()));
  if (options.output == "name") PrintOut(job.id() + "\n");
  if (options.output == "json") PrintOut(DescriptionToJson(response).dump(2) + "\n");
  if (options.output == "yaml") PrintOut(ToYaml(DescriptionToJson(response)));
  return kExitOk;
}

absl::StatusOr<int> Describe(Client& client, const JobOptions& options) {
  SIMPO_ASSIGN_OR_RETURN(const v1::GetJobResponse response, client.GetJob(options.job));
  const absl::StatusOr<v1::GetServerInfoResponse> info = client.ServerInfo();
  PrintOut(DescribeText(response, client.command(), info.ok() ? info->http_address() : ""));
  return kExitOk;
}

bool Confirmed(const v1::Job& job) {
  PrintErr(absl::StrCat("End job ", job.id(), " (", OneLine(job.name()), ", ", StateName(job.state()), ", step ",
                        job.progress().step(), " of ", job.progress().steps_planned(), ")? [y/N] "));
  std::string answer;
  std::getline(std::cin, answer);
  return answer == "y" || answer == "Y" || answer == "yes";
}

absl::StatusOr<int> Cancel(Client& client, const JobOptions& options) {
  SIMPO_ASSIGN_OR_RETURN(const v1::GetJobResponse found, client.GetJob(options.job));
  const v1::Job& job = found.job();
  if (!options.yes && !IsFinal(job.state()) && isatty(STDIN_FILENO) == 1 && !Confirmed(job)) {
    return absl::CancelledError("nothing was done; the job goes on");
  }
  v1::CancelJobRequest request;
  request.set_job_id(job.id());
  SIMPO_ASSIGN_OR_RETURN(const v1::CancelJobResponse response, client.Cancel(request));
  const v1::JobState state = response.job().state();
  PrintOut(absl::StrCat("Job ", job.id(), " (", OneLine(job.name()), ") ",
                        IsFinal(job.state()) ? "had already ended: " : "", StateName(state), "\n"));
  if (!IsFinal(state)) PrintErr(absl::StrCat("See it end with: ", client.command(), " wait ", job.id(), "\n"));
  return kExitOk;
}

absl::StatusOr<int> Priority(Client& client, const JobOptions& options) {
  v1::SetPriorityRequest request;
  request.set_job_id(options.job);
  request.set_priority(options.priority);
  SIMPO_ASSIGN_OR_RETURN(const v1::SetPriorityResponse response, client.SetPriority(request));
  const v1::Job& job = response.job();
  PrintOut(absl::StrCat("Job ", job.id(), " (", OneLine(job.name()), ") has priority ", job.priority(), " and is ",
                        StateName(job.state()), "\n"));
  return kExitOk;
}

int64_t LastEvent(const v1::GetJobResponse& response, const std::string& type) {
  int64_t sequence = 0;
  for (const v1::JobEvent& event : response.events()) {
    if (event.type() == type) sequence = event.sequence();
  }
  return sequence;
}

absl::StatusOr<int> Checkpoint(Client& client, const JobOptions& options) {
  SIMPO_ASSIGN_OR_RETURN(const v1::GetJobResponse before, client.GetJob(options.job));
  v1::CheckpointJobRequest request;
  request.set_job_id(before.job().id());
  SIMPO_ASSIGN_OR_RETURN(const v1::CheckpointJobResponse response, client.Checkpoint(request));
  const std::string& id = response.job().id();
  const std::string job = absl::StrCat("Job ", id, " (", OneLine(response.job().name()), ")");
  if (!options.wait) {
    PrintOut(absl::StrCat(job, " was asked for a checkpoint at its next step\n"));
    PrintErr(absl::StrCat("See when it is complete with: ", client.command(), " describe ", id, "\n"));
    return kExitOk;
  }
  while (true) {
    SIMPO_ASSIGN_OR_RETURN(const v1::GetJobResponse now, client.GetJob(id));
    if (LastEvent(now, "checkpoint") > LastEvent(before, "checkpoint")) {
      PrintOut(absl::StrCat(job, " has a checkpoint of step ", now.job().progress().checkpoint_step(), "\n"));
      return kExitOk;
    }
    // A later attempt does not know of the request.
    if (now.job().state() != v1::JOB_STATE_RUNNING || now.job().attempt() != response.job().attempt()) {
      return absl::FailedPreconditionError(
          absl::StrCat("job ", id, " is ", StateName(now.job().state()), " in attempt ", now.job().attempt(),
                       " and has written no checkpoint since it was asked in attempt ", response.job().attempt(),
                       now.job().reason().empty() ? "" : ": ", now.job().reason()));
    }
    std::this_thread::sleep_for(kPoll);
  }
}

std::string DescribeNode(const v1::NodeState& node) {
  const int jobs = node.jobs_size();
  return absl::StrCat("Node ", node.name(), node.up() ? " is in use" : " gets no new gang", "; ",
                      jobs == 0 ? "no job" : absl::StrCat(jobs, jobs == 1 ? " job" : " jobs"), " on it\n");
}

absl::StatusOr<int> Drain(Client& client, const DrainOptions& options) {
  v1::DrainNodeRequest request;
  request.set_node(options.node);
  request.set_reason(options.reason);
  request.set_keep_running(options.keep_running);
  SIMPO_ASSIGN_OR_RETURN(const v1::DrainNodeResponse response, client.Drain(request));
  PrintOut(DescribeNode(response.node()));
  if (response.node().jobs_size() > 0) {
    PrintErr(absl::StrCat(options.keep_running ? "They go on to their end" : "They write a checkpoint and leave",
                          "; see with: ", client.command(), " nodes\n"));
  }
  return kExitOk;
}

absl::StatusOr<int> Undrain(Client& client, const DrainOptions& options) {
  v1::UndrainNodeRequest request;
  request.set_node(options.node);
  SIMPO_ASSIGN_OR_RETURN(const v1::UndrainNodeResponse response, client.Undrain(request));
  PrintOut(DescribeNode(response.node()));
  return kExitOk;
}

absl::StatusOr<int> Nodes(Client& client, const std::string& output) {
  std::vector<v1::NodeState> nodes;
  v1::ListNodesRequest request;
  request.set_page_size(kLargestPage);
  do {
    SIMPO_ASSIGN_OR_RETURN(v1::ListNodesResponse response, client.ListNodes(request));
    for (v1::NodeState& node : *response.mutable_nodes()) nodes.push_back(std::move(node));
    request.set_page_token(response.next_page_token());
  } while (!request.page_token().empty());
  PrintOut(output == "json" ? NodesToJson(nodes).dump(2) + "\n" : NodeTable(nodes));
  return kExitOk;
}

CLI::App* AddJobCommand(CLI::App& app, const char* name, const char* help, JobOptions* options) {
  CLI::App* command = app.add_subcommand(name, help);
  command->add_option("job", options->job, "A job's id, a beginning of it, or its name")->required()->type_name("JOB");
  return command;
}

}  // namespace

void AddList(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<ListOptions>();
  CLI::App* command = app.add_subcommand("list", "List jobs, newest first");
  command->add_option("--state", options->states, "Only jobs in this state; repeatable")->allow_extra_args(false);
  command->add_option("--user", options->user, "Only jobs of this user");
  command->add_option("--label", options->labels, "Only jobs with this label; repeatable: with all of them")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  command->add_option("--limit", options->limit, "Most jobs to list (default 50)")->check(CLI::Range(1, 1000000));
  command->add_option("-o,--output", options->output, "table, json or name (ids alone)")
      ->check(CLI::IsMember({"table", "json", "name"}));
  command->callback([&line, options] { line.run = [options](Client& client) { return List(client, *options); }; });
}

void AddGet(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<JobOptions>();
  CLI::App* command = AddJobCommand(app, "get", "Show one job", options.get());
  command->add_option("-o,--output", options->output, "table, json, yaml or name (the id alone)")
      ->check(CLI::IsMember({"table", "json", "yaml", "name"}));
  command->callback([&line, options] { line.run = [options](Client& client) { return Get(client, *options); }; });
}

void AddDescribe(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<JobOptions>();
  CLI::App* command = AddJobCommand(
      app, "describe", "Show all about a job: why it is in its state, attempts, events, places, advice", options.get());
  command->callback([&line, options] { line.run = [options](Client& client) { return Describe(client, *options); }; });
}

void AddCancel(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<JobOptions>();
  CLI::App* command = AddJobCommand(app, "cancel", "End a job", options.get());
  command->add_flag("--yes", options->yes, "Do not ask");
  command->callback([&line, options] { line.run = [options](Client& client) { return Cancel(client, *options); }; });
}

void AddPriority(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<JobOptions>();
  CLI::App* command = AddJobCommand(app, "priority", "Give a job another priority; higher runs first", options.get());
  command->add_option("priority", options->priority, "The new priority")
      ->required()
      ->type_name("N")
      ->check(CLI::Range(-1'000'000, 1'000'000));
  command->callback([&line, options] { line.run = [options](Client& client) { return Priority(client, *options); }; });
}

void AddCheckpoint(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<JobOptions>();
  CLI::App* command = AddJobCommand(app, "checkpoint", "Have a running job write a checkpoint now", options.get());
  command->add_flag("--wait", options->wait, "Wait until it is complete");
  command->callback(
      [&line, options] { line.run = [options](Client& client) { return Checkpoint(client, *options); }; });
}

void AddDrain(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<DrainOptions>();
  CLI::App* command = app.add_subcommand(
      "drain", "Take a node out of use: its jobs write a checkpoint, leave and wait in the queue (administrators)");
  command->add_option("node", options->node, "As `simpoctl nodes` names it")->required()->type_name("NODE");
  command->add_option("--reason", options->reason, "Why, for those who look");
  command->add_flag("--keep-running", options->keep_running, "Let the jobs on it go on to their end");
  command->callback([&line, options] { line.run = [options](Client& client) { return Drain(client, *options); }; });
}

void AddUndrain(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<DrainOptions>();
  CLI::App* command = app.add_subcommand("undrain", "Take a drained node into use again (administrators)");
  command->add_option("node", options->node, "As `simpoctl nodes` names it")->required()->type_name("NODE");
  command->callback([&line, options] { line.run = [options](Client& client) { return Undrain(client, *options); }; });
}

void AddNodes(CLI::App& app, CommandLine& line) {
  auto output = std::make_shared<std::string>("table");
  CLI::App* command = app.add_subcommand("nodes", "List the nodes, their slots and the jobs on them");
  command->add_option("-o,--output", *output, "table or json")->check(CLI::IsMember({"table", "json"}));
  command->callback([&line, output] { line.run = [output](Client& client) { return Nodes(client, *output); }; });
}

}  // namespace simpo
