#ifndef SIMPO_COORDINATOR_METRIC_STORE_H_
#define SIMPO_COORDINATOR_METRIC_STORE_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/sqlite.h"
#include "simpo/v1/worker_service.pb.h"

namespace simpo {

// Which points of a split stay when it is thinned: its first and last step, and of each `every` steps the
// first. Pure; the same again after a crash in the middle, since the first and the last are never dropped.
class Thinning {
 public:
  // So many at most that about `kept` points stay.
  static int64_t Every(int64_t first_step, int64_t last_step, int kept);

  Thinning(int64_t first_step, int64_t last_step, int64_t every)
      : first_(first_step), last_(last_step), every_(every) {}
  // For each point, in order of steps; of one step the one that is to stay comes first.
  bool Keep(int64_t step);

 private:
  int64_t first_, last_, every_;
  std::optional<int64_t> previous_step_, previous_group_;
};

// Every metric point of every job, in a database file of their own. The key is (job, split, step, attempt);
// a point that comes again after an outage changes nothing.
//
// Points are handed over and written by a thread of the store's own, in groups, each committed and synced
// once: so whoever decides about jobs never waits for them. What must wait for points waits until
// stored_sequence() has come to theirs. The same thread thins and forgets, a little between two groups.
// Reads see what is committed and are thread-safe.
class MetricStore {
 public:
  static absl::StatusOr<std::unique_ptr<MetricStore>> Open(const std::filesystem::path& path);
  // Only the file and its tables, where they are missing.
  static absl::Status MakeFile(const std::filesystem::path& path);
  // Writes what has been handed over.
  ~MetricStore();

  // `listener` is called by the store's thread when stored_sequence() has grown or status() has changed; it must
  // not block. Set before the first Add.
  void SetListener(std::function<void()> listener) { listener_ = std::move(listener); }

  // --- for the controller's thread alone
  // Before the first Add: what the jobs' database knows. Points of later jobs, as after it was restored from an
  // older copy, are dropped; numbers up to `last_point` are not given again.
  absl::Status Reconcile(int64_t last_job, int64_t last_point);
  void Add(int64_t job, const v1::StepReport& report);
  // The number of the point that was handed over last; grows with every one.
  int64_t last_sequence() const { return last_sequence_.load(std::memory_order_relaxed); }
  // Thins a job's splits, unless they have been: of more than kPointsKept points about so many stay.
  void Thin(int64_t job, int64_t now_ms);
  // Removes all of a job; then TakeForgotten names it.
  void Forget(int64_t job);
  std::vector<int64_t> TakeForgotten();
  // Jobs that wait to be thinned or forgotten.
  size_t chores_waiting() const;

  // --- for any thread
  // All points up to this number are durable.
  int64_t stored_sequence() const { return stored_sequence_.load(std::memory_order_acquire); }
  // So many points wait to be written that no more should be asked for.
  bool IsBehind() const { return waiting_count_.load(std::memory_order_relaxed) > kManyPoints; }
  // An error means that points can no longer be written.
  absl::Status status() const;
  // Waits until all that was handed over is stored.
  absl::Status Sync();

  // Points in step order with a greater step than `after_step`, of each step the latest attempt's.
  absl::StatusOr<std::vector<v1::MetricPoint>> ListPoints(int64_t job, const std::string& split, int64_t after_step,
                                                          int limit);
  // Points in the order in which they came, after `*cursor`, which moves on to the last one.
  absl::StatusOr<std::vector<v1::MetricPoint>> PointsSince(int64_t job, int64_t* cursor, int limit);
  // The newest report of a split, of one attempt or (0) of the latest that has any.
  absl::StatusOr<std::optional<v1::StepReport>> LastReport(int64_t job, const std::string& split, int attempt);
  struct Thinned {
    int64_t every = 1;    // one of so many steps is kept
    int64_t time_ms = 0;  // since when, Unix time
  };
  // Nothing: all points are there.
  absl::StatusOr<std::optional<Thinned>> FindThinned(int64_t job, const std::string& split);

  static constexpr int kPointsKept = 1000;  // of a split that was thinned

 private:
  static constexpr size_t kManyPoints = 50'000;

  struct Point {
    int64_t sequence = 0;
    int64_t job = 0;
    std::string split;
    int64_t step = 0;
    int attempt = 0;
    std::string report;
  };
  // Something to do for a job between groups of points.
  struct Chore {
    enum class Kind { kThin, kForget };
    Kind kind = Kind::kThin;
    int64_t job = 0;
    int64_t now_ms = 0;
    // How far thinning is.
    bool begun = false;
    size_t split = 0;
    int64_t every[2] = {1, 1};
    std::optional<Thinning> thinning;
    int64_t after_step = -1;
    int32_t before_attempt = 0;
  };

  MetricStore(Sqlite writer, Sqlite reader) : writer_(std::move(writer)), reader_(std::move(reader)) {}
  absl::Status Prepare();
  void Run();
  absl::Status WritePoints(const std::vector<Point>& points);
  // A bounded part of it; true when it is done.
  absl::StatusOr<bool> DoChore(Chore& chore);
  absl::StatusOr<bool> ForgetSome(int64_t job);
  absl::StatusOr<bool> ThinSome(Chore& chore);
  absl::StatusOr<bool> BeginThinning(Chore& chore);  // false: there is nothing to thin

  Sqlite writer_;  // of thread_ once it runs
  Sqlite reader_;
  std::mutex reader_mutex_;
  SqliteStatement add_, forget_, thin_rows_, drop_, bounds_, many_, put_thinned_, thinned_;  // of the writer
  SqliteStatement list_, since_, last_of_, last_any_, find_thinned_;                         // of the reader

  std::function<void()> listener_;
  std::atomic<int64_t> last_sequence_ = 0;
  std::atomic<int64_t> stored_sequence_ = 0;
  std::atomic<size_t> waiting_count_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable wake_;    // of thread_
  std::condition_variable stored_;  // of those in Sync
  std::vector<Point> waiting_;      // guarded by mutex_
  std::deque<Chore> chores_;        // guarded by mutex_; the first belongs to thread_
  std::vector<int64_t> forgotten_;  // guarded by mutex_
  int64_t announced_sequence_ = 0;  // guarded by mutex_; the listener has been told of it
  int syncs_ = 0;                   // guarded by mutex_; callers in Sync
  absl::Status status_;             // guarded by mutex_
  bool failed_ = false;             // guarded by mutex_; the listener has been told of status_
  bool stop_ = false;               // guarded by mutex_
  std::thread thread_;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_METRIC_STORE_H_
