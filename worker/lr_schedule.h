#ifndef SIMPO_WORKER_LR_SCHEDULE_H_
#define SIMPO_WORKER_LR_SCHEDULE_H_

#include <cstdint>
#include <string>

#include "common/job_config.h"

namespace simpo {

// The learning rate as transformers' schedulers give it. Update k (from 0) uses base * lambda(k):
// warm-up k / W while k < W, then the schedule over the remaining T - W updates. So with warm-up the
// first update has rate 0.
struct LrSchedule {
  std::string type;  // cosine, linear, constant, constant_with_warmup
  double base = 0;
  int64_t warmup = 0;  // W
  int64_t total = 0;   // T

  static LrSchedule FromConfig(const JobConfig& config, int64_t total_steps);
  double Rate(int64_t update) const;
};

}  // namespace simpo

#endif  // SIMPO_WORKER_LR_SCHEDULE_H_
