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
  return *this;
}

Pending::~Pending() {
  if (wait_ == nullptr) return;
  try {
    wait_();
  } catch (const std::exception&) {
    // The next collective meets it again.
  }
}

void Pending::Wait() {
  if (const std::function<void()> wait = std::exchange(wait_, nullptr)) wait();
}

std::unique_ptr<Collectives> MakeSingleRankCollectives() { return std::make_unique<SingleRankCollectives>(); }

}  // namespace simpo
