#ifndef SIMPO_WORKER_DATA_TOKENIZED_DATASET_H_
#define SIMPO_WORKER_DATA_TOKENIZED_DATASET_H_

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/data/tokenized_pair.h"

namespace simpo {

// Token ids of all pairs of one split, in the order of the rows, mapped read-only from the cache
// file that WriteTokenizedDataset made. Thread-safe.
class TokenizedDataset {
 public:
  static absl::StatusOr<std::unique_ptr<TokenizedDataset>> Open(const std::filesystem::path& path);
  ~TokenizedDataset();
  int64_t size() const { return num_pairs_; }
  TokenizedPair operator[](int64_t index) const;
  // Pairs whose prompt or responses were cut to fit, by index.
  bool truncated(int64_t index) const;
  int64_t dropped_pairs() const { return dropped_pairs_; }

 private:
  TokenizedDataset() = default;
  const std::byte* base_ = nullptr;
  size_t size_bytes_ = 0;
  int64_t num_pairs_ = 0;
  int64_t dropped_pairs_ = 0;
  const uint64_t* offsets_ = nullptr;
};

// What WriteTokenizedDataset takes for one pair.
struct OwnedPair {
  std::vector<int32_t> chosen;
  std::vector<int32_t> rejected;
  int32_t chosen_prompt_length = 0;
  int32_t rejected_prompt_length = 0;
  bool truncated = false;
};

// Writes the cache file atomically (temporary name, sync, rename).
absl::Status WriteTokenizedDataset(const std::filesystem::path& path, std::span<const OwnedPair> pairs,
                                   int64_t dropped_pairs);

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_TOKENIZED_DATASET_H_
