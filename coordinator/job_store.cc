#include "coordinator/job_store.h"

#include <algorithm>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "coordinator/job_state.h"

namespace simpo {
namespace {

// A message whose bytes do not parse means a damaged file, never something to go on with.
template <typename Message>
absl::Status ParseBlob(const std::string& bytes, Message* message) {
  if (message->ParseFromString(bytes)) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat("the database holds a damaged ", message->GetTypeName(), "; restore it from a copy"));
}

std::string JobBlob(const v1::Job& job) {
  if (job.config_yaml().empty()) return job.SerializeAsString();
  v1::Job stored = job;
  stored.clear_config_yaml();
  return stored.SerializeAsString();
}

absl::StatusOr<std::vector<v1::JobEvent>> ReadEvents(SqliteStatement& statement) {
  std::vector<v1::JobEvent> events;
  while (true) {
    SIMPO_ASSIGN_OR_RETURN(const bool row, statement.Step());
    if (!row) return events;
    SIMPO_RETURN_IF_ERROR(ParseBlob(statement.Text(0), &events.emplace_back()));
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<JobStore>> JobStore::Open(Database& database) {
  auto store = absl::WrapUnique(new JobStore(database));
  const auto prepare = [](Sqlite& db, const char* sql, SqliteStatement* statement) -> absl::Status {
    SIMPO_ASSIGN_OR_RETURN(*statement, db.Prepare(sql));
    return absl::OkStatus();
  };
  Sqlite& writer = database.writer();
  SIMPO_RETURN_IF_ERROR(prepare(writer,
                                "INSERT INTO jobs (sequence, id, request_id, request_digest, state, job, "
                                "config_yaml) VALUES (?, ?, ?, ?, ?, ?, ?)",
                                &store->insert_job_));
  SIMPO_RETURN_IF_ERROR(prepare(writer, "UPDATE jobs SET state = ?, job = ? WHERE sequence = ?", &store->update_job_));
  SIMPO_RETURN_IF_ERROR(
      prepare(writer, "INSERT OR REPLACE INTO attempts (job, number, attempt) VALUES (?, ?, ?)", &store->put_attempt_));
  SIMPO_RETURN_IF_ERROR(
      prepare(writer, "INSERT INTO events (job, sequence, last_point, event) VALUES (?, ?, ?, ?)", &store->add_event_));
  SIMPO_RETURN_IF_ERROR(prepare(writer, "DELETE FROM events WHERE job = ?", &store->delete_events_));
  SIMPO_RETURN_IF_ERROR(prepare(writer, "DELETE FROM attempts WHERE job = ?", &store->delete_attempts_));
  SIMPO_RETURN_IF_ERROR(prepare(writer, "DELETE FROM jobs WHERE sequence = ?", &store->delete_job_));
  Sqlite& reader = database.reader();
  SIMPO_RETURN_IF_ERROR(
      prepare(reader, "SELECT attempt FROM attempts WHERE job = ? ORDER BY number", &store->load_attempts_));
  SIMPO_RETURN_IF_ERROR(prepare(reader, "SELECT config_yaml FROM jobs WHERE sequence = ?", &store->config_yaml_));
  SIMPO_RETURN_IF_ERROR(prepare(reader,
                                "SELECT event FROM events WHERE job = ? AND sequence > ? ORDER BY sequence LIMIT ?",
                                &store->events_after_));
  SIMPO_RETURN_IF_ERROR(
      prepare(reader, "SELECT event FROM events WHERE job = ? ORDER BY sequence DESC LIMIT ?", &store->last_events_));
  SIMPO_RETURN_IF_ERROR(
      prepare(reader, "SELECT last_point FROM events WHERE job = ? AND sequence = ?", &store->last_point_));
  return store;
}

absl::Status JobStore::InsertJob(const StoredJob& stored) {
  SIMPO_RETURN_IF_ERROR(database_.Begin());
  const std::string blob = JobBlob(stored.job);
  return insert_job_.Reset()
      .Bind(stored.sequence)
      .Bind(stored.job.id())
      .Bind(stored.job.request_id())
      .Bind(stored.request_digest)
      .Bind(JobStateName(stored.job.state()))
      .BindBlob(blob)
      .Bind(stored.job.config_yaml())
      .Run();
}

absl::Status JobStore::UpdateJob(int64_t sequence, const v1::Job& job) {
  SIMPO_RETURN_IF_ERROR(database_.Begin());
  const std::string blob = JobBlob(job);
  return update_job_.Reset().Bind(JobStateName(job.state())).BindBlob(blob).Bind(sequence).Run();
}

absl::Status JobStore::PutAttempt(int64_t job, const v1::Attempt& attempt) {
  SIMPO_RETURN_IF_ERROR(database_.Begin());
  const std::string blob = attempt.SerializeAsString();
  return put_attempt_.Reset().Bind(job).Bind(attempt.number()).BindBlob(blob).Run();
}

absl::Status JobStore::AddEvent(int64_t job, const v1::JobEvent& event, int64_t last_point) {
  SIMPO_RETURN_IF_ERROR(database_.Begin());
  const std::string blob = event.SerializeAsString();
  return add_event_.Reset().Bind(job).Bind(event.sequence()).Bind(last_point).BindBlob(blob).Run();
}

absl::Status JobStore::DeleteJob(int64_t sequence) {
  SIMPO_RETURN_IF_ERROR(database_.Begin());
  SIMPO_RETURN_IF_ERROR(delete_events_.Reset().Bind(sequence).Run());
  SIMPO_RETURN_IF_ERROR(delete_attempts_.Reset().Bind(sequence).Run());
  return delete_job_.Reset().Bind(sequence).Run();
}

absl::Status JobStore::PutDrained(const std::string& node, const std::string& reason) {
  SIMPO_RETURN_IF_ERROR(database_.Begin());
  if (reason.empty()) {
    SIMPO_ASSIGN_OR_RETURN(SqliteStatement remove,
                           database_.writer().Prepare("DELETE FROM drained_nodes WHERE node = ?"));
    return remove.Reset().Bind(node).Run();
  }
  SIMPO_ASSIGN_OR_RETURN(SqliteStatement put, database_.writer().Prepare(
                                                  "INSERT OR REPLACE INTO drained_nodes (node, reason) VALUES (?, ?)"));
  return put.Reset().Bind(node).Bind(reason).Run();
}

absl::StatusOr<std::map<std::string, std::string>> JobStore::LoadDrained() {
  const std::lock_guard lock(database_.reader_mutex());
  SIMPO_ASSIGN_OR_RETURN(SqliteStatement rows, database_.reader().Prepare("SELECT node, reason FROM drained_nodes"));
  std::map<std::string, std::string> drained;
  while (true) {
    SIMPO_ASSIGN_OR_RETURN(const bool row, rows.Step());
    if (!row) return drained;
    drained[rows.Text(0)] = rows.Text(1);
  }
}

absl::Status JobStore::LoadAttempts(StoredJob& stored) {
  load_attempts_.Reset().Bind(stored.sequence);
  while (true) {
    SIMPO_ASSIGN_OR_RETURN(const bool row, load_attempts_.Step());
    if (!row) return absl::OkStatus();
    SIMPO_RETURN_IF_ERROR(ParseBlob(load_attempts_.Text(0), &stored.attempts.emplace_back()));
  }
}

absl::StatusOr<std::vector<StoredJob>> JobStore::LoadJobs() {
  const std::lock_guard lock(database_.reader_mutex());
  SIMPO_ASSIGN_OR_RETURN(
      SqliteStatement rows,
      database_.reader().Prepare(
          "SELECT jobs.sequence, request_digest, jobs.job, last.sequence, last.last_point FROM jobs LEFT "
          "JOIN events AS last ON last.job = jobs.sequence AND last.sequence = (SELECT max(sequence) FROM events WHERE "
          "events.job = jobs.sequence) ORDER BY jobs.sequence"));
  std::vector<StoredJob> jobs;
  while (true) {
    SIMPO_ASSIGN_OR_RETURN(const bool row, rows.Step());
    if (!row) return jobs;
    StoredJob& stored = jobs.emplace_back();
    stored.sequence = rows.Int(0);
    stored.request_digest = rows.Text(1);
    SIMPO_RETURN_IF_ERROR(ParseBlob(rows.Text(2), &stored.job));
    stored.last_event = rows.Int(3);
    stored.last_point = rows.Int(4);
    SIMPO_RETURN_IF_ERROR(LoadAttempts(stored));
  }
}

absl::StatusOr<std::string> JobStore::ConfigYaml(int64_t job) {
  const std::lock_guard lock(database_.reader_mutex());
  config_yaml_.Reset().Bind(job);
  SIMPO_ASSIGN_OR_RETURN(const bool row, config_yaml_.Step());
  if (!row) return absl::NotFoundError("the job has been removed, as it ended long ago (history_days)");
  std::string yaml = config_yaml_.Text(0);
  config_yaml_.Reset();
  return yaml;
}

absl::StatusOr<std::vector<v1::JobEvent>> JobStore::EventsAfter(int64_t job, int64_t after, int limit) {
  const std::lock_guard lock(database_.reader_mutex());
  return ReadEvents(events_after_.Reset().Bind(job).Bind(after).Bind(limit));
}

absl::StatusOr<std::vector<v1::JobEvent>> JobStore::LastEvents(int64_t job, int limit) {
  const std::lock_guard lock(database_.reader_mutex());
  SIMPO_ASSIGN_OR_RETURN(std::vector<v1::JobEvent> events, ReadEvents(last_events_.Reset().Bind(job).Bind(limit)));
  std::reverse(events.begin(), events.end());
  return events;
}

absl::StatusOr<int64_t> JobStore::LastPointBefore(int64_t job, int64_t event_sequence) {
  const std::lock_guard lock(database_.reader_mutex());
  last_point_.Reset().Bind(job).Bind(event_sequence);
  SIMPO_ASSIGN_OR_RETURN(const bool row, last_point_.Step());
  const int64_t sequence = row ? last_point_.Int(0) : 0;
  last_point_.Reset();
  return sequence;
}

}  // namespace simpo
