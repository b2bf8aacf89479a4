// Tries many job files made wrong on purpose (tests/common/job_mutation.h), beginning from real ones, and counts what
// came of them. Ends with 1 at the first answer that is none.
//
//   mutate_job_files FOLDER [COUNT [SEED]]      one million files from the *.yaml of FOLDER and the folders in it
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "tests/common/job_mutation.h"

namespace simpo {
namespace {

constexpr size_t kMaxKinds = 2000;

std::vector<std::string> ReadSeeds(const char* folder) {
  std::set<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.path().extension() == ".yaml") paths.insert(entry.path());
  }
  std::vector<std::string> seeds;
  for (const std::filesystem::path& path : paths) {
    std::ifstream file(path);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return seeds;
}

// The description without what came from the file: what is in quotes, and numbers.
std::string KindOf(const std::string& description) {
  std::string kind;
  bool quoted = false;
  for (const char c : description) {
    if (c == '\'') quoted = !quoted;
    const bool digit = absl::ascii_isdigit(static_cast<unsigned char>(c));
    if (quoted && c != '\'') continue;
    if (!digit) kind += c;
    if (digit && (kind.empty() || kind.back() != '#')) kind += '#';
  }
  return kind;
}

int Main(int argc, char** argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: mutate_job_files FOLDER [COUNT [SEED]]\n");
    return 2;
  }
  const std::vector<std::string> seeds = ReadSeeds(argv[1]);
  const int64_t count = argc > 2 ? atoll(argv[2]) : 1'000'000;
  const uint64_t seed = argc > 3 ? strtoull(argv[3], nullptr, 10) : 1;
  if (seeds.empty()) {
    fprintf(stderr, "mutate_job_files: %s holds no *.yaml\n", argv[1]);
    return 2;
  }
  JobMutator mutator(seed);
  int64_t accepted_count = 0, violations = 0;
  size_t largest = 0;
  std::pair<double, size_t> slowest;  // seconds, bytes of the file
  std::map<std::string, int64_t> kinds;
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < count; ++i) {
    const MutatedJob job = mutator.Mutate(seeds[static_cast<size_t>(i) % seeds.size()]);
    JobAnswer answer;
    const std::string problem = ProblemOfAnswer(job, &answer);
    if (!problem.empty()) {
      printf("file %lld: %s\n--- the file:\n%s\n", static_cast<long long>(i), problem.c_str(), job.yaml.c_str());
      for (const std::string& text : job.overrides) printf("--set %s\n", text.c_str());
      return 1;
    }
    accepted_count += answer.accepted();
    if (answer.seconds > slowest.first) slowest = {answer.seconds, job.yaml.size()};
    const std::vector<FieldViolation>& of_job = answer.parsed.violations;
    violations += static_cast<int64_t>(of_job.size());
    largest = std::max(largest, FormatViolations(of_job, "job.yaml").size());
    for (const FieldViolation& violation : of_job) {
      const std::string kind = KindOf(violation.description);
      if (kinds.size() < kMaxKinds || kinds.contains(kind)) ++kinds[kind];
    }
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::vector<std::pair<int64_t, std::string>> by_count;
  for (const auto& [kind, times] : kinds) by_count.emplace_back(times, kind);
  std::sort(by_count.rbegin(), by_count.rend());
  for (const auto& [times, kind] : by_count) printf("%9lld  %s\n", static_cast<long long>(times), kind.c_str());
  printf(
      "%lld job files from %zu: %lld accepted, %lld refused for %lld reasons of %zu kinds, the longest refusal %zu "
      "bytes, the slowest answer %.1f ms (for %zu bytes), %.0f s\n",
      static_cast<long long>(count), seeds.size(), static_cast<long long>(accepted_count),
      static_cast<long long>(count - accepted_count), static_cast<long long>(violations), kinds.size(), largest,
      slowest.first * 1000, slowest.second, seconds);
  return 0;
}

}  // namespace
}  // namespace simpo

int main(int argc, char** argv) { return simpo::Main(argc, argv); }
