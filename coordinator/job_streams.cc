#include "coordinator/job_streams.h"

#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/status_macros.h"
#include "coordinator/job_state.h"
#include "coordinator/launcher.h"
#include "coordinator/log_reader.h"
#include "coordinator/rpc_errors.h"

namespace simpo {
namespace {

constexpr int kEventsOfAResponse = 200;
constexpr int kPointsOfAResponse = 500;

struct LogCursor {
  int attempt = 0;
  int64_t offset = 0;
};

// "<attempt>:<byte offset>"
std::optional<LogCursor> ParseCursor(const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, ':');
  LogCursor cursor;
  const bool numbers =
      parts.size() == 2 && absl::SimpleAtoi(parts[0], &cursor.attempt) && absl::SimpleAtoi(parts[1], &cursor.offset);
  if (!numbers || cursor.attempt < 1 || cursor.offset < 0) return std::nullopt;
  return cursor;
}

absl::Status JobRemoved(const std::string& id) {
  return absl::NotFoundError(absl::StrCat("job ", id, " has been removed; it ended long ago (history_days)"));
}

}  // namespace

bool WatchStream::Next(v1::WatchJobResponse* response, std::optional<absl::Status>* end) {
  const JobViews::View view = views_.FindById(job_id_);
  if (!view) {
    *end = JobRemoved(job_id_);
    return false;
  }
  if (version_ == view->version && !more_) {
    if (IsFinal(view->job.state())) *end = absl::OkStatus();
    return false;
  }
  if (const absl::Status status = Fill(*view, response); !status.ok()) {
    *end = status;
    return false;
  }
  version_ = view->version;
  return true;
}

absl::Status WatchStream::Fill(const JobView& view, v1::WatchJobResponse* response) {
  if (!last_point_) {
    SIMPO_ASSIGN_OR_RETURN(last_point_, jobs_.LastPointBefore(view.sequence, last_event_));
  }
  SIMPO_ASSIGN_OR_RETURN(std::vector<v1::JobEvent> events,
                         jobs_.EventsAfter(view.sequence, last_event_, kEventsOfAResponse));
  SIMPO_ASSIGN_OR_RETURN(std::vector<v1::MetricPoint> points,
                         metrics_.PointsSince(view.sequence, &*last_point_, kPointsOfAResponse));
  more_ = events.size() == kEventsOfAResponse || points.size() == kPointsOfAResponse;
  // An event is a cursor from which a client goes on: it must have all points that were stored before it.
  if (points.size() == kPointsOfAResponse) events.clear();
  if (!events.empty()) last_event_ = events.back().sequence();
  *response->mutable_job() = view.job;
  for (v1::JobEvent& event : events) response->add_events()->Swap(&event);
  for (v1::MetricPoint& point : points) response->add_points()->Swap(&point);
  return absl::OkStatus();
}

absl::Status LogStream::Check(const v1::StreamLogsRequest& request, const JobView& view) {
  const int attempts = static_cast<int>(view.attempts.size());
  std::vector<FieldViolation> violations;
  if (request.attempt() < 0 || request.attempt() > attempts) {
    violations.push_back(
        {"attempt", 0,
         absl::StrCat("job ", view.job.id(), " has no attempt ", request.attempt(), "; it has had ", attempts)});
  }
  if (request.rank() < -1 || request.rank() >= view.job.ranks()) {
    violations.push_back({"rank", 0,
                          absl::StrCat("job ", view.job.id(), " has no rank ", request.rank(), "; its ranks are 0 to ",
                                       view.job.ranks() - 1, ", and -1 is the launcher")});
  }
  if (request.tail_lines() < 0) violations.push_back({"tail_lines", 0, "it is negative"});
  if (!request.cursor().empty()) {
    const std::optional<LogCursor> cursor = ParseCursor(request.cursor());
    if (!cursor || cursor->attempt > attempts) {
      violations.push_back({"cursor", 0, absl::StrCat("'", request.cursor(), "' is no cursor of this job's logs")});
    }
  }
  return violations.empty() ? absl::OkStatus() : BadFieldsError(violations);
}

LogStream::LogStream(StreamPump& pump, const JobViews& views, std::string job_id, const v1::StreamLogsRequest& request)
    : FedStream(pump),
      views_(views),
      job_id_(std::move(job_id)),
      rank_(request.rank()),
      follow_(request.follow()),
      all_attempts_(request.attempt() == 0),
      tail_lines_(request.tail_lines()),
      attempt_(request.attempt()) {
  if (const std::optional<LogCursor> cursor = ParseCursor(request.cursor())) {
    attempt_ = cursor->attempt;
    offset_ = cursor->offset;
    tail_lines_ = 0;
    found_ = true;
  }
}

std::filesystem::path LogStream::LogFile(const v1::Attempt& attempt) const {
  const std::filesystem::path dir = attempt.log_dir();
  return rank_ < 0 ? dir / kLauncherLog : dir / absl::StrCat("rank-", rank_, ".log");
}

absl::Status LogStream::NoLog(const JobView& view) const {
  if (view.attempts.empty()) {
    return absl::FailedPreconditionError(absl::StrCat("job ", view.job.id(), " has no logs yet; it is ",
                                                      JobStateName(view.job.state()), ": ", view.job.reason()));
  }
  return absl::FailedPreconditionError(
      absl::StrCat("job ", view.job.id(), ", attempt ", attempt_, " has no log of rank ", rank_,
                   ": its ranks did not begin; rank -1 is the log of the launcher and of the checks before"));
}

bool LogStream::Next(v1::StreamLogsResponse* response, std::optional<absl::Status>* end) {
  const JobViews::View view = views_.FindById(job_id_);
  if (!view) {
    *end = JobRemoved(job_id_);
    return false;
  }
  if (view->attempts.empty()) {
    if (!follow_ || IsFinal(view->job.state())) *end = NoLog(*view);
    return false;
  }
  if (attempt_ == 0) attempt_ = static_cast<int>(view->attempts.size());
  const v1::Attempt& attempt = view->attempts[static_cast<size_t>(attempt_ - 1)];
  const std::filesystem::path file = LogFile(attempt);
  if (const int64_t lines = std::exchange(tail_lines_, 0); lines > 0) offset_ = TailOffset(file, lines);
  // Asked before the file is read: what an ended attempt has written is all there.
  const bool ended = attempt.has_end_time();
  const std::optional<std::string> lines = ReadLines(file, ended, &offset_);
  found_ |= lines.has_value();
  if (!lines || lines->empty()) return AtEnd(*view, ended, end);
  response->set_attempt(attempt_);
  response->set_rank(rank_);
  response->set_data(*lines);
  response->set_cursor(absl::StrCat(attempt_, ":", offset_));
  return true;
}

bool LogStream::AtEnd(const JobView& view, bool attempt_ended, std::optional<absl::Status>* end) {
  if (follow_ && !attempt_ended) return false;
  if (follow_ && all_attempts_) {
    if (attempt_ < static_cast<int>(view.attempts.size())) {
      ++attempt_;
      offset_ = 0;
      return false;
    }
    if (!IsFinal(view.job.state())) return false;
  }
  *end = found_ ? absl::OkStatus() : NoLog(view);
  return false;
}

}  // namespace simpo
