#ifndef SIMPO_COORDINATOR_DATABASE_H_
#define SIMPO_COORDINATOR_DATABASE_H_

#include <filesystem>
#include <memory>
#include <mutex>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/sqlite.h"

namespace simpo {

// The coordinator's one database file: a connection that writes, for the controller's thread alone,
// and one that reads what is committed, for any thread that holds reader_mutex().
class Database {
 public:
  // Makes the file and its tables when they are missing. A database of a newer version is refused.
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
