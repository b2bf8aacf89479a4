#include "coordinator/metric_store.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "coordinator/database.h"

namespace simpo {
namespace {

constexpr int kSchemaVersion = 1;
constexpr char kSchema[] = R"(
CREATE TABLE points (
  sequence INTEGER PRIMARY KEY,       -- order in which they came
  job INTEGER NOT NULL,               -- jobs.sequence in coordinator.db
  split TEXT NOT NULL,
  step INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  report BLOB NOT NULL,               -- simpo.v1.StepReport
  UNIQUE (job, split, step, attempt)
);
CREATE INDEX points_of_job ON points (job, sequence);
CREATE TABLE thinned (                -- jobs that were looked at for thinning
  job INTEGER PRIMARY KEY,
  train_every INTEGER NOT NULL,       -- one of so many steps is kept
  eval_every INTEGER NOT NULL,
  time_ms INTEGER NOT NULL,
  done INTEGER NOT NULL
);
)";

constexpr const char* kSplits[] = {"train", "eval"};
// Points are gathered so long, or until there are so many, before they are written at once.
constexpr std::chrono::milliseconds kGroupTime{10};
constexpr size_t kGroupPoints = 2'000;
// Rows of one transaction of a chore.
constexpr int kRowsOfAChore = 500;

absl::StatusOr<v1::StepReport> ParseReport(const std::string& bytes) {
  v1::StepReport report;
  if (report.ParseFromString(bytes)) return report;
  return absl::DataLossError("the database holds a damaged simpo.v1.StepReport; restore it from a copy");
}

// A new file or one of this version; there is no older one.
absl::StatusOr<Sqlite> OpenWriter(const std::filesystem::path& path) {
  SIMPO_ASSIGN_OR_RETURN(Sqlite writer, Sqlite::Open(path, /*read_only=*/false));
  SIMPO_RETURN_IF_ERROR(EnsureSchema(writer, path, kSchemaVersion, kSchema, [](int64_t) { return absl::OkStatus(); }));
  return writer;
}

}  // namespace

int64_t Thinning::Every(int64_t first_step, int64_t last_step, int kept) {
  return std::max<int64_t>(1, (last_step - first_step + kept) / kept);
}

bool Thinning::Keep(int64_t step) {
  const int64_t group = (step - first_) / every_;
  const bool again = previous_step_ == step;
  const bool keep = !again && (previous_group_ != group || step == last_);
  previous_step_ = step;
  previous_group_ = group;
  return keep;
}

absl::Status MetricStore::MakeFile(const std::filesystem::path& path) { return OpenWriter(path).status(); }

absl::StatusOr<std::unique_ptr<MetricStore>> MetricStore::Open(const std::filesystem::path& path) {
  SIMPO_ASSIGN_OR_RETURN(Sqlite writer, OpenWriter(path));
  SIMPO_ASSIGN_OR_RETURN(Sqlite reader, Sqlite::Open(path, /*read_only=*/true));
  auto store = absl::WrapUnique(new MetricStore(std::move(writer), std::move(reader)));
  SIMPO_RETURN_IF_ERROR(store->Prepare());
  store->thread_ = std::thread([store = store.get()] { store->Run(); });
  return store;
}

absl::Status MetricStore::Prepare() {
  const auto prepare = [](Sqlite& db, const char* sql, SqliteStatement* statement) -> absl::Status {
    SIMPO_ASSIGN_OR_RETURN(*statement, db.Prepare(sql));
    return absl::OkStatus();
  };
  const std::pair<const char*, SqliteStatement*> of_writer[] = {
      {"INSERT INTO points (sequence, job, split, step, attempt, report) VALUES (?, ?, ?, ?, ?, ?) "
       "ON CONFLICT DO NOTHING",
       &add_},
      {"DELETE FROM points WHERE sequence IN (SELECT sequence FROM points WHERE job = ? LIMIT ?)", &forget_},
      {"SELECT sequence, step, attempt FROM points WHERE job = ?1 AND split = ?2 AND (step > ?3 OR (step = ?3 AND "
       "attempt < ?4)) ORDER BY step, attempt DESC LIMIT ?5",
       &thin_rows_},
      {"DELETE FROM points WHERE sequence = ?", &drop_},
      {"SELECT min(step), max(step) FROM points WHERE job = ? AND split = ?", &bounds_},
      {"SELECT count(*) FROM (SELECT 1 FROM points WHERE job = ? AND split = ? LIMIT ?)", &many_},
      {"INSERT OR REPLACE INTO thinned (job, train_every, eval_every, time_ms, done) VALUES (?, ?, ?, ?, ?)",
       &put_thinned_},
      {"SELECT train_every, eval_every, time_ms, done FROM thinned WHERE job = ?", &thinned_},
  };
  for (const auto& [sql, statement] : of_writer) SIMPO_RETURN_IF_ERROR(prepare(writer_, sql, statement));
  const std::pair<const char*, SqliteStatement*> of_reader[] = {
      // With max(), SQLite takes the other column from the row that holds the maximum.
      {"SELECT report, max(attempt) FROM points WHERE job = ? AND split = ? AND step > ? GROUP BY step ORDER BY step "
       "LIMIT ?",
       &list_},
      {"SELECT sequence, report FROM points WHERE job = ? AND sequence > ? ORDER BY sequence LIMIT ?", &since_},
      {"SELECT report FROM points WHERE job = ? AND split = ? AND attempt = ? ORDER BY step DESC LIMIT 1", &last_of_},
      {"SELECT report FROM points WHERE job = ? AND split = ? ORDER BY attempt DESC, step DESC LIMIT 1", &last_any_},
      {"SELECT train_every, eval_every, time_ms FROM thinned WHERE job = ?", &find_thinned_},
  };
  for (const auto& [sql, statement] : of_reader) SIMPO_RETURN_IF_ERROR(prepare(reader_, sql, statement));
  SIMPO_ASSIGN_OR_RETURN(SqliteStatement last, reader_.Prepare("SELECT max(sequence) FROM points"));
  SIMPO_RETURN_IF_ERROR(last.Step().status());
  last_sequence_ = stored_sequence_ = announced_sequence_ = last.Int(0);
  return absl::OkStatus();
}

MetricStore::~MetricStore() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

absl::Status MetricStore::Reconcile(int64_t last_job, int64_t last_point) {
  SIMPO_ASSIGN_OR_RETURN(SqliteStatement drop, writer_.Prepare("DELETE FROM points WHERE job > ?"));
  SIMPO_RETURN_IF_ERROR(drop.Reset().Bind(last_job).Run());
  SIMPO_ASSIGN_OR_RETURN(SqliteStatement drop_thinned, writer_.Prepare("DELETE FROM thinned WHERE job > ?"));
  SIMPO_RETURN_IF_ERROR(drop_thinned.Reset().Bind(last_job).Run());
  const std::lock_guard lock(mutex_);
  announced_sequence_ = std::max(announced_sequence_, last_point);
  last_sequence_ = stored_sequence_ = announced_sequence_;
  return absl::OkStatus();
}

void MetricStore::Add(int64_t job, const v1::StepReport& report) {
  const v1::MetricPoint& point = report.point();
  Point handed_over{.sequence = ++last_sequence_,
                    .job = job,
                    .split = point.split(),
                    .step = point.step(),
                    .attempt = point.attempt(),
                    .report = report.SerializeAsString()};
  size_t count = 0;
  {
    const std::lock_guard lock(mutex_);
    waiting_.push_back(std::move(handed_over));
    count = waiting_.size();
  }
  waiting_count_.fetch_add(1, std::memory_order_relaxed);
  if (count == 1 || count == kGroupPoints) wake_.notify_one();
}

void MetricStore::Thin(int64_t job, int64_t now_ms) {
  const std::lock_guard lock(mutex_);
  chores_.push_back({.kind = Chore::Kind::kThin, .job = job, .now_ms = now_ms});
  wake_.notify_one();
}

void MetricStore::Forget(int64_t job) {
  const std::lock_guard lock(mutex_);
  chores_.push_back({.kind = Chore::Kind::kForget, .job = job});
  wake_.notify_one();
}

std::vector<int64_t> MetricStore::TakeForgotten() {
  const std::lock_guard lock(mutex_);
  return std::exchange(forgotten_, {});
}

size_t MetricStore::chores_waiting() const {
  const std::lock_guard lock(mutex_);
  return chores_.size();
}

absl::Status MetricStore::status() const {
  const std::lock_guard lock(mutex_);
  return status_;
}

absl::Status MetricStore::Sync() {
  std::unique_lock lock(mutex_);
  const int64_t wanted = last_sequence_;
  ++syncs_;
  wake_.notify_one();
  stored_.wait(lock, [&] { return announced_sequence_ >= wanted || failed_; });
  --syncs_;
  return status_;
}

void MetricStore::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stop_ || !waiting_.empty() || !chores_.empty(); });
    if (!waiting_.empty()) {
      wake_.wait_for(lock, kGroupTime, [&] { return stop_ || syncs_ > 0 || waiting_.size() >= kGroupPoints; });
    }
    const std::vector<Point> points = std::exchange(waiting_, {});
    if (stop_ && points.empty()) return;
    Chore* chore = chores_.empty() ? nullptr : &chores_.front();
    lock.unlock();

    absl::Status status = points.empty() ? absl::OkStatus() : WritePoints(points);
    if (status.ok() && !points.empty()) {
      stored_sequence_.store(points.back().sequence, std::memory_order_release);
      waiting_count_.fetch_sub(points.size(), std::memory_order_relaxed);
    }
    bool chore_done = false;
    if (status.ok() && chore != nullptr) {
      absl::StatusOr<bool> done = DoChore(*chore);
      status = done.status();
      chore_done = done.ok() && *done;
    }
    if (!status.ok()) {
      const std::lock_guard for_status(mutex_);
      status_ = status;
    }
    if (listener_ && (!points.empty() || !status.ok())) listener_();

    lock.lock();
    failed_ = !status.ok();
    if (!points.empty()) announced_sequence_ = points.back().sequence;
    if (chore_done) {
      if (chore->kind == Chore::Kind::kForget) forgotten_.push_back(chore->job);
      chores_.pop_front();
    }
    stored_.notify_all();
    if (!status.ok()) return;
  }
}

absl::Status MetricStore::WritePoints(const std::vector<Point>& points) {
  SIMPO_RETURN_IF_ERROR(writer_.Execute("BEGIN IMMEDIATE"));
  for (const Point& point : points) {
    add_.Reset().Bind(point.sequence).Bind(point.job).Bind(point.split).Bind(point.step).Bind(point.attempt);
    SIMPO_RETURN_IF_ERROR(add_.BindBlob(point.report).Run());
  }
  return writer_.Execute("COMMIT");
}

absl::StatusOr<bool> MetricStore::DoChore(Chore& chore) {
  return chore.kind == Chore::Kind::kForget ? ForgetSome(chore.job) : ThinSome(chore);
}

absl::StatusOr<bool> MetricStore::ForgetSome(int64_t job) {
  SIMPO_RETURN_IF_ERROR(forget_.Reset().Bind(job).Bind(kRowsOfAChore).Run());
  if (writer_.Changes() > 0) return false;
  SIMPO_RETURN_IF_ERROR(writer_.Execute(absl::StrCat("DELETE FROM thinned WHERE job = ", job)));
  return true;
}

absl::StatusOr<bool> MetricStore::BeginThinning(Chore& chore) {
  thinned_.Reset().Bind(chore.job);
  SIMPO_ASSIGN_OR_RETURN(const bool known, thinned_.Step());
  bool work = false;
  if (known) {  // by an earlier coordinator; perhaps it was not done
    chore.every[0] = thinned_.Int(0);
    chore.every[1] = thinned_.Int(1);
    chore.now_ms = thinned_.Int(2);
    work = thinned_.Int(3) == 0;
    thinned_.Reset();
    return work;
  }
  for (size_t split = 0; split < std::size(kSplits); ++split) {
    many_.Reset().Bind(chore.job).Bind(std::string(kSplits[split])).Bind(kPointsKept + 1);
    SIMPO_RETURN_IF_ERROR(many_.Step().status());
    const bool many = many_.Int(0) > kPointsKept;
    many_.Reset();
    if (!many) continue;
    bounds_.Reset().Bind(chore.job).Bind(std::string(kSplits[split]));
    SIMPO_RETURN_IF_ERROR(bounds_.Step().status());
    chore.every[split] = Thinning::Every(bounds_.Int(0), bounds_.Int(1), kPointsKept);
    bounds_.Reset();
    work |= chore.every[split] > 1;
  }
  put_thinned_.Reset().Bind(chore.job).Bind(chore.every[0]).Bind(chore.every[1]).Bind(chore.now_ms).Bind(work ? 0 : 1);
  SIMPO_RETURN_IF_ERROR(put_thinned_.Run());
  return work;
}

absl::StatusOr<bool> MetricStore::ThinSome(Chore& chore) {
  if (!chore.begun) {
    SIMPO_ASSIGN_OR_RETURN(const bool work, BeginThinning(chore));
    chore.begun = true;
    return !work;
  }
  while (chore.split < std::size(kSplits) && chore.every[chore.split] <= 1) ++chore.split;
  if (chore.split == std::size(kSplits)) {
    put_thinned_.Reset().Bind(chore.job).Bind(chore.every[0]).Bind(chore.every[1]).Bind(chore.now_ms).Bind(1);
    SIMPO_RETURN_IF_ERROR(put_thinned_.Run());
    return true;
  }
  const std::string split = kSplits[chore.split];
  if (!chore.thinning) {
    bounds_.Reset().Bind(chore.job).Bind(split);
    SIMPO_RETURN_IF_ERROR(bounds_.Step().status());
    chore.thinning.emplace(bounds_.Int(0), bounds_.Int(1), chore.every[chore.split]);
    bounds_.Reset();
    chore.after_step = std::numeric_limits<int64_t>::min();
    chore.before_attempt = 0;
  }
  std::vector<int64_t> dropped;
  int rows = 0;
  thin_rows_.Reset().Bind(chore.job).Bind(split).Bind(chore.after_step).Bind(chore.before_attempt).Bind(kRowsOfAChore);
  while (true) {
    SIMPO_ASSIGN_OR_RETURN(const bool row, thin_rows_.Step());
    if (!row) break;
    ++rows;
    chore.after_step = thin_rows_.Int(1);
    chore.before_attempt = static_cast<int32_t>(thin_rows_.Int(2));
    if (!chore.thinning->Keep(chore.after_step)) dropped.push_back(thin_rows_.Int(0));
  }
  SIMPO_RETURN_IF_ERROR(writer_.Execute("BEGIN IMMEDIATE"));
  for (int64_t sequence : dropped) SIMPO_RETURN_IF_ERROR(drop_.Reset().Bind(sequence).Run());
  SIMPO_RETURN_IF_ERROR(writer_.Execute("COMMIT"));
  if (rows < kRowsOfAChore) {
    ++chore.split;
    chore.thinning.reset();
  }
  return false;
}

absl::StatusOr<std::vector<v1::MetricPoint>> MetricStore::ListPoints(int64_t job, const std::string& split,
                                                                     int64_t after_step, int limit) {
  const std::lock_guard lock(reader_mutex_);
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
  const std::lock_guard lock(reader_mutex_);
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
  const std::lock_guard lock(reader_mutex_);
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

absl::StatusOr<std::optional<MetricStore::Thinned>> MetricStore::FindThinned(int64_t job, const std::string& split) {
  const std::lock_guard lock(reader_mutex_);
  find_thinned_.Reset().Bind(job);
  SIMPO_ASSIGN_OR_RETURN(const bool row, find_thinned_.Step());
  if (!row) return std::nullopt;
  const Thinned thinned{.every = find_thinned_.Int(split == kSplits[0] ? 0 : 1), .time_ms = find_thinned_.Int(2)};
  find_thinned_.Reset();
  if (thinned.every <= 1) return std::nullopt;
  return thinned;
}

}  // namespace simpo
