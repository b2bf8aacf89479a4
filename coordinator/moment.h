#ifndef SIMPO_COORDINATOR_MOMENT_H_
#define SIMPO_COORDINATOR_MOMENT_H_

#include <google/protobuf/timestamp.pb.h>

#include <chrono>
#include <cstdint>

#include "coordinator/liveness.h"

namespace simpo {

// One point in time: by the clock that never jumps, for limits, and by the calendar, for people.
struct Moment {
  SteadyTime steady;
  int64_t unix_ms = 0;

  static Moment Now() {
    return {.steady = std::chrono::steady_clock::now(),
            .unix_ms = std::chrono::duration_cast<std::chrono::milliseconds>(
                           std::chrono::system_clock::now().time_since_epoch())
                           .count()};
  }
};

inline google::protobuf::Timestamp ToTimestamp(int64_t unix_ms) {
  google::protobuf::Timestamp time;
  time.set_seconds(unix_ms / 1000);
  time.set_nanos(static_cast<int32_t>(unix_ms % 1000) * 1'000'000);
  return time;
}

inline int64_t UnixMillis(const google::protobuf::Timestamp& time) {
  return time.seconds() * 1000 + time.nanos() / 1'000'000;
}

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_MOMENT_H_
