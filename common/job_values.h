#ifndef SIMPO_COMMON_JOB_VALUES_H_
#define SIMPO_COMMON_JOB_VALUES_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace simpo {

// How single values of a job file are written and read. Pure functions.

// A finite number. "5e-7" without a dot is one here, though YAML 1.1 calls it a string.
std::optional<double> ToNumber(const std::string& text);
// true, yes, on and their opposites, in any case.
std::optional<bool> ToBool(const std::string& text);
// "90", "90s", "15m", "2h", "1d" in seconds.
std::optional<int64_t> ToDuration(const std::string& text);
// The shortest text that reads back as the same number.
std::string NumberText(double value);

// Whether `value` lies in a range of the table of keys (see JobKeyRow); if not, what is wrong.
std::optional<std::string> CheckRange(std::string_view range, double value);
// The same for a word and a range of choices.
std::optional<std::string> CheckChoice(std::string_view range, const std::string& value);

// Letters to insert, remove or replace until one is the other (Levenshtein).
size_t EditDistance(std::string_view a, std::string_view b);

// The known key that is spelled most like this one; empty when none is near.
std::string NearestKey(std::string_view key);

}  // namespace simpo

#endif  // SIMPO_COMMON_JOB_VALUES_H_
