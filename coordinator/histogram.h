#ifndef SIMPO_COORDINATOR_HISTOGRAM_H_
#define SIMPO_COORDINATOR_HISTOGRAM_H_

#include <array>
#include <cstddef>
#include <cstdint>

namespace simpo {

// Counts of durations in seconds, in the form that Prometheus wants.
struct Histogram {
  static constexpr std::array<double, 17> kBounds = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
                                                     1,     2.5,    5,     10,   30,    60,   120, 300};
  std::array<int64_t, kBounds.size()> counts{};  // of values at most the bound and above the one before
  int64_t count = 0;
  double sum = 0;

  void Add(double value) {
    ++count;
    sum += value;
    for (size_t i = 0; i < kBounds.size(); ++i) {
      if (value <= kBounds[i]) {
        ++counts[i];
        return;
      }
    }
  }
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_HISTOGRAM_H_
