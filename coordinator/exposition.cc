#include "coordinator/exposition.h"

#include <algorithm>
#include <limits>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/metric_names.h"
#include "coordinator/job_state.h"
#include "coordinator/moment.h"

namespace simpo {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<ClientMetric::Label>;

// Families by name, each once, with its samples together as the format wants them.
class Families {
 public:
  void Add(const std::string& name, const std::string& help, MetricType type, ClientMetric sample) {
    MetricFamily& family = families_[name];
    family.name = name;
    family.help = help;
    family.type = type;
    family.metric.push_back(std::move(sample));
  }
  void Gauge(const std::string& name, const std::string& help, Labels labels, double value) {
    ClientMetric sample{.label = std::move(labels)};
    sample.gauge.value = value;
    Add(name, help, MetricType::Gauge, std::move(sample));
  }
  void Counter(const std::string& name, const std::string& help, Labels labels, double value) {
    ClientMetric sample{.label = std::move(labels)};
    sample.counter.value = value;
    Add(name, help, MetricType::Counter, std::move(sample));
  }
  void Durations(const std::string& name, const std::string& help, Labels labels, const Histogram& histogram) {
    ClientMetric sample{.label = std::move(labels)};
    sample.histogram.sample_count = static_cast<uint64_t>(histogram.count);
    sample.histogram.sample_sum = histogram.sum;
    int64_t cumulative = 0;
    for (size_t i = 0; i < Histogram::kBounds.size(); ++i) {
      cumulative += histogram.counts[i];
      sample.histogram.bucket.push_back({static_cast<uint64_t>(cumulative), Histogram::kBounds[i]});
    }
    sample.histogram.bucket.push_back(
        {static_cast<uint64_t>(histogram.count), std::numeric_limits<double>::infinity()});
    Add(name, help, MetricType::Histogram, std::move(sample));
  }
  std::vector<MetricFamily> Take() {
    std::vector<MetricFamily> all;
    for (auto& [name, family] : families_) all.push_back(std::move(family));
    return all;
  }

 private:
  std::map<std::string, MetricFamily> families_;
};

std::string HelpOf(const MetricName& name) {
  return name.unit.empty() ? std::string(name.help)
                           : absl::StrCat(std::string(name.help), ", in ", std::string(name.unit));
}

// The values of one step: of training, or (with the prefix of the keys) of an evaluation.
void AddStepValues(const std::string& id, const google::protobuf::Map<std::string, double>& values, bool is_eval,
                   Families* families) {
  for (const MetricName& name : MetricNames()) {
    if (name.prometheus.empty() || (is_eval && !name.in_eval)) continue;
    const auto value = values.find(absl::StrCat(is_eval ? std::string(kEvalPrefix) : "", std::string(name.key)));
    if (value == values.end()) continue;
    Labels labels = {{"job", id}};
    if (!name.response.empty()) labels.push_back({"response", std::string(name.response)});
    if (name.in_eval) labels.push_back({"split", is_eval ? "eval" : "train"});
    if (name.is_counter) {
      families->Counter(std::string(name.prometheus), HelpOf(name), std::move(labels), value->second);
    } else {
      families->Gauge(std::string(name.prometheus), HelpOf(name), std::move(labels), value->second);
    }
  }
}

// Whether another attempt followed, or is to follow.
bool IsFollowed(const JobView& view, const v1::Attempt& attempt) {
  return attempt.number() < view.job.attempt() || (attempt.has_end_time() && !IsFinal(view.job.state()));
}

void AddRestarts(const JobView& view, Families* families) {
  std::map<std::string, int> restarts;  // by reason
  int preemptions = 0;
  for (const v1::Attempt& attempt : view.attempts) {
    preemptions += attempt.preempted() ? 1 : 0;
    if (attempt.fault() == v1::FAULT_KIND_UNSPECIFIED || !IsFollowed(view, attempt)) continue;
    ++restarts[attempt.has_exit_code() ? absl::StrCat("exit_", attempt.exit_code()) : "lost"];
  }
  if (restarts.empty()) restarts["lost"] = 0;
  for (const auto& [reason, count] : restarts) {
    families->Counter("simpo_job_restarts_total", "Attempts that were lost and followed by another, by how they ended",
                      {{"job", view.job.id()}, {"reason", reason}}, count);
  }
  families->Counter("simpo_job_preemptions_total", "Attempts that ended to make room for another job or a drained node",
                    {{"job", view.job.id()}}, preemptions);
}

// One series for each of the least, the median and the largest of all ranks.
void AddStats(const std::string& name, const std::string& help, const std::string& job, std::vector<double> values,
              Families* families) {
  if (values.empty()) return;
  std::sort(values.begin(), values.end());
  for (const auto& [stat, value] : {std::pair("min", values.front()), std::pair("median", values[values.size() / 2]),
                                    std::pair("max", values.back())}) {
    families->Gauge(name, help, {{"job", job}, {"stat", stat}}, value);
  }
}

void AddRanks(const JobView& view, Families* families) {
  const std::string& job = view.job.id();
  std::vector<double> heard, busy, memory;
  const v1::RankState* slowest = nullptr;
  for (const v1::RankState& rank : view.ranks) {
    heard.push_back(static_cast<double>(UnixMillis(rank.heard_time())) / 1000);
    if (rank.memory_peak_bytes() > 0) memory.push_back(static_cast<double>(rank.memory_peak_bytes()));
    if (rank.busy_seconds() <= 0) continue;
    busy.push_back(rank.busy_seconds());
    if (slowest == nullptr || rank.busy_seconds() > slowest->busy_seconds()) slowest = &rank;
  }
  AddStats("simpo_job_last_heartbeat_timestamp_seconds", "When the ranks were last heard, Unix time", job,
           std::move(heard), families);
  AddStats("simpo_job_rank_step_seconds", "Time of a step that a rank is busy and does not wait for others", job,
           std::move(busy), families);
  AddStats("simpo_job_memory_peak_bytes", "Largest resident memory of a rank so far", job, std::move(memory), families);
  if (slowest != nullptr) {
    families->Gauge("simpo_job_slowest_rank", "The rank that is busy longest in a step", {{"job", job}},
                    slowest->rank());
  }
}

void AddJob(const JobView& view, Families* families) {
  const v1::Job& job = view.job;
  const Labels id = {{"job", job.id()}};
  families->Gauge("simpo_job_info", "Always 1; what the job is",
                  {{"job", job.id()},
                   {"name", job.name()},
                   {"user", job.user()},
                   {"model", view.info.model},
                   {"loss_type", view.info.loss_type},
                   {"launcher", view.info.launcher}},
                  1);
  for (v1::JobState state : kJobStates) {
    families->Gauge("simpo_job_state", "1 for the state that the job is in, 0 for the others",
                    {{"job", job.id()}, {"state", JobStateName(state)}}, job.state() == state ? 1 : 0);
  }
  AddRestarts(view, families);
  AddRanks(view, families);
  const v1::JobProgress& progress = job.progress();
  if (view.checkpoint_ms != 0) {
    families->Gauge("simpo_job_checkpoint_last_success_timestamp_seconds",
                    "When the last checkpoint was complete, Unix time", id,
                    static_cast<double>(view.checkpoint_ms) / 1000);
  }
  if (progress.steps_planned() > 0) {
    families->Gauge("simpo_job_steps_planned", "Optimizer steps that the job will do", id,
                    static_cast<double>(progress.steps_planned()));
  }
  AddStepValues(job.id(), progress.eval_metrics(), /*is_eval=*/true, families);
  if (progress.metrics().empty()) return;
  families->Gauge("simpo_job_step", "The step that this job's values of split train belong to", id,
                  static_cast<double>(progress.step()));
  families->Durations("simpo_job_step_duration_seconds", "Duration of the steps that this coordinator has heard of", id,
                      view.step_seconds);
  AddStepValues(job.id(), progress.metrics(), /*is_eval=*/false, families);
}

void AddCoordinator(const ExpositionSnapshot& snapshot, Families* families) {
  std::map<v1::JobState, int> counts;
  int taken = 0;
  double oldest_s = 0;
  for (const JobViews::View& view : snapshot.jobs) {
    const v1::Job& job = view->job;
    ++counts[job.state()];
    if (HoldsGang(job.state())) taken += job.slots();
    if (job.state() != v1::JOB_STATE_QUEUED) continue;
    oldest_s = std::max(oldest_s, static_cast<double>(snapshot.now_ms - UnixMillis(job.create_time())) / 1000);
  }
  for (v1::JobState state : kJobStates) {
    families->Gauge("simpo_coordinator_jobs", "Jobs in each state", {{"state", JobStateName(state)}}, counts[state]);
  }
  families->Gauge("simpo_coordinator_queue_oldest_seconds", "How long the oldest queued job has waited", {}, oldest_s);
  families->Gauge("simpo_coordinator_slots", "Slots of this machine", {{"state", "taken"}}, taken);
  families->Gauge("simpo_coordinator_slots", "Slots of this machine", {{"state", "free"}},
                  std::max(0, snapshot.slots_total - taken));
  families->Counter("simpo_coordinator_metric_points_total", "Metric points taken since the coordinator began", {},
                    static_cast<double>(snapshot.stats.points));
  families->Durations("simpo_coordinator_store_commit_duration_seconds", "Durations of the database's commits", {},
                      snapshot.stats.commit_seconds);
  for (const auto& [key, histogram] : snapshot.rpc_durations) {
    families->Durations("simpo_coordinator_rpc_duration_seconds", "Durations of users' calls",
                        {{"method", key.first}, {"code", key.second}}, histogram);
  }
  families->Gauge("simpo_coordinator_build_info", "Always 1; the program's version", {{"version", snapshot.version}},
                  1);
}

}  // namespace

std::vector<MetricFamily> CollectFamilies(const ExpositionSnapshot& snapshot) {
  Families families;
  AddCoordinator(snapshot, &families);
  for (const JobViews::View& view : snapshot.jobs) {
    const v1::Job& job = view->job;
    const bool gone = IsFinal(job.state()) && snapshot.now_ms - UnixMillis(job.end_time()) > snapshot.keep_ended_ms;
    if (!gone) AddJob(*view, &families);
  }
  return families.Take();
}

}  // namespace simpo
