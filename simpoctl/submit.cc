#include <pwd.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/atomic_file.h"
#include "common/job_config_yaml.h"
#include "common/status_macros.h"
#include "common/text.h"
#include "simpoctl/commands.h"
#include "simpoctl/exit_codes.h"
#include "simpoctl/follow.h"
#include "simpoctl/format.h"
#include "simpoctl/job_text.h"
#include "simpoctl/terminal.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

struct SubmitOptions {
  std::string file;
  std::vector<std::string> overrides;
  std::string name;
  std::string request_id;
  bool dry_run = false;
  bool follow = false;
  bool wait = false;
  std::string output = "table";
};

std::string LoginName() {
  const passwd* entry = getpwuid(geteuid());
  return entry == nullptr ? absl::StrCat("uid-", geteuid()) : entry->pw_name;
}

std::string RandomId() {
  std::random_device device;
  std::string id = "cli-";
  for (int i = 0; i < 4; ++i) absl::StrAppendFormat(&id, "%08x", device());
  return id;
}

absl::StatusOr<v1::SubmitJobRequest> MakeRequest(const SubmitOptions& options) {
  absl::StatusOr<std::string> text = ReadFile(options.file, kMaxJobFileBytes);
  if (!text.ok()) return absl::InvalidArgumentError(text.status().message());
  v1::SubmitJobRequest request;
  request.set_request_id(options.request_id.empty() ? RandomId() : options.request_id);
  request.set_job_yaml(*std::move(text));
  request.set_file_name(options.file);
  request.set_base_dir(fs::absolute(options.file).parent_path().lexically_normal().string());
  for (const std::string& override_text : options.overrides) request.add_overrides(override_text);
  request.set_name(options.name);
  request.set_user(LoginName());
  return request;
}

void PrintNotes(const google::protobuf::RepeatedPtrField<std::string>& notes) {
  for (const std::string& note : notes) PrintErr(absl::StrCat("note: ", OneLine(note), "\n"));
}

nlohmann::ordered_json NotesJson(const v1::SubmitJobResponse& response) {
  return std::vector<std::string>(response.notes().begin(), response.notes().end());
}

// A bad file is told without a coordinator; text that is not UTF-8 could not even be sent to one.
absl::StatusOr<ParsedJob> ParseHere(const v1::SubmitJobRequest& request) {
  return ParseJobYamlOrStatus(request.job_yaml(),
                              {.file_name = request.file_name(),
                               .base_dir = request.base_dir(),
                               .overrides = {request.overrides().begin(), request.overrides().end()}});
}

absl::StatusOr<int> DryRun(Client& client, v1::SubmitJobRequest request, const ParsedJob& parsed,
                           const SubmitOptions& options) {
  request.set_validate_only(true);
  absl::StatusOr<v1::SubmitJobResponse> checked = client.Submit(request);
  const bool answered = checked.ok();
  if (!answered && !absl::IsUnavailable(checked.status())) return checked.status();
  v1::SubmitJobResponse response;
  if (answered) {
    response = *std::move(checked);
  } else {
    *response.mutable_notes() = {parsed.notes.begin(), parsed.notes.end()};
  }
  const std::string config =
      answered && !response.job().config_yaml().empty() ? response.job().config_yaml() : JobConfigToYaml(parsed.config);
  if (options.output == "json") {
    PrintOut(nlohmann::ordered_json({{"valid", true},
                                     {"checked_by_coordinator", answered},
                                     {"notes", NotesJson(response)},
                                     {"config_yaml", config}})
                 .dump(2) +
             "\n");
    return kExitOk;
  }
  PrintNotes(response.notes());
  if (!answered) {
    PrintErr(absl::StrCat("note: no coordinator answered at ", client.address(),
                          "; the file was checked here only, not whether it fits there\n"));
  }
  if (options.output == "yaml") PrintOut(config);
  if (options.output == "name") PrintOut(parsed.config.name.empty() ? "" : parsed.config.name + "\n");
  if (options.output == "table") PrintOut(absl::StrCat(options.file, ": a valid job\n"));
  return kExitOk;
}

// The address of the web page, where the coordinator tells it.
std::string HttpAddress(Client& client) {
  const absl::StatusOr<v1::GetServerInfoResponse> info = client.ServerInfo();
  return info.ok() ? info->http_address() : "";
}

void PrintSubmitted(Client& client, const v1::SubmitJobResponse& response, const SubmitOptions& options) {
  const v1::Job& job = response.job();
  if (options.output == "name") {
    PrintOut(job.id() + "\n");
    return;
  }
  if (options.output != "table") {
    nlohmann::ordered_json json = JobToJson(job);
    json["notes"] = NotesJson(response);
    json["already_existed"] = response.already_existed();
    PrintOut(options.output == "json" ? json.dump(2) + "\n" : ToYaml(json));
    return;
  }
  PrintNotes(response.notes());
  PrintOut(absl::StrCat("Job ", job.id(), " (", OneLine(job.name()), ") ",
                        response.already_existed() ? "was submitted before with this request id: " : "submitted: ",
                        StateName(job.state()), "\n"));
  if (!options.follow && !options.wait) {
    PrintErr("Next:\n" + NextCommands(job, client.command(), HttpAddress(client)));
  }
}

absl::StatusOr<int> Submit(Client& client, const SubmitOptions& options) {
  SIMPO_ASSIGN_OR_RETURN(v1::SubmitJobRequest request, MakeRequest(options));
  SIMPO_ASSIGN_OR_RETURN(const ParsedJob parsed, ParseHere(request));
  if (options.dry_run) return DryRun(client, std::move(request), parsed, options);
  SIMPO_ASSIGN_OR_RETURN(const v1::SubmitJobResponse response, client.Submit(request));
  PrintSubmitted(client, response, options);
  SIMPO_RETURN_IF_ERROR(FlushOut());
  if (!options.follow && !options.wait) return kExitOk;
  return FollowJob(client, response.job().id(), {.quiet = options.wait, .timeout = {}});
}

}  // namespace

void AddSubmit(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<SubmitOptions>();
  CLI::App* command = app.add_subcommand("submit", "Submit a job file");
  command->add_option("file", options->file, "Job file (see: simpoctl help job-file)")->required()->type_name("FILE");
  command->add_option("--set", options->overrides, "Set a key over the file's value, as --set beta=2.5; repeatable")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  command->add_option("--name", options->name, "Name of the job, over the file's");
  command->add_option("--request-id", options->request_id,
                      "Submitting again with the same id gives the same job; made up when not given");
  CLI::Option* dry_run = command->add_flag("--dry-run", options->dry_run, "Check everything, submit nothing");
  CLI::Option* follow = command->add_flag("--follow", options->follow, "Show the progress until the job ends");
  CLI::Option* wait = command->add_flag("--wait", options->wait, "Wait in silence until the job ends");
  follow->excludes(wait)->excludes(dry_run);
  wait->excludes(dry_run);
  command->add_option("-o,--output", options->output, "table, json, yaml or name (the id alone)")
      ->check(CLI::IsMember({"table", "json", "yaml", "name"}));
  command->callback([&line, options] { line.run = [options](Client& client) { return Submit(client, *options); }; });
}

}  // namespace simpo
