// Job files as people, editors and other programs get them wrong, and what must hold of the answer to any of them.
// Shared by the unit test, the fuzzer and the program that tries a million.
#ifndef SIMPO_TESTS_COMMON_JOB_MUTATION_H_
#define SIMPO_TESTS_COMMON_JOB_MUTATION_H_

#include <time.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/job_config_yaml.h"
#include "common/job_keys.h"
#include "common/text.h"

namespace simpo {

// A job file and its --set.
struct MutatedJob {
  std::string yaml;
  std::vector<std::string> overrides;
};

class JobMutator {
 public:
  explicit JobMutator(uint64_t seed) : random_(seed) {
    for (const JobKeyRow& row : JobKeyRows()) keys_.push_back(LastPart(row.key.name));
    for (const JobKeyAlias& row : JobKeyAliases()) keys_.emplace_back(row.alias);
    for (const ConvertedJobKey& row : ConvertedJobKeys()) keys_.emplace_back(row.name);
    for (const IgnoredJobKey& row : IgnoredJobKeys()) keys_.emplace_back(row.name);
    for (const RefusedJobKey& row : RefusedJobKeys()) keys_.emplace_back(row.name);
  }

  MutatedJob Mutate(const std::string& file) {
    Lines lines = absl::StrSplit(file, '\n');
    const size_t changes = 1 + Below(3) * Below(3);
    for (size_t i = 0; i < changes; ++i) MutateLines(lines);
    MutatedJob job{.yaml = absl::StrJoin(lines, "\n")};
    if (Below(3) == 0) MutateBytes(job.yaml);
    if (Below(6) == 0) {
      for (size_t i = 0, count = 1 + Below(3); i < count; ++i) job.overrides.push_back(Override());
    }
    return job;
  }

 private:
  using Lines = std::vector<std::string>;

  size_t Below(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random_); }
  template <typename Range>
  auto& Any(Range& range) {
    return range[Below(std::size(range))];
  }
  static std::string LastPart(std::string_view key) {
    const size_t dot = key.rfind('.');
    return std::string(dot == std::string_view::npos ? key : key.substr(dot + 1));
  }
  static std::string Repeated(std::string_view piece, size_t times) {
    std::string text;
    for (size_t i = 0; i < times; ++i) text += piece;
    return text;
  }

  // The line as its indent and key, its colon, and its value.
  struct Parts {
    std::string key, value;
  };
  static bool Split(const std::string& line, Parts* parts) {
    const size_t colon = line.find(": ");
    const size_t end = colon == std::string::npos && absl::EndsWith(line, ":") ? line.size() - 1 : colon;
    if (end == std::string::npos || line.find('#') < end) return false;
    parts->key = line.substr(0, end);
    parts->value = end + 1 < line.size() ? line.substr(end + 2) : "";
    return true;
  }

  std::string Number() {
    static constexpr const char* kNumbers[] = {"0",
                                               "-1",
                                               "1",
                                               "-0",
                                               "0.5",
                                               "1e999",
                                               "-1e999",
                                               "1e-400",
                                               ".nan",
                                               ".inf",
                                               "-.Inf",
                                               "NaN",
                                               "0x10",
                                               "0o17",
                                               "017",
                                               "1_000",
                                               "1,5",
                                               "12:30:45",
                                               "2147483647",
                                               "2147483648",
                                               "-2147483649",
                                               "9007199254740993",
                                               "9223372036854775807",
                                               "9223372036854775808",
                                               "18446744073709551616",
                                               "1e-7",
                                               "5E-7",
                                               "+3",
                                               "1.",
                                               ".5",
                                               "1e",
                                               "0.30000000000000004",
                                               "4.9e-324",
                                               "1.7976931348623157e308"};
    switch (Below(6)) {
      case 0:
        return std::to_string(static_cast<int64_t>(random_()));
      case 1:
        return Repeated("9", 1 + Below(400));
      default:
        return Any(kNumbers);
    }
  }
  std::string Word() {
    static constexpr const char* kWords[] = {"true",
                                             "False",
                                             "yes",
                                             "off",
                                             "~",
                                             "null",
                                             "none",
                                             "auto",
                                             "bfloat16",
                                             "sigmoid",
                                             "simpo",
                                             "steps",
                                             "epoch",
                                             "no",
                                             "cosine",
                                             "cpu",
                                             "2h",
                                             "-1d",
                                             "owner/name",
                                             "owner/name@main",
                                             "./data/*.jsonl",
                                             "../../..",
                                             "~/x",
                                             "~",
                                             "/",
                                             "//",
                                             ".",
                                             "2024-01-01",
                                             "\"",
                                             "'",
                                             "\"\"",
                                             "''",
                                             "\"unclosed",
                                             "'it''s'",
                                             "\"\\x00\"",
                                             "\"\\u0085\\u2028\"",
                                             "\"\\ud83d\\ude00\"",
                                             "\"\\q\"",
                                             "\"a\\nb\"",
                                             "@x",
                                             "`x`",
                                             "%x",
                                             "!!int x",
                                             "!!binary aGk=",
                                             "!x y",
                                             "|\n    two\n    lines",
                                             ">-\n    folded\n    lines",
                                             "|9\n x",
                                             "? x",
                                             "- x",
                                             "a: b",
                                             "a: b: c",
                                             "#x",
                                             "x #y",
                                             "[",
                                             "]",
                                             "{",
                                             "}",
                                             "[a, b",
                                             "{a: b",
                                             "[]",
                                             "{}",
                                             "[1, 2]",
                                             "{a: 1}",
                                             "{a: 1, a: 2}",
                                             "[[a], {b: c}]",
                                             "[{id: o/d, weight: 0.5, split: train}]",
                                             "{datasets: [{path: x}], seed: 1}",
                                             "{1: 2, [a]: b}",
                                             "&a x",
                                             "*a",
                                             "&a [*a]",
                                             "&a {b: *a}",
                                             "*b",
                                             "{<<: *a}",
                                             "{% for m in messages %}{{ m }}{% endfor %}"};
    return Any(kWords);
  }
  std::string Odd() {
    static constexpr const char* kOdd[] = {"\xef\xbb\xbf",      // a byte order mark
                                           "\xc2\xa0",          // a space that does not break
                                           "\xc2\x85",          // next line
                                           "\xe2\x80\xa8",      // line separator
                                           "\xe2\x80\x8b",      // a space without width
                                           "\xe2\x80\xae",      // right to left
                                           "\xe2\x80\x9c",      // a typographer's quote
                                           "\xef\xbc\x9a",      // a colon of full width
                                           "\xf0\x9f\x98\x80",  // beyond the basic plane
                                           "e\xcc\x81",         // a combining accent
                                           "\xd0\xb5",          // looks like e
                                           "\xe4\xb8\xad\xe6\x96\x87",
                                           "\xff",
                                           "\xc3",
                                           "\xed\xa0\x80",
                                           "\x01",
                                           "\x7f",
                                           "\t",
                                           "\r",
                                           "\b"};
    return Any(kOdd);
  }
  std::string Value() {
    switch (Below(8)) {
      case 0:
        return Repeated(Below(2) == 0 ? "[" : "{a: ", 1 + Below(Below(20) == 0 ? 3000 : 30));
      case 1: {
        const size_t depth = 1 + Below(Below(20) == 0 ? 3000 : 30);
        return absl::StrCat(Repeated("[", depth), Word(), Repeated("]", depth));
      }
      case 2:
        return Repeated(Below(2) == 0 ? "x" : Odd(), 1 + Below(Below(20) == 0 ? 50'000 : 300));
      case 3:
        return Odd();
      case 4:
      case 5:
        return Number();
      default:
        return Word();
    }
  }
  std::string Key() {
    std::string key = Any(keys_);
    switch (Below(8)) {
      case 0:
        MutateWord(key);
        break;
      case 1:
        key += Odd();
        break;
      case 2:
        key = Value();
        break;
      default:
        break;
    }
    return key;
  }
  std::string Override() {
    switch (Below(8)) {
      case 0:
        return Value();
      case 1:
        return absl::StrCat("resources.", Key(), "=", Value());
      default:
        return absl::StrCat(Key(), "=", Value());
    }
  }

  // A slip of the finger.
  void MutateWord(std::string& word) {
    if (word.empty()) return;
    const size_t at = Below(word.size());
    switch (Below(6)) {
      case 0:
        word.erase(at, 1);
        break;
      case 1:
        word.insert(at, 1, word[at]);
        break;
      case 2:
        if (at + 1 < word.size()) std::swap(word[at], word[at + 1]);
        break;
      case 3:
        word[at] = static_cast<char>('a' + Below(26));
        break;
      case 4:
        word[at] = static_cast<char>(word[at] ^ 0x20);  // the other case
        break;
      default:
        std::replace(word.begin(), word.end(), '_', Below(2) == 0 ? '-' : ' ');
    }
  }

  void MutateLines(Lines& lines) {
    const size_t at = Below(lines.size());
    std::string& line = lines[at];
    Parts parts;
    const bool keyed = Split(line, &parts);
    switch (Below(16)) {
      case 0:
        if (keyed) MutateWord(parts.key);
        if (keyed) line = absl::StrCat(parts.key, ": ", parts.value);
        break;
      case 1:
      case 2:
        if (keyed) line = absl::StrCat(parts.key, ": ", Value());
        break;
      case 3: {  // the values of two lines change places
        std::string& other = Any(lines);
        Parts of_other;
        if (!keyed || !Split(other, &of_other)) break;
        other = absl::StrCat(of_other.key, ": ", parts.value);
        line = absl::StrCat(parts.key, ": ", of_other.value);
        break;
      }
      case 4:
        lines.insert(lines.begin() + static_cast<std::ptrdiff_t>(Below(lines.size() + 1)), std::string(line));
        break;
      case 5:
        if (lines.size() > 1) lines.erase(lines.begin() + static_cast<std::ptrdiff_t>(at));
        break;
      case 6:
        std::swap(line, Any(lines));
        break;
      case 7:
        line.insert(0, Below(3) == 0 ? "\t" : Repeated(" ", 1 + Below(5)));
        break;
      case 8:  // the indent of a whole block is lost
        for (size_t i = at; i < lines.size() && absl::StartsWith(lines[i], " "); ++i) {
          lines[i].erase(0, lines[i].find_first_not_of(' '));
        }
        break;
      case 9:
        if (Below(2) == 0) {
          line += '\r';
        } else {
          for (std::string& each : lines) each += '\r';
        }
        break;
      case 10:
      case 11:
        lines.insert(lines.begin() + static_cast<std::ptrdiff_t>(Below(lines.size() + 1)),
                     absl::StrCat(Key(), Below(10) == 0 ? "=" : ": ", Value()));
        break;
      case 12: {  // an anchor and its alias
        std::string& other = Any(lines);
        Parts of_other;
        if (!keyed || !Split(other, &of_other)) break;
        line = absl::StrCat(parts.key, ": &a ", parts.value);
        other = absl::StrCat(of_other.key, ": *a");
        break;
      }
      case 13: {
        static constexpr const char* kMarks[] = {"---", "...", "%YAML 1.2", "<<: *a", "# ", "-", "?", ":", "=", "\t"};
        lines.insert(lines.begin() + static_cast<std::ptrdiff_t>(at), std::string(Any(kMarks)));
        break;
      }
      case 14:
        if (keyed) line = absl::StrCat(parts.key, Below(2) == 0 ? ":" : Odd(), parts.value);
        break;
      default:
        if (Below(200) == 0) {  // a file that some program wrote
          const size_t count = 1 + Below(2000);
          for (size_t i = 0; i < count; ++i) lines.push_back(absl::StrCat(Any(keys_), i, ": ", Word()));
        } else {
          lines.resize(at + 1);
        }
    }
  }

  void MutateBytes(std::string& text) {
    for (size_t i = 0, count = 1 + Below(3); i < count && !text.empty(); ++i) {
      const size_t at = Below(text.size());
      switch (Below(6)) {
        case 0:
          text[at] = static_cast<char>(Below(256));
          break;
        case 1:
          text.erase(at, 1 + Below(12));
          break;
        case 2:
          text.insert(at, Odd());
          break;
        case 3:
          text.insert(at, Word());
          break;
        case 4:
          text.resize(at);
          break;
        default:
          text.insert(Below(text.size()), text.substr(at, Below(40)));
      }
    }
  }

  std::mt19937_64 random_;
  std::vector<std::string> keys_;
};

// One line that anybody can show: of UTF-8, without control characters, and not endless.
inline bool IsShowable(std::string_view text, size_t max_bytes) {
  size_t bad = 0;
  return text.size() <= max_bytes && IsValidUtf8(text, &bad) &&
         std::none_of(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
}

struct JobAnswer {
  ParsedJob parsed;
  double seconds = 0;  // of this thread, without the waits
  bool accepted() const { return parsed.violations.empty(); }
};

// Asks for the answer to a job file. What is wrong with the answer, or "".
inline std::string ProblemOfAnswer(const MutatedJob& job, JobAnswer* answer) {
  constexpr size_t kMaxViolations = 101;  // the last one may say that there are more
  const JobParseOptions options{.file_name = "job.yaml", .base_dir = "/no/such/folder", .overrides = job.overrides};
  timespec begin{}, end{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
  ParsedJob& parsed = answer->parsed = ParseJobYaml(job.yaml, options);
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
  answer->seconds =
      static_cast<double>(end.tv_sec - begin.tv_sec) + static_cast<double>(end.tv_nsec - begin.tv_nsec) / 1e9;
  // Generous, for the sanitizers' sake; what takes the square of the file's length takes far more.
  if (answer->seconds > 0.5 + static_cast<double>(job.yaml.size()) / 50'000) {
    return absl::StrCat("took ", answer->seconds, " s");
  }

  for (const std::string& note : parsed.notes) {
    if (!IsShowable(note, 1000)) return absl::StrCat("a note cannot be shown: ", note.substr(0, 300));
  }
  if (parsed.violations.size() > kMaxViolations) return absl::StrCat(parsed.violations.size(), " violations");
  const auto lines = 2 + std::count(job.yaml.begin(), job.yaml.end(), '\n');
  for (const FieldViolation& violation : parsed.violations) {
    const std::string shown = absl::StrCat(violation.line, ": ", violation.field, ": ", violation.description);
    if (!IsShowable(violation.field, 200)) return absl::StrCat("the key cannot be shown: ", shown.substr(0, 300));
    if (!IsShowable(violation.description, 1000)) return absl::StrCat("cannot be shown: ", shown.substr(0, 300));
    if (violation.description.size() < 10) return absl::StrCat("says nothing: ", shown);
    if (violation.line < 0 || violation.line > lines) return absl::StrCat("there is no such line: ", shown);
    // The file as a whole, and one --set, have neither.
    const bool whole = absl::StartsWith(violation.description, "the file ") ||
                       absl::StartsWith(violation.description, "a --set ") ||
                       absl::StartsWith(violation.description, "and ");
    if (violation.field.empty() && violation.line == 0 && !whole) return absl::StrCat("names no place: ", shown);
  }
  if (!answer->accepted()) return "";
  const std::string written = JobConfigToYaml(parsed.config);
  const ParsedJob again = ParseJobYaml(written, {.file_name = "job.yaml", .base_dir = options.base_dir});
  if (!again.violations.empty()) {
    return absl::StrCat("what was accepted is refused when it is written again: ",
                        FormatViolations(again.violations, "again"), "\n", written);
  }
  if (again.config != parsed.config || JobConfigToYaml(again.config) != written) {
    return absl::StrCat("what was accepted becomes something else when it is written again:\n", written);
  }
  return "";
}

}  // namespace simpo

#endif  // SIMPO_TESTS_COMMON_JOB_MUTATION_H_
