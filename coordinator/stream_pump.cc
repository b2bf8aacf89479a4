#include "coordinator/stream_pump.h"

#include <algorithm>
#include <chrono>

namespace simpo {
namespace {

constexpr std::chrono::milliseconds kLook{200};

}  // namespace

StreamPump::~StreamPump() {
  {
    const std::lock_guard lock(mutex_);
    exit_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

void StreamPump::Add(std::shared_ptr<PumpedStream> stream) {
  const std::lock_guard lock(mutex_);
  streams_.push_back(std::move(stream));
  woken_ = true;
  changed_.notify_one();
}

void StreamPump::Wake() {
  const std::lock_guard lock(mutex_);
  woken_ = true;
  changed_.notify_one();
}

void StreamPump::Stop() {
  const std::lock_guard lock(mutex_);
  stop_ = woken_ = true;
  changed_.notify_one();
}

void StreamPump::Run() {
  while (true) {
    std::vector<std::shared_ptr<PumpedStream>> streams;
    bool stop = false;
    {
      std::unique_lock lock(mutex_);
      changed_.wait_for(lock, kLook, [&] { return woken_ || exit_; });
      if (exit_) return;
      woken_ = false;
      stop = stop_;
      streams = streams_;
    }
    std::vector<std::shared_ptr<PumpedStream>> over;
    for (const auto& stream : streams) {
      if (!stream->Pump(stop)) over.push_back(stream);
    }
    if (over.empty()) continue;
    const std::lock_guard lock(mutex_);
    std::erase_if(streams_,
                  [&](const auto& stream) { return std::find(over.begin(), over.end(), stream) != over.end(); });
  }
}

}  // namespace simpo
