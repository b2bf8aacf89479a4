#ifndef SIMPO_SIMPOCTL_INTERRUPT_H_
#define SIMPO_SIMPOCTL_INTERRUPT_H_

#include <grpcpp/client_context.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace simpo {

// While it lives, the first Ctrl-C ends what is being followed rather than the program; the second
// ends the program. One at a time in a process.
class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  bool Requested();
  // Returns early, with true, when Ctrl-C comes.
  bool WaitFor(std::chrono::milliseconds time);

  // While it lives, Ctrl-C cancels this call.
  class Scope {
   public:
    Scope(Interrupt& interrupt, grpc::ClientContext& context);
    ~Scope();

   private:
    Interrupt& interrupt_;
  };

 private:
  void Listen();

  int read_end_ = -1;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool requested_ = false;                  // guarded by mutex_
  grpc::ClientContext* context_ = nullptr;  // guarded by mutex_; lives as long as its Scope
  std::thread listener_;
};

}  // namespace simpo

#endif  // SIMPO_SIMPOCTL_INTERRUPT_H_
