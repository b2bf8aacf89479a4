#include "coordinator/database.h"

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "coordinator/metric_store.h"

namespace simpo {
namespace {

constexpr int kSchemaVersion = 3;

// Blobs are messages of simpo.v1, so a new field needs no new column.
constexpr char kSchema[] = R"(
CREATE TABLE jobs (
  sequence INTEGER PRIMARY KEY,       -- order of submission
  id TEXT NOT NULL UNIQUE,
  request_id TEXT NOT NULL UNIQUE,
  request_digest TEXT NOT NULL,       -- SHA-256 of what was asked
  state TEXT NOT NULL,                -- for people who look in; the job's own field counts
  job BLOB NOT NULL,                  -- simpo.v1.Job without config_yaml
  config_yaml TEXT NOT NULL
);
CREATE TABLE attempts (
  job INTEGER NOT NULL REFERENCES jobs(sequence),
  number INTEGER NOT NULL,
  attempt BLOB NOT NULL,              -- simpo.v1.Attempt
  PRIMARY KEY (job, number)
) WITHOUT ROWID;
CREATE TABLE events (
  job INTEGER NOT NULL REFERENCES jobs(sequence),
  sequence INTEGER NOT NULL,
  last_point INTEGER NOT NULL,        -- sequence of the newest point (metrics.db) before it
  event BLOB NOT NULL,                -- simpo.v1.JobEvent
  PRIMARY KEY (job, sequence)
) WITHOUT ROWID;
)";
// Since schema 3.
constexpr char kDrainedNodes[] = R"(
CREATE TABLE drained_nodes (
  node TEXT PRIMARY KEY,
  reason TEXT NOT NULL
) WITHOUT ROWID;
)";

absl::StatusOr<int64_t> UserVersion(Sqlite& db) {
  SIMPO_ASSIGN_OR_RETURN(SqliteStatement statement, db.Prepare("PRAGMA user_version"));
  SIMPO_RETURN_IF_ERROR(statement.Step().status());
  return statement.Int(0);
}

// From schema 1 to 2. A crash in between leaves the points in both files, and the next start moves them
// again: those that are there already stay as they are.
absl::Status MovePoints(Sqlite& db, const std::filesystem::path& metrics_path) {
  SIMPO_RETURN_IF_ERROR(MetricStore::MakeFile(metrics_path));
  {
    SIMPO_ASSIGN_OR_RETURN(SqliteStatement attach, db.Prepare("ATTACH ? AS metrics"));
    SIMPO_RETURN_IF_ERROR(attach.Reset().Bind(metrics_path.string()).Run());
  }
  SIMPO_RETURN_IF_ERROR(
      db.Execute("PRAGMA metrics.synchronous=FULL;"
                 "INSERT OR IGNORE INTO metrics.points (sequence, job, split, step, attempt, report) "
                 "SELECT sequence, job, split, step, attempt, report FROM main.points;"
                 "DETACH metrics"));
  return db.Execute("BEGIN IMMEDIATE; DROP TABLE points; PRAGMA user_version=2; COMMIT");
}

absl::Status Upgrade(Sqlite& db, int64_t from, const std::filesystem::path& metrics_path) {
  if (from < 2) SIMPO_RETURN_IF_ERROR(MovePoints(db, metrics_path));
  return db.Execute(absl::StrCat("BEGIN IMMEDIATE;", kDrainedNodes, "PRAGMA user_version=3; COMMIT"));
}

}  // namespace

absl::Status EnsureSchema(Sqlite& db, const std::filesystem::path& path, int version, const char* tables,
                          const std::function<absl::Status(int64_t from)>& upgrade) {
  SIMPO_ASSIGN_OR_RETURN(const int64_t found, UserVersion(db));
  if (found == version) return absl::OkStatus();
  if (found > version) {
    return absl::FailedPreconditionError(
        absl::StrCat(path.string(), " was written by a newer simpo-coordinator (schema ", found, "; this one knows ",
                     version, "); install that version or choose another --data-dir"));
  }
  if (found > 0) return upgrade(found);
  return db.Execute(absl::StrCat("BEGIN IMMEDIATE;", tables, "PRAGMA user_version=", version, ";COMMIT;"));
}

absl::StatusOr<std::unique_ptr<Database>> Database::Open(const std::filesystem::path& path) {
  SIMPO_ASSIGN_OR_RETURN(Sqlite writer, Sqlite::Open(path, /*read_only=*/false));
  SIMPO_RETURN_IF_ERROR(
      EnsureSchema(writer, path, kSchemaVersion, absl::StrCat(kSchema, kDrainedNodes).c_str(),
                   [&](int64_t from) { return Upgrade(writer, from, path.parent_path() / kMetricsFile); }));
  SIMPO_ASSIGN_OR_RETURN(Sqlite reader, Sqlite::Open(path, /*read_only=*/true));
  return absl::WrapUnique(new Database(std::move(writer), std::move(reader)));
}

absl::Status Database::Begin() {
  if (in_transaction_) return absl::OkStatus();
  SIMPO_RETURN_IF_ERROR(writer_.Execute("BEGIN IMMEDIATE"));
  in_transaction_ = true;
  return absl::OkStatus();
}

absl::Status Database::Commit() {
  if (!in_transaction_) return absl::OkStatus();
  in_transaction_ = false;
  return writer_.Execute("COMMIT");
}

}  // namespace simpo
