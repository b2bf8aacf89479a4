#include "coordinator/metric_store.h"

#include "absl/memory/memory.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

absl::StatusOr<v1::StepReport> ParseReport(const std::string& bytes) {
  v1::StepReport report;
  if (report.ParseFromString(bytes)) return report;
  return absl::DataLossError("the database holds a damaged simpo.v1.StepReport; restore it from a copy");
}

}  // namespace

absl::StatusOr<std::unique_ptr<MetricStore>> MetricStore::Open(Database& database) {
  auto store = absl::WrapUnique(new MetricStore(database));
  SIMPO_ASSIGN_OR_RETURN(store->add_,
                         database.writer().Prepare("INSERT INTO points (job, split, step, attempt, report) "
                                                   "VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING "
                                                   "RETURNING sequence"));
  Sqlite& reader = database.reader();
  // With max(), SQLite takes the other column from the row that holds the maximum.
  SIMPO_ASSIGN_OR_RETURN(store->list_,
                         reader.Prepare("SELECT report, max(attempt) FROM points WHERE job = ? AND split = ? "
                                        "AND step > ? GROUP BY step ORDER BY step LIMIT ?"));
  SIMPO_ASSIGN_OR_RETURN(store->since_, reader.Prepare("SELECT sequence, report FROM points WHERE job = ? AND "
                                                       "sequence > ? ORDER BY sequence LIMIT ?"));
  SIMPO_ASSIGN_OR_RETURN(store->last_of_, reader.Prepare("SELECT report FROM points WHERE job = ? AND split = ? AND "
                                                         "attempt = ? ORDER BY step DESC LIMIT 1"));
  SIMPO_ASSIGN_OR_RETURN(store->last_any_, reader.Prepare("SELECT report FROM points WHERE job = ? AND split = ? "
                                                          "ORDER BY attempt DESC, step DESC LIMIT 1"));
  SIMPO_ASSIGN_OR_RETURN(SqliteStatement last, reader.Prepare("SELECT max(sequence) FROM points"));
  SIMPO_RETURN_IF_ERROR(last.Step().status());
  store->last_sequence_ = last.Int(0);
  return store;
}

absl::Status MetricStore::AddPoint(int64_t job, const v1::StepReport& report) {
  SIMPO_RETURN_IF_ERROR(database_.Begin());
  const v1::MetricPoint& point = report.point();
  const std::string blob = report.SerializeAsString();
  add_.Reset().Bind(job).Bind(point.split()).Bind(point.step()).Bind(point.attempt()).BindBlob(blob);
  SIMPO_ASSIGN_OR_RETURN(const bool inserted, add_.Step());
  if (inserted) last_sequence_ = add_.Int(0);
  add_.Reset();
  return absl::OkStatus();
}

absl::StatusOr<std::vector<v1::MetricPoint>> MetricStore::ListPoints(int64_t job, const std::string& split,
                                                                     int64_t after_step, int limit) {
  const std::lock_guard lock(database_.reader_mutex());
  list_.Reset().Bind(job).Bind(split).Bind(after_step).Bind(limit);
  std::vector<v1::MetricPoint> points;
  while (true) {
    SIMPO_ASSIGN_OR_RETURN(const bool row, list_.Step());
    if (!row) return points;
    SIMPO_ASSIGN_OR_RETURN(v1::StepReport report, ParseReport(list_.Text(0)));
    points.push_back(std::move(*report.mutable_point()));
  }
}

absl::StatusOr<std::vector<v1::MetricPoint>> MetricStore::PointsSince(int64_t job, int64_t* cursor, int limit) {
  const std::lock_guard lock(database_.reader_mutex());
  since_.Reset().Bind(job).Bind(*cursor).Bind(limit);
  std::vector<v1::MetricPoint> points;
  while (true) {
    SIMPO_ASSIGN_OR_RETURN(const bool row, since_.Step());
    if (!row) return points;
    *cursor = since_.Int(0);
    SIMPO_ASSIGN_OR_RETURN(v1::StepReport report, ParseReport(since_.Text(1)));
    points.push_back(std::move(*report.mutable_point()));
  }
}

absl::StatusOr<std::optional<v1::StepReport>> MetricStore::LastReport(int64_t job, const std::string& split,
                                                                      int attempt) {
  const std::lock_guard lock(database_.reader_mutex());
  SqliteStatement& statement = attempt == 0 ? last_any_ : last_of_;
  statement.Reset().Bind(job).Bind(split);
  if (attempt != 0) statement.Bind(attempt);
  SIMPO_ASSIGN_OR_RETURN(const bool row, statement.Step());
  if (!row) return std::nullopt;
  const std::string bytes = statement.Text(0);
  statement.Reset();
  SIMPO_ASSIGN_OR_RETURN(v1::StepReport report, ParseReport(bytes));
  return report;
}

}  // namespace simpo
