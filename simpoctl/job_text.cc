#include "simpoctl/job_text.h"

#include <algorithm>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/text.h"
#include "simpoctl/format.h"

namespace simpo {
namespace {

using Json = nlohmann::ordered_json;

// Protobuf maps have no order of their own; people and diffs want one.
template <typename Value>
Json SortedJson(const google::protobuf::Map<std::string, Value>& map) {
  Json json = Json::object();
  for (const auto& [key, value] : std::map<std::string, Value>(map.begin(), map.end())) {
    if constexpr (std::is_same_v<Value, double>) {
      json[key] = ExactJson(value);
    } else {
      json[key] = value;
    }
  }
  return json;
}

Json ProgressToJson(const v1::JobProgress& progress) {
  return {{"step", progress.step()},
          {"steps_planned", progress.steps_planned()},
          {"epoch", ExactJson(progress.epoch())},
          {"step_seconds", ExactJson(progress.step_seconds())},
          {"tokens_per_second", ExactJson(progress.tokens_per_second())},
          {"eta_seconds", ExactJson(progress.eta_seconds())},
          {"phase", progress.phase()},
          {"checkpoint_step", progress.checkpoint_step()},
          {"metrics", SortedJson(progress.metrics())},
          {"eval_metrics", SortedJson(progress.eval_metrics())}};
}

// "job", "machine"; empty: it was not lost.
std::string FaultName(v1::FaultKind fault) {
  if (fault == v1::FAULT_KIND_JOB) return "job";
  return fault == v1::FAULT_KIND_MACHINE ? "machine" : "";
}

std::string ProgressCell(const v1::JobProgress& progress) {
  if (progress.steps_planned() <= 0) return progress.phase().empty() ? "-" : progress.phase();
  return absl::StrFormat("%d/%d", progress.step(), progress.steps_planned());
}

std::string MetricCell(const v1::Job& job, const std::string& name) {
  const double* value = FindMetric(job.progress().metrics(), name);
  return value == nullptr ? "-" : ShortNumber(*value);
}

std::string Indented(std::string_view text, const std::string& indent) {
  std::string result;
  for (const absl::string_view line :
       absl::StrSplit(absl::string_view(text.data(), text.size()), '\n', absl::SkipEmpty())) {
    absl::StrAppend(&result, indent, line, "\n");
  }
  return result;
}

std::string AttemptTable(const v1::GetJobResponse& response) {
  std::vector<std::vector<std::string>> rows = {{"ATTEMPT", "START", "TOOK", "STEPS", "EXIT", "REASON"}};
  for (const v1::Attempt& attempt : response.attempts()) {
    const bool ended = attempt.end_time().seconds() > 0;
    rows.push_back({absl::StrCat(attempt.number()), ShortTime(attempt.start_time()),
                    ended ? FormatDuration(SecondsBetween(attempt.start_time(), attempt.end_time())) : "-",
                    absl::StrCat(attempt.first_step(), " to ", attempt.last_step()),
                    attempt.has_exit_code() ? absl::StrCat(attempt.exit_code()) : "-", attempt.reason()});
  }
  return FormatTable(rows);
}

constexpr int kRanksShown = 64;

std::string RankTable(const v1::GetJobResponse& response) {
  std::vector<std::vector<std::string>> rows = {
      {"RANK", "HOST", "PID", "PHASE", "STEP", "BUSY", "HEARD", "COLLECTIVE"}};
  for (const v1::RankState& rank : response.ranks()) {
    if (static_cast<int>(rows.size()) > kRanksShown) break;
    rows.push_back({absl::StrCat(rank.rank()), OneLine(rank.hostname()), absl::StrCat(rank.pid()),
                    rank.phase().empty() ? "-" : OneLine(rank.phase()), absl::StrCat(rank.step()),
                    rank.busy_seconds() > 0 ? absl::StrCat(ShortNumber(rank.busy_seconds()), " s") : "-",
                    absl::StrCat(ShortTime(rank.heard_time()), rank.connected() ? "" : " (not connected)"),
                    rank.last_collective().empty() ? "-" : OneLine(rank.last_collective())});
  }
  std::string text = FormatTable(rows);
  if (response.ranks_size() > kRanksShown) {
    absl::StrAppend(&text, "and ", response.ranks_size() - kRanksShown, " more (get -o json shows all)\n");
  }
  return text;
}

std::string EventTable(const v1::GetJobResponse& response) {
  std::vector<std::vector<std::string>> rows;
  for (const v1::JobEvent& event : response.events()) {
    rows.push_back({ShortTime(event.time()), event.type(), event.message()});
  }
  return FormatTable(rows);
}

std::string Facts(const v1::GetJobResponse& response) {
  const v1::Job& job = response.job();
  const v1::JobProgress& progress = job.progress();
  std::vector<std::vector<std::string>> rows = {
      {"Job", job.id()},
      {"Name", job.name()},
      {"User", job.user()},
      {"State", StateName(job.state())},
      {"Why", job.reason()},
      {"Priority", absl::StrCat(job.priority())},
      {"Ranks", absl::StrCat(job.ranks(), " on ", job.slots(), " slots")},
      {"Created", ShortTime(job.create_time())},
      {"Started", ShortTime(job.start_time())},
      {"Ended", ShortTime(job.end_time())},
      {"Attempt",
       absl::StrCat(
           job.attempt(), " (", job.restarts(), " of at most ", job.max_restarts(), " restarts",
           job.machine_faults() > 0 ? absl::StrCat(", ", job.machine_faults(), " lost to faults of the machine") : "",
           ")")},
  };
  for (const auto& [key, value] : std::map<std::string, std::string>(job.labels().begin(), job.labels().end())) {
    rows.push_back({"Label", absl::StrCat(key, "=", value)});
  }
  if (progress.steps_planned() > 0) {
    std::string text = absl::StrFormat("step %d of %d, epoch %s", progress.step(), progress.steps_planned(),
                                       ShortNumber(progress.epoch()));
    if (progress.eta_seconds() > 0) absl::StrAppend(&text, ", ", FormatDuration(progress.eta_seconds()), " to go");
    rows.push_back({"Progress", text});
    rows.push_back({"Training", MetricSummary(progress.metrics(), "")});
  }
  if (!progress.phase().empty() && !IsFinal(job.state())) rows.push_back({"Phase", progress.phase()});
  if (!progress.eval_metrics().empty()) {
    rows.push_back({"Evaluation", MetricSummary(progress.eval_metrics(), "eval_")});
  }
  if (progress.checkpoint_step() > 0) rows.push_back({"Checkpoint", absl::StrCat("step ", progress.checkpoint_step())});
  if (job.nodes() > 1 && response.attempts_size() > 0) {
    std::vector<std::string> nodes;
    for (const v1::NodeSlots& share : response.attempts().rbegin()->nodes()) nodes.push_back(share.node());
    rows.push_back({"Nodes", absl::StrJoin(nodes, ", ")});
  }
  rows.push_back({"Output", job.output_dir()});
  if (job.state() == v1::JOB_STATE_SUCCEEDED) rows.push_back({"Model", job.output_dir() + "/final"});
  if (response.attempts_size() > 0) rows.push_back({"Logs", response.attempts().rbegin()->log_dir()});
  return FormatTable(rows);
}

}  // namespace

Json JobToJson(const v1::Job& job) {
  Json json = {{"id", job.id()},
               {"name", job.name()},
               {"user", job.user()},
               {"state", StateName(job.state())},
               {"reason", job.reason()},
               {"priority", job.priority()},
               {"labels", SortedJson(job.labels())},
               {"create_time", FormatTime(job.create_time())},
               {"start_time", FormatTime(job.start_time())},
               {"end_time", FormatTime(job.end_time())},
               {"output_dir", job.output_dir()},
               {"ranks", job.ranks()},
               {"slots", job.slots()},
               {"attempt", job.attempt()},
               {"restarts", job.restarts()},
               {"max_restarts", job.max_restarts()},
               {"machine_faults", job.machine_faults()},
               {"request_id", job.request_id()},
               {"progress", ProgressToJson(job.progress())}};
  if (!job.config_yaml().empty()) json["config_yaml"] = job.config_yaml();
  return json;
}

Json DescriptionToJson(const v1::GetJobResponse& response) {
  Json json = JobToJson(response.job());
  json["attempts"] = Json::array();
  for (const v1::Attempt& attempt : response.attempts()) {
    json["attempts"].push_back({{"number", attempt.number()},
                                {"start_time", FormatTime(attempt.start_time())},
                                {"end_time", FormatTime(attempt.end_time())},
                                {"exit_code", attempt.has_exit_code() ? Json(attempt.exit_code()) : Json()},
                                {"reason", attempt.reason()},
                                {"fault", FaultName(attempt.fault())},
                                {"checkpoint_step", attempt.checkpoint_step()},
                                {"log_dir", attempt.log_dir()},
                                {"first_step", attempt.first_step()},
                                {"last_step", attempt.last_step()}});
  }
  json["events"] = Json::array();
  for (const v1::JobEvent& event : response.events()) {
    json["events"].push_back({{"sequence", event.sequence()},
                              {"time", FormatTime(event.time())},
                              {"type", event.type()},
                              {"message", event.message()},
                              {"attempt", event.attempt()},
                              {"state", StateName(event.state())}});
  }
  json["rank_states"] = Json::array();
  for (const v1::RankState& rank : response.ranks()) {
    json["rank_states"].push_back({{"rank", rank.rank()},
                                   {"hostname", rank.hostname()},
                                   {"pid", rank.pid()},
                                   {"connected", rank.connected()},
                                   {"heard_time", FormatTime(rank.heard_time())},
                                   {"phase", rank.phase()},
                                   {"step", rank.step()},
                                   {"busy_seconds", ExactJson(rank.busy_seconds())},
                                   {"last_collective", rank.last_collective()},
                                   {"memory_peak_bytes", rank.memory_peak_bytes()}});
  }
  json["advice"] = std::vector<std::string>(response.advice().begin(), response.advice().end());
  return json;
}

std::string JobTable(const std::vector<v1::Job>& jobs, const google::protobuf::Timestamp& now) {
  std::vector<std::vector<std::string>> rows = {
      {"ID", "NAME", "STATE", "STEP", "LOSS", "MARGIN", "RANKS", "AGE", "USER", "WHY"}};
  for (const v1::Job& job : jobs) {
    rows.push_back({job.id(), Clip(OneLine(job.name()), 32), StateName(job.state()), ProgressCell(job.progress()),
                    MetricCell(job, "loss"), MetricCell(job, "rewards/margins"), absl::StrCat(job.ranks()),
                    FormatDuration(std::max(0.0, SecondsBetween(job.create_time(), now))), job.user(),
                    Clip(OneLine(job.reason()), 60)});
  }
  return FormatTable(rows);
}

std::string NodeTable(const std::vector<v1::NodeState>& nodes) {
  std::vector<std::vector<std::string>> rows = {{"NODE", "STATE", "SLOTS", "TAKEN", "LABELS", "JOBS"}};
  const bool any_drained =
      std::any_of(nodes.begin(), nodes.end(), [](const v1::NodeState& node) { return !node.drain_reason().empty(); });
  if (any_drained) rows[0].push_back("WHY");
  for (const v1::NodeState& node : nodes) {
    std::vector<std::string> labels;
    for (const auto& [key, value] : std::map<std::string, std::string>(node.labels().begin(), node.labels().end())) {
      labels.push_back(absl::StrCat(key, "=", value));
    }
    std::vector<std::string> jobs;
    for (const v1::JobSlots& job : node.jobs()) jobs.push_back(absl::StrCat(job.job_id(), " (", job.slots(), ")"));
    const std::string state = !node.drain_reason().empty() ? "drained" : node.up() ? "up" : "down";
    rows.push_back({node.name(), state, absl::StrCat(node.slots()), absl::StrCat(node.slots_taken()),
                    labels.empty() ? "-" : absl::StrJoin(labels, ","), jobs.empty() ? "-" : absl::StrJoin(jobs, ", ")});
    if (any_drained) rows.back().push_back(OneLine(node.drain_reason()));
  }
  return FormatTable(rows);
}

Json NodesToJson(const std::vector<v1::NodeState>& nodes) {
  Json json = Json::array();
  for (const v1::NodeState& node : nodes) {
    Json jobs = Json::array();
    for (const v1::JobSlots& job : node.jobs()) jobs.push_back({{"job_id", job.job_id()}, {"slots", job.slots()}});
    json.push_back({{"name", node.name()},
                    {"up", node.up()},
                    {"drain_reason", node.drain_reason()},
                    {"slots", node.slots()},
                    {"slots_taken", node.slots_taken()},
                    {"labels", SortedJson(node.labels())},
                    {"jobs", std::move(jobs)}});
  }
  return json;
}

std::string NextCommands(const v1::Job& job, const std::string& command, const std::string& http_address) {
  std::vector<std::vector<std::string>> rows;
  auto add = [&](const std::string& arguments, const std::string& what) {
    rows.push_back({absl::StrCat("  ", command, " ", arguments), what});
  };
  const std::string& id = job.id();
  if (IsFinal(job.state())) {
    const std::string& phase = job.progress().phase();
    const bool began = !phase.empty() && phase != "prepare";  // its ranks, for certain
    if (began) {
      add("metrics " + id + " -o csv", "every step's values");
      add("logs " + id, "what rank 0 said");
    }
    if (job.attempt() > 0 && job.state() != v1::JOB_STATE_SUCCEEDED) {
      add("logs " + id + " --rank -1",
          began ? "what the launcher said" : "what the launcher and the checks before said");
      if (!began) add("logs " + id, "what rank 0 said, if it began");
    }
    add("get " + id + " -o yaml", "the job file as it ran");
  } else {
    add("watch " + id, "progress, live");
    add("logs " + id + " --follow", "what rank 0 says");
    add("metrics " + id + " -o csv", "every step's values so far");
    if (job.state() == v1::JOB_STATE_RUNNING) add("checkpoint " + id, "a checkpoint now");
    if (job.state() == v1::JOB_STATE_QUEUED) add("priority " + id + " N", "another place in the queue");
    add("cancel " + id, "end it");
  }
  // FormatTable strips the line's end only, so the indent stays.
  std::string text = FormatTable(rows);
  if (!http_address.empty())
    absl::StrAppend(&text, "  http://", http_address, "/  status page, and /metrics for Prometheus\n");
  return text;
}

std::string DescribeText(const v1::GetJobResponse& response, const std::string& command,
                         const std::string& http_address) {
  std::string text = Facts(response);
  if (response.attempts_size() > 0) absl::StrAppend(&text, "\nAttempts\n", Indented(AttemptTable(response), "  "));
  if (response.ranks_size() > 0) absl::StrAppend(&text, "\nRanks\n", Indented(RankTable(response), "  "));
  if (response.events_size() > 0) absl::StrAppend(&text, "\nEvents\n", Indented(EventTable(response), "  "));
  if (response.advice_size() > 0) {
    absl::StrAppend(&text, "\nAdvice\n");
    for (const std::string& advice : response.advice()) absl::StrAppend(&text, "  ", OneLine(advice), "\n");
  }
  absl::StrAppend(&text, "\nNext\n", NextCommands(response.job(), command, http_address));
  return text;
}

std::string EndSummary(const v1::Job& job, const std::string& command, const TerminalLook& look) {
  std::string text = absl::StrCat("Job ", job.id(), " (", OneLine(job.name()), ") ",
                                  Colored(StateName(job.state()), StateColor(job.state()), look));
  const double seconds = SecondsBetween(job.create_time(), job.end_time());
  if (job.end_time().seconds() > 0) absl::StrAppend(&text, " after ", FormatDuration(std::max(0.0, seconds)));
  const v1::JobProgress& progress = job.progress();
  if (progress.steps_planned() > 0) {
    absl::StrAppend(&text, ", ", progress.step(), " of ", progress.steps_planned(), " steps");
  }
  absl::StrAppend(&text, "\n");
  if (!job.reason().empty()) absl::StrAppend(&text, "  why         ", OneLine(job.reason()), "\n");
  if (!progress.metrics().empty()) {
    absl::StrAppend(&text, "  training    ", MetricSummary(progress.metrics(), ""), "\n");
  }
  if (!progress.eval_metrics().empty()) {
    absl::StrAppend(&text, "  evaluation  ", MetricSummary(progress.eval_metrics(), "eval_"), "\n");
  }
  if (job.state() == v1::JOB_STATE_SUCCEEDED) {
    absl::StrAppend(&text, "  model       ", OneLine(job.output_dir()), "/final\n");
  }
  if (job.state() == v1::JOB_STATE_FAILED) {
    absl::StrAppend(&text, "  look at     ", command, " describe ", job.id(), "\n");
  }
  return text;
}

}  // namespace simpo
