#include "coordinator/database.h"

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

constexpr int kSchemaVersion = 1;

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
  last_point INTEGER NOT NULL,        -- points.sequence of the newest point before it
  event BLOB NOT NULL,                -- simpo.v1.JobEvent
  PRIMARY KEY (job, sequence)
) WITHOUT ROWID;
CREATE TABLE points (
  sequence INTEGER PRIMARY KEY AUTOINCREMENT,
  job INTEGER NOT NULL REFERENCES jobs(sequence),
  split TEXT NOT NULL,
  step INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  report BLOB NOT NULL,               -- simpo.v1.StepReport
  UNIQUE (job, split, step, attempt)
);
CREATE INDEX points_of_job ON points (job, sequence);
)";

absl::StatusOr<int64_t> UserVersion(Sqlite& db) {
  SIMPO_ASSIGN_OR_RETURN(SqliteStatement statement, db.Prepare("PRAGMA user_version"));
  SIMPO_RETURN_IF_ERROR(statement.Step().status());
  return statement.Int(0);
}

absl::Status Migrate(Sqlite& db, const std::filesystem::path& path) {
  SIMPO_ASSIGN_OR_RETURN(const int64_t version, UserVersion(db));
  if (version == kSchemaVersion) return absl::OkStatus();
  if (version > kSchemaVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat(path.string(), " was written by a newer simpo-coordinator (schema ", version, "; this one knows ",
                     kSchemaVersion, "); install that version or choose another --data-dir"));
  }
  return db.Execute(absl::StrCat("BEGIN IMMEDIATE;", kSchema, "PRAGMA user_version=", kSchemaVersion, ";COMMIT;"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Database>> Database::Open(const std::filesystem::path& path) {
  SIMPO_ASSIGN_OR_RETURN(Sqlite writer, Sqlite::Open(path, /*read_only=*/false));
  SIMPO_RETURN_IF_ERROR(Migrate(writer, path));
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
