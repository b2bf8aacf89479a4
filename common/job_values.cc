#include "common/job_values.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/job_keys.h"
#include "common/text.h"

namespace simpo {
namespace {

constexpr std::string_view kResources = "resources.";

std::vector<std::string> Split(std::string_view text, const char* separator) {
  return absl::StrSplit(absl::string_view(text.data(), text.size()), separator);
}

}  // namespace

size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row.back();
}

std::optional<double> ToNumber(const std::string& text) {
  double value = 0;
  if (!absl::SimpleAtod(text, &value) || !std::isfinite(value)) return std::nullopt;
  return value;
}

std::optional<bool> ToBool(const std::string& text) {
  const std::string lower = absl::AsciiStrToLower(text);
  if (lower == "true" || lower == "yes" || lower == "on") return true;
  if (lower == "false" || lower == "no" || lower == "off") return false;
  return std::nullopt;
}

std::optional<int64_t> ToDuration(const std::string& text) {
  if (text.empty()) return std::nullopt;
  double unit = 1;
  std::string number = text;
  switch (text.back()) {
    case 's':
      unit = 1;
      break;
    case 'm':
      unit = 60;
      break;
    case 'h':
      unit = 3600;
      break;
    case 'd':
      unit = 86400;
      break;
    default:
      number += 's';
  }
  number.pop_back();
  const std::optional<double> value = ToNumber(number);
  if (!value || *value < 0 || *value * unit > 1e12) return std::nullopt;
  return static_cast<int64_t>(std::llround(*value * unit));
}

std::string NumberText(double value) {
  char text[32];
  const std::to_chars_result result = std::to_chars(text, text + sizeof(text), value);
  return std::string(text, result.ptr);
}

std::optional<std::string> CheckRange(std::string_view range, double value) {
  const std::vector<std::string> words = Split(range, " ");
  bool fits = true;
  if (words.size() == 2 && words[0] == ">") fits = value > *ToNumber(words[1]);
  if (words.size() == 2 && words[0] == ">=") fits = value >= *ToNumber(words[1]);
  if (words.size() == 3) fits = value >= *ToNumber(words[0]) && value <= *ToNumber(words[2]);
  if (words.size() == 4) fits = value >= *ToNumber(words[0]) && value < *ToNumber(words[3]);
  if (fits) return std::nullopt;
  if (words.size() == 3 && words[0] == words[2]) {
    return absl::StrCat("must be ", words[0], " (others are not supported yet), not ", NumberText(value));
  }
  return absl::StrCat("must be ", std::string(range), ", not ", NumberText(value));
}

std::optional<std::string> CheckChoice(std::string_view range, const std::string& value) {
  if (range.empty()) return std::nullopt;
  const std::vector<std::string> choices = Split(range, " | ");
  if (std::find(choices.begin(), choices.end(), value) != choices.end()) return std::nullopt;
  const std::string expected = choices.size() == 1 ? choices[0] + " (others are not supported yet)"
                                                   : absl::StrCat("one of ", std::string(range));
  return absl::StrCat("must be ", expected, ", not '", OneLine(value, 80), "'");
}

std::string NearestKey(std::string_view key) {
  std::string best;
  size_t best_distance = std::max<size_t>(2, key.size() / 3) + 1;
  auto consider = [&](std::string_view candidate) {
    // A key that was cut short is near, however much of it is missing.
    const bool is_beginning = candidate.starts_with(key) && key.size() >= 4 && key != kResources;
    const size_t distance = is_beginning ? 2 : EditDistance(key, candidate);
    if (distance >= best_distance) return;
    best_distance = distance;
    best = candidate;
  };
  if (key.size() > 100) return "";  // no slip of the finger
  for (const JobKeyRow& row : JobKeyRows()) {
    const std::string_view name = row.key.name;
    consider(name);
    if (name.starts_with(kResources) && key == name.substr(kResources.size())) return std::string(name);
  }
  for (const JobKeyAlias& alias : JobKeyAliases()) consider(alias.alias);
  for (const ConvertedJobKey& converted : ConvertedJobKeys()) consider(converted.name);
  return best;
}

}  // namespace simpo
