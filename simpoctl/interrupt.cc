#include "simpoctl/interrupt.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>

namespace simpo {
namespace {

// A signal handler reaches nothing but globals; -1 while no Interrupt lives.
volatile int signal_pipe = -1;

void OnSignal(int) {
  const int saved_errno = errno;
  const char byte = 'i';
  if (write(signal_pipe, &byte, 1) < 0) _exit(130);
  errno = saved_errno;
}

}  // namespace

Interrupt::Interrupt() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return;  // out of descriptors: Ctrl-C keeps ending the program
  read_end_ = ends[0];
  signal_pipe = ends[1];
  listener_ = std::thread([this] { Listen(); });
  struct sigaction action {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
}

Interrupt::~Interrupt() {
  if (read_end_ < 0) return;
  std::signal(SIGINT, SIG_DFL);
  close(signal_pipe);  // the listener reads the end of the pipe
  listener_.join();
  close(read_end_);
  signal_pipe = -1;
}

void Interrupt::Listen() {
  char byte = 0;
  while (read(read_end_, &byte, 1) == 1) {
    const std::lock_guard lock(mutex_);
    if (requested_) _exit(130);
    requested_ = true;
    if (context_ != nullptr) context_->TryCancel();
    changed_.notify_all();
  }
}

bool Interrupt::Requested() {
  const std::lock_guard lock(mutex_);
  return requested_;
}

bool Interrupt::WaitFor(std::chrono::milliseconds time) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, time, [this] { return requested_; });
}

Interrupt::Scope::Scope(Interrupt& interrupt, grpc::ClientContext& context) : interrupt_(interrupt) {
  const std::lock_guard lock(interrupt_.mutex_);
  interrupt_.context_ = &context;
  if (interrupt_.requested_) context.TryCancel();
}

Interrupt::Scope::~Scope() {
  const std::lock_guard lock(interrupt_.mutex_);
  interrupt_.context_ = nullptr;
}

}  // namespace simpo
