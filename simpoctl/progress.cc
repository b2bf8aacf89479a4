#include "simpoctl/progress.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/text.h"
#include "simpoctl/format.h"

namespace simpo {
namespace {

constexpr int kEventsAtFirst = 10;  // of a job that has a long past
constexpr int kPlainLines = 20;     // progress lines of a whole run
constexpr std::chrono::milliseconds kRedrawEvery{100};
constexpr int kChartLabelWidth = 10;

constexpr const char* kEighths[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
constexpr const char* kAsciiEighths[] = {" ", ".", ".", ".", ":", ":", "|", "|", "#"};

std::string Eighth(int height, bool utf8) {
  const int index = std::clamp(height, 0, 8);
  return utf8 ? kEighths[index] : kAsciiEighths[index];
}

// The finite values, averaged into at most `columns`.
std::vector<double> Resample(const std::vector<double>& values, int columns) {
  std::vector<double> finite;
  std::copy_if(values.begin(), values.end(), std::back_inserter(finite), [](double v) { return std::isfinite(v); });
  if (columns <= 0) return {};
  const size_t count = std::min(finite.size(), static_cast<size_t>(columns));
  std::vector<double> result;
  for (size_t i = 0; i < count; ++i) {
    const size_t begin = i * finite.size() / count;
    const size_t end = (i + 1) * finite.size() / count;
    double mean = 0;
    // Divided first: a sum of large values must not overflow.
    for (size_t j = begin; j < end; ++j) mean += finite[j] / static_cast<double>(end - begin);
    result.push_back(mean);
  }
  return result;
}

// 0 to 1; one half when all values are equal.
double Relative(double value, double low, double high) {
  const double span = high / 2 - low / 2;
  return span > 0 ? std::clamp((value / 2 - low / 2) / span, 0.0, 1.0) : 0.5;
}

std::vector<double> Values(const std::map<int64_t, double>& curve) {
  std::vector<double> values;
  for (const auto& [step, value] : curve) values.push_back(value);
  return values;
}

std::string Rates(const v1::JobProgress& progress) {
  std::string text;
  if (progress.step_seconds() > 0) absl::StrAppend(&text, FormatDuration(progress.step_seconds()), " a step  ");
  if (progress.tokens_per_second() > 0) {
    absl::StrAppend(&text, absl::StrFormat("%.0f", progress.tokens_per_second()), " tokens/s  ");
  }
  if (progress.eta_seconds() > 0) absl::StrAppend(&text, "ETA ", FormatDuration(progress.eta_seconds()));
  return text;
}

std::string Heading(const v1::Job& job, const TerminalLook& look) {
  const std::string state = StateName(job.state());
  const std::string before = absl::StrCat(Clip(OneLine(job.name()), 40), "  ");
  std::string after =
      job.state() == v1::JOB_STATE_RUNNING ? "  " + OneLine(job.progress().phase()) : "  " + OneLine(job.reason());
  if (job.attempt() > 1) after = absl::StrCat("  attempt ", job.attempt(), after);
  if (DisplayWidth(before) + DisplayWidth(state) > look.width) return Clip(before + state, look.width);
  const int left = look.width - DisplayWidth(before) - DisplayWidth(state);
  return Colored(before, Color::kBold, look) + Colored(state, StateColor(job.state()), look) + Clip(after, left);
}

}  // namespace

void ProgressHistory::Add(const v1::MetricPoint& point) {
  if (point.split() == "eval") return;
  if (const double* value = FindMetric(point.values(), "loss")) loss[point.step()] = *value;
  if (const double* value = FindMetric(point.values(), "rewards/margins")) margin[point.step()] = *value;
}

std::string ProgressBar(int64_t done, int64_t planned, int width, bool utf8) {
  const double share = planned > 0 ? std::clamp(static_cast<double>(done) / static_cast<double>(planned), 0.0, 1.0) : 0;
  const int filled = static_cast<int>(share * width);
  std::string bar = "[";
  for (int i = 0; i < width; ++i) bar += i < filled ? (utf8 ? "█" : "#") : (utf8 ? "░" : "-");
  return bar + "]";
}

std::string Sparkline(const std::vector<double>& values, int width, bool utf8) {
  const std::vector<double> columns = Resample(values, width);
  if (columns.empty()) return "";
  const auto [low, high] = std::minmax_element(columns.begin(), columns.end());
  std::string line;
  for (const double value : columns) line += Eighth(1 + static_cast<int>(7 * Relative(value, *low, *high)), utf8);
  return line;
}

std::vector<std::string> Chart(const std::vector<double>& values, int width, int rows, bool utf8) {
  const std::vector<double> columns = Resample(values, width - kChartLabelWidth - 2);
  if (columns.size() < 2 || rows < 1) return {};
  const auto [low, high] = std::minmax_element(columns.begin(), columns.end());
  std::vector<std::string> lines;
  for (int row = rows - 1; row >= 0; --row) {
    const bool labelled = row == rows - 1 || row == 0;
    const std::string label = labelled ? ShortNumber(row == 0 ? *low : *high) : "";
    std::string line = absl::StrFormat("%*s ", kChartLabelWidth, label) + (utf8 ? "│" : "|");
    for (const double value : columns) {
      const int eighths = 1 + static_cast<int>((8 * rows - 1) * Relative(value, *low, *high));
      line += Eighth(eighths - 8 * row, utf8);
    }
    lines.push_back(line);
  }
  return lines;
}

std::vector<std::string> ProgressBlock(const v1::Job& job, const ProgressHistory& history, const TerminalLook& look) {
  const v1::JobProgress& progress = job.progress();
  const int width = std::max(20, look.width - 1);  // a full line would wrap on some terminals
  TerminalLook inner = look;
  inner.width = width;
  std::vector<std::string> lines = {Heading(job, inner)};
  auto add = [&](const std::string& line) {
    if (!line.empty()) lines.push_back(Clip(line, width));
  };
  if (progress.steps_planned() > 0) {
    const int percent =
        static_cast<int>(100 * std::min(progress.step(), progress.steps_planned()) / progress.steps_planned());
    add(absl::StrFormat(
        "%s %3d %%  %d/%d  epoch %s",
        ProgressBar(progress.step(), progress.steps_planned(), std::clamp(width - 40, 10, 40), look.utf8), percent,
        progress.step(), progress.steps_planned(), ShortNumber(progress.epoch())));
    add(Rates(progress));
  }
  add(MetricSummary(progress.metrics(), ""));
  if (!progress.eval_metrics().empty()) add("evaluation  " + MetricSummary(progress.eval_metrics(), "eval_"));
  const int chart_width = std::min(width, 72);
  if (look.height >= 18) {
    const std::vector<std::string> chart = Chart(Values(history.margin), chart_width, 5, look.utf8);
    if (!chart.empty()) add("    margin");
    for (const std::string& line : chart) add(line);
  }
  if (history.loss.size() > 1) {
    add(absl::StrFormat("%*s  ", kChartLabelWidth, "loss") +
        Sparkline(Values(history.loss), chart_width - kChartLabelWidth - 2, look.utf8));
  }
  return lines;
}

std::string ProgressLine(const v1::Job& job) {
  const v1::JobProgress& progress = job.progress();
  std::string line =
      absl::StrFormat("step %d/%d  epoch %s", progress.step(), progress.steps_planned(), ShortNumber(progress.epoch()));
  const std::string metrics = MetricSummary(progress.metrics(), "");
  if (!metrics.empty()) absl::StrAppend(&line, "  ", metrics);
  const std::string rates = Rates(progress);
  if (!rates.empty()) absl::StrAppend(&line, "  ", rates);
  while (!line.empty() && line.back() == ' ') line.pop_back();
  return line;
}

std::string EventLine(const v1::JobEvent& event) {
  const std::string time = ShortTime(event.time());
  // The day is said by describe; here the time of day is enough.
  const size_t space = time.find(' ');
  const bool says_more = !event.message().empty() && event.message() != event.type();
  return absl::StrCat(space == std::string::npos ? time : time.substr(space + 1), "  ", OneLine(event.type()),
                      says_more ? ": " + OneLine(event.message()) : "");
}

void JobDisplay::Update(const v1::WatchJobResponse& response) {
  for (const v1::MetricPoint& point : response.points()) history_.Add(point);
  job_ = response.job();
  const TerminalLook look = look_();
  if (!look.is_terminal) {
    UpdatePlain(response);
    first_ = false;
    return;
  }
  const int skipped = first_ ? std::max(0, response.events_size() - kEventsAtFirst) : 0;
  for (int i = skipped; i < response.events_size(); ++i) {
    absl::StrAppend(&pending_events_, Clip(EventLine(response.events(i)), std::max(20, look.width - 1)), "\n");
  }
  const auto now = std::chrono::steady_clock::now();
  stale_ = true;
  if (!first_ && pending_events_.empty() && now - drawn_at_ < kRedrawEvery) return;
  first_ = false;
  drawn_at_ = now;
  Draw(std::exchange(pending_events_, ""));
}

void JobDisplay::UpdatePlain(const v1::WatchJobResponse& response) {
  std::string text;
  const int skipped = first_ ? std::max(0, response.events_size() - kEventsAtFirst) : 0;
  for (int i = skipped; i < response.events_size(); ++i) absl::StrAppend(&text, EventLine(response.events(i)), "\n");
  // The reason changes without an event while a job waits.
  const std::string state = absl::StrCat(StateName(job_.state()), ": ", OneLine(job_.reason()));
  if (response.events_size() == 0 && state != last_state_) absl::StrAppend(&text, state, "\n");
  last_state_ = state;
  const v1::JobProgress& progress = job_.progress();
  const int64_t every = std::max<int64_t>(1, progress.steps_planned() / kPlainLines);
  const bool restarted = progress.step() < last_line_step_;
  const bool last = progress.step() == progress.steps_planned() && progress.step() != last_line_step_;
  if (progress.step() > 0 && (last_line_step_ < 0 || restarted || last || progress.step() >= last_line_step_ + every)) {
    absl::StrAppend(&text, ProgressLine(job_), "\n");
    last_line_step_ = progress.step();
  }
  if (!text.empty()) write_(text);
}

void JobDisplay::Draw(const std::string& above) {
  std::string text;
  // To the first line of the old block, then clear to the end of the screen.
  if (drawn_lines_ > 0) absl::StrAppend(&text, "\x1b[", drawn_lines_, "A");
  absl::StrAppend(&text, "\r\x1b[J", above);
  const std::vector<std::string> lines = ProgressBlock(job_, history_, look_());
  for (const std::string& line : lines) absl::StrAppend(&text, line, "\n");
  drawn_lines_ = static_cast<int>(lines.size());
  stale_ = false;
  write_(text);
}

void JobDisplay::Say(std::string_view text) {
  const TerminalLook look = look_();
  if (first_ || !look.is_terminal) return write_(text);
  Draw(std::exchange(pending_events_, "") + std::string(text));
}

void JobDisplay::Finish() {
  if (stale_) Draw(std::exchange(pending_events_, ""));
  drawn_lines_ = 0;
}

}  // namespace simpo
