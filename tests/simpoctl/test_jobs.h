#ifndef SIMPO_TESTS_SIMPOCTL_TEST_JOBS_H_
#define SIMPO_TESTS_SIMPOCTL_TEST_JOBS_H_

#include "simpo/v1/job.pb.h"

namespace simpo {

// A job in the middle of its training.
inline v1::Job RunningJob(int64_t step = 58, int64_t planned = 120) {
  v1::Job job;
  job.set_id("ab12cd");
  job.set_name("first");
  job.set_user("ada");
  job.set_state(v1::JOB_STATE_RUNNING);
  job.set_reason("attempt 1 runs on 2 ranks");
  job.set_output_dir("/out/first");
  job.set_ranks(2);
  job.set_slots(2);
  job.set_attempt(1);
  job.set_max_restarts(3);
  job.mutable_create_time()->set_seconds(1769860800);
  job.mutable_start_time()->set_seconds(1769860805);
  v1::JobProgress& progress = *job.mutable_progress();
  progress.set_step(step);
  progress.set_steps_planned(planned);
  progress.set_epoch(0.48);
  progress.set_step_seconds(1.2);
  progress.set_tokens_per_second(820.4);
  progress.set_eta_seconds(74);
  progress.set_phase("train");
  (*progress.mutable_metrics())["loss"] = 0.512;
  (*progress.mutable_metrics())["rewards/margins"] = 0.83;
  (*progress.mutable_metrics())["rewards/accuracies"] = 0.75;
  return job;
}

inline v1::Job EndedJob(v1::JobState state) {
  v1::Job job = RunningJob(120);
  job.set_state(state);
  job.set_reason("done after step 120");
  job.mutable_end_time()->set_seconds(1769861100);
  job.mutable_progress()->clear_eta_seconds();
  return job;
}

inline v1::JobEvent Event(int64_t sequence, const char* type, const char* message) {
  v1::JobEvent event;
  event.set_sequence(sequence);
  event.mutable_time()->set_seconds(1769860800 + sequence);
  event.set_type(type);
  event.set_message(message);
  return event;
}

}  // namespace simpo

#endif  // SIMPO_TESTS_SIMPOCTL_TEST_JOBS_H_
