#ifndef SIMPO_SIMPOCTL_PROGRESS_H_
#define SIMPO_SIMPOCTL_PROGRESS_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "simpo/v1/training_service.pb.h"
#include "simpoctl/terminal.h"

namespace simpo {

// The curves of a job, by step; a later point of a step wins (the job was resumed before it).
struct ProgressHistory {
  std::map<int64_t, double> loss;
  std::map<int64_t, double> margin;

  void Add(const v1::MetricPoint& point);
};

// "[#####-----]" with `width` places between the brackets.
std::string ProgressBar(int64_t done, int64_t planned, int width, bool utf8);
// One line of eight heights (of '.', ':' and '#' without UTF-8), values averaged into at most `width` columns.
std::string Sparkline(const std::vector<double>& values, int width, bool utf8);
// Columns over `rows` lines, labelled with the largest and the smallest value; at most `width` wide.
// Nothing for fewer than two finite values.
std::vector<std::string> Chart(const std::vector<double>& values, int width, int rows, bool utf8);

// The live display: state, bar, rates, metrics and curves; no line is wider than the terminal.
std::vector<std::string> ProgressBlock(const v1::Job& job, const ProgressHistory& history, const TerminalLook& look);
// The same as one line, for files and pipes.
std::string ProgressLine(const v1::Job& job);
// An event as one line.
std::string EventLine(const v1::JobEvent& event);

// Shows a job that is being watched: on a terminal a block that redraws itself with events above it;
// elsewhere a plain line per event and for every few steps, without control codes.
class JobDisplay {
 public:
  JobDisplay(std::function<TerminalLook()> look, std::function<void(std::string_view)> write)
      : look_(std::move(look)), write_(std::move(write)) {}

  void Update(const v1::WatchJobResponse& response);
  // A line of somebody else's, among the events.
  void Say(std::string_view text);
  // Brings the last state to the screen.
  void Finish();

 private:
  void UpdatePlain(const v1::WatchJobResponse& response);
  void Draw(const std::string& above);

  std::function<TerminalLook()> look_;
  std::function<void(std::string_view)> write_;
  ProgressHistory history_;
  v1::Job job_;
  bool first_ = true;
  bool stale_ = false;          // the screen lacks the last update
  std::string pending_events_;  // not yet written above the block
  int drawn_lines_ = 0;         // of the block that is on the screen
  std::chrono::steady_clock::time_point drawn_at_;
  int64_t last_line_step_ = -1;  // plain lines
  std::string last_state_;
};

}  // namespace simpo

#endif  // SIMPO_SIMPOCTL_PROGRESS_H_
