#ifndef SIMPO_COORDINATOR_SQLITE_H_
#define SIMPO_COORDINATOR_SQLITE_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

struct sqlite3;
struct sqlite3_stmt;

namespace simpo {

// A prepared statement. Parameters and columns count from 0. Not thread-safe.
class SqliteStatement {
 public:
  SqliteStatement() = default;
  explicit SqliteStatement(sqlite3_stmt* statement) : statement_(statement) {}

  // Clears the last run, then Bind... in order, then Step until it is false.
  SqliteStatement& Reset();
  SqliteStatement& Bind(int64_t value);
  SqliteStatement& Bind(const std::string& text);
  SqliteStatement& BindBlob(const std::string& bytes);  // refers to `bytes` until the next Reset
  SqliteStatement& BindNull();
  // True: a row is there.
  absl::StatusOr<bool> Step();
  // Runs a statement without rows.
  absl::Status Run();

  bool IsNull(int column) const;
  int64_t Int(int column) const;
  std::string Text(int column) const;  // also of blobs

 private:
  struct Finalize {
    void operator()(sqlite3_stmt* statement) const;
  };
  absl::Status Error(int code) const;
  std::unique_ptr<sqlite3_stmt, Finalize> statement_;
  int next_parameter_ = 1;
  int bind_error_ = 0;
};

// A connection. Not thread-safe.
class Sqlite {
 public:
  // Write-ahead log, every commit synced. A file that is no database is an error that names it.
  static absl::StatusOr<Sqlite> Open(const std::filesystem::path& path, bool read_only);

  absl::Status Execute(const std::string& sql);
  absl::StatusOr<SqliteStatement> Prepare(const std::string& sql);
  // Rows that the last INSERT, UPDATE or DELETE has touched.
  int64_t Changes() const;
  // Copies what is committed now into `target`, a file that is not there yet. Others may write meanwhile.
  absl::Status BackUp(const std::filesystem::path& target);

 private:
  struct Close {
    void operator()(sqlite3* db) const;
  };
  std::unique_ptr<sqlite3, Close> db_;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_SQLITE_H_
