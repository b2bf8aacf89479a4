#include "simpoctl/follow.h"

#include <unistd.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "simpoctl/exit_codes.h"
#include "simpoctl/format.h"
#include "simpoctl/job_text.h"
#include "simpoctl/progress.h"

namespace simpo {
namespace {

using SystemClock = std::chrono::system_clock;

constexpr int kBrokenEnds = 3;

class Follower {
 public:
  Follower(Client& client, const FollowOptions& options)
      : client_(client),
        options_(options),
        display_([] { return LookOf(STDERR_FILENO); }, PrintErr),
        reconnect_(client, interrupt_, [this](std::string_view text) { display_.Say(text); }) {
    if (options.timeout) give_up_at_ = Reconnect::Clock::now() + *options.timeout;
  }

  absl::StatusOr<int> Run(v1::Job job) {
    job_ = std::move(job);
    reconnect_.Alive();  // the coordinator has just told of the job
    while (true) {
      const grpc::Status status = ReadStream();
      // How it ended is known; for what a broken stream has not shown of it, there are a few tries.
      if (ended_ && (status.ok() || options_.quiet || ++broken_ends_ > kBrokenEnds)) break;
      if (give_up_at_ && Reconnect::Clock::now() >= *give_up_at_) return TimedOut();
      const absl::Status next = reconnect_.Next(status);
      if (interrupt_.Requested()) return Detached();
      if (next.ok()) continue;
      if (ended_) break;
      display_.Finish();
      return next;
    }
    display_.Finish();
    PrintOut(EndSummary(job_, client_.command(), LookOf(STDOUT_FILENO)));
    return ExitCodeOf(job_.state());
  }

 private:
  grpc::Status ReadStream() {
    grpc::ClientContext context;
    auto deadline = reconnect_.StreamDeadline();
    if (give_up_at_) {
      const auto left = std::chrono::ceil<SystemClock::duration>(*give_up_at_ - Reconnect::Clock::now());
      deadline = std::min(deadline, SystemClock::now() + left);
    }
    context.set_deadline(deadline);
    const Interrupt::Scope scope(interrupt_, context);
    v1::WatchJobRequest request;
    request.set_job_id(job_.id());
    request.set_after_sequence(last_sequence_);
    const auto stream = client_.stub().WatchJob(&context, request);
    v1::WatchJobResponse response;
    while (stream->Read(&response)) {
      reconnect_.Alive();
      job_ = response.job();
      for (const v1::JobEvent& event : response.events()) last_sequence_ = std::max(last_sequence_, event.sequence());
      if (!options_.quiet) display_.Update(response);
      ended_ = IsFinal(job_.state());
    }
    // After the last state the rest of the events and points came too, and the server ended the stream.
    return stream->Finish();
  }

  int TimedOut() {
    display_.Finish();
    PrintErr(absl::StrCat("Not finished within ", options_.timeout->count(), " s: job ", job_.id(), " is ",
                          StateName(job_.state()), " and goes on. Wait again with: ", client_.command(), " wait ",
                          job_.id(), "\n"));
    return kExitNotFinished;
  }

  int Detached() {
    display_.Finish();
    PrintErr(absl::StrCat("\nDetached; job ", job_.id(), " goes on. Come back with: ", client_.command(), " watch ",
                          job_.id(), "   End it with: ", client_.command(), " cancel ", job_.id(), "\n"));
    return kExitNotFinished;
  }

  Client& client_;
  const FollowOptions& options_;
  Interrupt interrupt_;
  JobDisplay display_;
  Reconnect reconnect_;
  std::optional<Reconnect::Clock::time_point> give_up_at_;
  v1::Job job_;
  int64_t last_sequence_ = 0;
  bool ended_ = false;
  int broken_ends_ = 0;
};

}  // namespace

absl::StatusOr<int> FollowJob(Client& client, const std::string& job, const FollowOptions& options) {
  SIMPO_ASSIGN_OR_RETURN(v1::GetJobResponse response, client.GetJob(job));
  if (options.quiet && IsFinal(response.job().state())) {
    PrintOut(EndSummary(response.job(), client.command(), LookOf(STDOUT_FILENO)));
    return ExitCodeOf(response.job().state());
  }
  return Follower(client, options).Run(std::move(*response.mutable_job()));
}

}  // namespace simpo
