#include "coordinator/sqlite.h"

#include <fcntl.h>
#include <sqlite3.h>
#include <sys/stat.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

absl::Status SqliteError(sqlite3* db, int code, const std::string& what) {
  const char* file = db == nullptr ? nullptr : sqlite3_db_filename(db, "main");
  const std::string message =
      absl::StrCat(file == nullptr ? "database" : file, ": ", what, ": ",
                   db == nullptr ? sqlite3_errstr(code) : sqlite3_errmsg(db), " (SQLite code ", code, ")");
  switch (code & 0xff) {
    case SQLITE_FULL:
      return absl::ResourceExhaustedError(absl::StrCat(message, "; free some disk space"));
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      return absl::UnavailableError(message);
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
      return absl::DataLossError(absl::StrCat(message, "; restore the file from a copy"));
    case SQLITE_CANTOPEN:
    case SQLITE_PERM:
    case SQLITE_READONLY:
      return absl::PermissionDeniedError(message);
    default:
      return absl::InternalError(message);
  }
}

// What is in it is its account's alone, also in a folder that others may enter. SQLite gives its -wal and -shm the same
// mode.
void MakePrivate(const std::filesystem::path& path) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd >= 0) close(fd);
  for (const char* end : {"", "-wal", "-shm"}) {  // of an earlier version
    const std::string file = path.string() + end;
    struct stat info = {};
    if (stat(file.c_str(), &info) == 0 && (info.st_mode & 077) != 0) chmod(file.c_str(), info.st_mode & 0700);
  }
}

}  // namespace

void SqliteStatement::Finalize::operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }
void Sqlite::Close::operator()(sqlite3* db) const { sqlite3_close_v2(db); }

SqliteStatement& SqliteStatement::Reset() {
  sqlite3_reset(statement_.get());
  next_parameter_ = 1;
  bind_error_ = SQLITE_OK;
  return *this;
}

SqliteStatement& SqliteStatement::Bind(int64_t value) {
  bind_error_ |= sqlite3_bind_int64(statement_.get(), next_parameter_++, value);
  return *this;
}

SqliteStatement& SqliteStatement::Bind(const std::string& text) {
  bind_error_ |=
      sqlite3_bind_text64(statement_.get(), next_parameter_++, text.data(), text.size(), SQLITE_TRANSIENT, SQLITE_UTF8);
  return *this;
}

SqliteStatement& SqliteStatement::BindBlob(const std::string& bytes) {
  bind_error_ |= sqlite3_bind_blob64(statement_.get(), next_parameter_++, bytes.data(), bytes.size(), SQLITE_STATIC);
  return *this;
}

SqliteStatement& SqliteStatement::BindNull() {
  bind_error_ |= sqlite3_bind_null(statement_.get(), next_parameter_++);
  return *this;
}

absl::Status SqliteStatement::Error(int code) const {
  return SqliteError(sqlite3_db_handle(statement_.get()), code, sqlite3_sql(statement_.get()));
}

absl::StatusOr<bool> SqliteStatement::Step() {
  if (bind_error_ != SQLITE_OK) return Error(bind_error_);
  const int code = sqlite3_step(statement_.get());
  if (code == SQLITE_ROW) return true;
  const absl::Status status = code == SQLITE_DONE ? absl::OkStatus() : Error(code);
  sqlite3_reset(statement_.get());  // ends the read that it held open
  if (!status.ok()) return status;
  return false;
}

absl::Status SqliteStatement::Run() { return Step().status(); }

bool SqliteStatement::IsNull(int column) const { return sqlite3_column_type(statement_.get(), column) == SQLITE_NULL; }

int64_t SqliteStatement::Int(int column) const { return sqlite3_column_int64(statement_.get(), column); }

std::string SqliteStatement::Text(int column) const {
  const void* bytes = sqlite3_column_blob(statement_.get(), column);
  const int size = sqlite3_column_bytes(statement_.get(), column);
  return bytes == nullptr ? std::string() : std::string(static_cast<const char*>(bytes), static_cast<size_t>(size));
}

absl::StatusOr<Sqlite> Sqlite::Open(const std::filesystem::path& path, bool read_only) {
  const int flags =
      (read_only ? SQLITE_OPEN_READONLY : SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE) | SQLITE_OPEN_NOMUTEX;
  if (!read_only) MakePrivate(path);
  sqlite3* raw = nullptr;
  const int code = sqlite3_open_v2(path.c_str(), &raw, flags, nullptr);
  Sqlite db;
  db.db_.reset(raw);
  if (code != SQLITE_OK) return SqliteError(raw, code, absl::StrCat("cannot open ", path.string()));
  sqlite3_extended_result_codes(raw, 1);
  sqlite3_busy_timeout(raw, /*ms=*/10'000);
  if (!read_only) {
    SIMPO_RETURN_IF_ERROR(db.Execute("PRAGMA journal_mode=WAL"));
    SIMPO_RETURN_IF_ERROR(db.Execute("PRAGMA synchronous=FULL"));
  }
  return db;
}

absl::Status Sqlite::Execute(const std::string& sql) {
  const int code = sqlite3_exec(db_.get(), sql.c_str(), nullptr, nullptr, nullptr);
  return code == SQLITE_OK ? absl::OkStatus() : SqliteError(db_.get(), code, sql);
}

int64_t Sqlite::Changes() const { return sqlite3_changes64(db_.get()); }

absl::Status Sqlite::BackUp(const std::filesystem::path& target) {
  sqlite3* raw = nullptr;
  const int opened = sqlite3_open_v2(target.c_str(), &raw,
                                     SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_EXCLUSIVE, nullptr);
  const std::unique_ptr<sqlite3, Close> copy(raw);
  if (opened != SQLITE_OK) return SqliteError(raw, opened, absl::StrCat("cannot make ", target.string()));
  sqlite3_backup* backup = sqlite3_backup_init(raw, "main", db_.get(), "main");
  if (backup == nullptr) return SqliteError(raw, sqlite3_errcode(raw), "cannot begin the copy");
  // All pages in one step: one read of the source, which sees one moment of it. With a write-ahead log
  // that holds up no writer.
  const int stepped = sqlite3_backup_step(backup, -1);
  const int finished = sqlite3_backup_finish(backup);
  if (stepped == SQLITE_DONE && finished == SQLITE_OK) return absl::OkStatus();
  return SqliteError(raw, finished != SQLITE_OK ? finished : stepped, "copying the database");
}

absl::StatusOr<SqliteStatement> Sqlite::Prepare(const std::string& sql) {
  sqlite3_stmt* statement = nullptr;
  const int code = sqlite3_prepare_v3(db_.get(), sql.c_str(), static_cast<int>(sql.size()) + 1,
                                      SQLITE_PREPARE_PERSISTENT, &statement, nullptr);
  if (code != SQLITE_OK) return SqliteError(db_.get(), code, sql);
  return SqliteStatement(statement);
}

}  // namespace simpo
