#include "worker/comm/collectives.h"

#include <exception>

namespace simpo {
namespace {

class SingleRankCollectives final : public Collectives {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 1; }
  Pending BeginAllReduce(at::Tensor) override { return {}; }
  Pending BeginReduceScatter(at::Tensor) override { return {}; }
  Pending BeginAllGather(at::Tensor) override { return {}; }
  void Broadcast(at::Tensor, int) override {}
  void Barrier() override {}
};

}  // namespace

Pending& Pending::operator=(Pending&& other) noexcept {
  Pending old(std::move(*this));  // waits
  wait_ = std::exchange(other.wait_, nullptr);
  activity_ = other.activity_;
  return *this;
}

Pending::~Pending() {
  try {
    Wait();
  } catch (const std::exception&) {
    // The next collective meets it again.
  }
}

void Pending::Wait() {
  const std::function<void()> wait = std::exchange(wait_, nullptr);
  if (wait == nullptr) return;
  struct Waiting {
    explicit Waiting(RankActivity& activity) : activity(activity) { activity.BeginWait(); }
    ~Waiting() { activity.EndWait(); }
    RankActivity& activity;
  } const waiting(*activity_);
  wait();
}

std::unique_ptr<Collectives> MakeSingleRankCollectives() { return std::make_unique<SingleRankCollectives>(); }

}  // namespace simpo
