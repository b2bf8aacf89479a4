// Any text as a job file, its last lines that begin with "--set " as that: accepted and the same when it is written
// and read again, or refused with reasons that can be shown.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "tests/common/job_mutation.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr std::string_view kSet = "--set ";
  simpo::MutatedJob job{.yaml = std::string(reinterpret_cast<const char*>(data), size)};
  while (true) {
    const size_t line = job.yaml.rfind('\n') == std::string::npos ? 0 : job.yaml.rfind('\n') + 1;
    if (job.yaml.compare(line, kSet.size(), kSet) != 0) break;
    job.overrides.push_back(job.yaml.substr(line + kSet.size()));
    job.yaml.resize(line == 0 ? 0 : line - 1);
  }
  simpo::JobAnswer answer;
  const std::string problem = simpo::ProblemOfAnswer(job, &answer);
  if (problem.empty()) return 0;
  fprintf(stderr, "%s\n", problem.c_str());
  abort();
}

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

// Bytes, or what people, editors and other programs do to a job file.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  if (seed % 2 == 0) return LLVMFuzzerMutate(data, size, max_size);
  const simpo::MutatedJob job = simpo::JobMutator(seed).Mutate(std::string(reinterpret_cast<const char*>(data), size));
  std::string text = job.yaml;
  for (const std::string& set : job.overrides) text += "\n--set " + set;
  if (text.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::copy(text.begin(), text.end(), data);
  return text.size();
}
