#ifndef SIMPO_COORDINATOR_RATE_LIMIT_H_
#define SIMPO_COORDINATOR_RATE_LIMIT_H_

#include <algorithm>
#include <chrono>

namespace simpo {

// A bucket that fills at `rate` a second up to `burst`; each call takes one. Not thread-safe.
class TokenBucket {
 public:
  using Time = std::chrono::steady_clock::time_point;

  TokenBucket(double rate, double burst, Time now) : rate_(rate), burst_(burst), level_(burst), last_(now) {}

  bool Take(Time now) {
    level_ = std::min(burst_, level_ + rate_ * std::chrono::duration<double>(now - last_).count());
    last_ = now;
    if (level_ < 1) return false;
    level_ -= 1;
    return true;
  }

 private:
  const double rate_, burst_;
  double level_;
  Time last_;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_RATE_LIMIT_H_
