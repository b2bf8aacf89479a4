#ifndef SIMPO_COORDINATOR_DATABASE_H_
#define SIMPO_COORDINATOR_DATABASE_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/sqlite.h"

namespace simpo {

// The files of a data directory. The first holds all that decides about jobs, the second metric points alone.
inline constexpr char kJobsFile[] = "coordinator.db";
inline constexpr char kMetricsFile[] = "metrics.db";

// Makes the tables of an empty file, or takes an older one on: `upgrade` brings it from its version to
// `version` and says so in the file (PRAGMA user_version), in steps that a crash may come between. A newer
// one is refused.
absl::Status EnsureSchema(Sqlite& db, const std::filesystem::path& path, int version, const char* tables,
                          const std::function<absl::Status(int64_t from)>& upgrade);

// The database of jobs: a connection that writes, for the controller's thread alone, and one that reads what
// is committed, for any thread that holds reader_mutex().
class Database {
 public:
  // Makes the file and its tables when they are missing. A file of schema 1 held metric points too: they
  // move to kMetricsFile beside it. A database of a newer version is refused.
  static absl::StatusOr<std::unique_ptr<Database>> Open(const std::filesystem::path& path);

  // Begins a transaction unless one is open; every write of the stores calls it first.
  absl::Status Begin();
  // Makes the writes since Begin durable, all or none. Nothing to do without a transaction.
  absl::Status Commit();
  bool InTransaction() const { return in_transaction_; }

  Sqlite& writer() { return writer_; }
  Sqlite& reader() { return reader_; }
  std::mutex& reader_mutex() { return reader_mutex_; }

 private:
  Database(Sqlite writer, Sqlite reader) : writer_(std::move(writer)), reader_(std::move(reader)) {}

  Sqlite writer_;
  Sqlite reader_;
  std::mutex reader_mutex_;
  bool in_transaction_ = false;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_DATABASE_H_
