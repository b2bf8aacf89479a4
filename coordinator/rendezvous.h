#ifndef SIMPO_COORDINATOR_RENDEZVOUS_H_
#define SIMPO_COORDINATOR_RENDEZVOUS_H_

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "simpo/v1/worker_service.pb.h"

namespace simpo {

// Where the ranks of a gang without MPI meet: holds who has come, per attempt, and gives every rank the bytes
// of rank 0 once all have. In memory only: after a restart of the coordinator ranks come again. Thread-safe;
// answers are given on the thread of the call that decides them, without the lock.
class Rendezvous {
 public:
  using Answer = std::function<void(absl::StatusOr<std::string>)>;
  // One rank's call; a rank may call again, and the new call takes the place of the old one.
  struct Call {
    v1::Hello who;
    const void* id = nullptr;
  };

  // `answer` is called at most once: now, when the last rank comes, when the gang cannot come together, or by
  // Expire.
  void Arrive(const Call& call, std::string bytes, Answer answer);
  // The rank's patience is at its end: if the call still waits, its answer names the ranks that are missing.
  void Expire(const Call& call);
  // The call is gone; the rank may come again.
  void Forget(const Call& call);

 private:
  struct Rank {
    std::string process;         // host and pid
    const void* call = nullptr;  // the one that waits; null: none does
    Answer answer;
  };
  struct Gathering {
    int attempt = 0;
    int world_size = 0;
    std::map<int, Rank> ranks;
    std::string bytes;    // of rank 0
    absl::Status failed;  // why it cannot come together
  };
  using Answers = std::vector<std::pair<Answer, absl::StatusOr<std::string>>>;
  // The following want mutex_ held.
  Gathering& Open(const v1::Hello& who, Answers& answers);
  static void AnswerAll(Gathering& gathering, const absl::StatusOr<std::string>& answer, Answers& answers);
  Answer TakeAnswer(const Call& call);

  std::mutex mutex_;
  std::map<std::string, Gathering> gatherings_;  // by job; of its latest attempt
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_RENDEZVOUS_H_
