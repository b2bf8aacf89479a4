#include "worker/data/tokenized_dataset.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"

namespace simpo {
namespace {

// The file: Header, then uint64 offsets[pairs + 1] into the tail, then int32 words. A pair's words:
// chosen size, rejected size, chosen prompt length, rejected prompt length, truncated, chosen ids,
// rejected ids. Little endian; a cache of one machine's kind, not an exchange format.
struct Header {
  char magic[8];
  uint64_t pairs;
  uint64_t dropped;
  uint64_t words;
};
constexpr char kMagic[8] = {'S', 'I', 'M', 'P', 'O', 'T', 'K', '1'};
constexpr int kPairHeaderWords = 5;

}  // namespace

absl::StatusOr<std::unique_ptr<TokenizedDataset>> TokenizedDataset::Open(const std::filesystem::path& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return absl::NotFoundError(absl::StrCat("cannot read the token cache ", path.string(), ": ", strerror(errno)));
  struct stat info {};
  fstat(fd, &info);
  const auto size = static_cast<size_t>(info.st_size);
  void* base = size < sizeof(Header) ? MAP_FAILED : mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  close(fd);
  auto damaged = [&] {
    return absl::DataLossError(absl::StrCat("the token cache ", path.string(), " is damaged; remove it"));
  };
  if (base == MAP_FAILED) return damaged();
  std::unique_ptr<TokenizedDataset> data(new TokenizedDataset());
  data->base_ = static_cast<const std::byte*>(base);
  data->size_bytes_ = size;
  Header header{};
  memcpy(&header, base, sizeof(header));
  const bool sane = memcmp(header.magic, kMagic, sizeof(kMagic)) == 0 && header.pairs < size && header.words < size &&
                    sizeof(Header) + (header.pairs + 1) * 8 + header.words * 4 == size;
  if (!sane) return damaged();
  data->num_pairs_ = static_cast<int64_t>(header.pairs);
  data->dropped_pairs_ = static_cast<int64_t>(header.dropped);
  data->offsets_ = reinterpret_cast<const uint64_t*>(data->base_ + sizeof(Header));
  return data;
}

TokenizedDataset::~TokenizedDataset() {
  if (base_ != nullptr) munmap(const_cast<std::byte*>(base_), size_bytes_);
}

namespace {

const int32_t* PairWords(const std::byte* base, const uint64_t* offsets, int64_t pairs, int64_t index) {
  const std::byte* words = base + sizeof(Header) + (static_cast<size_t>(pairs) + 1) * 8;
  return reinterpret_cast<const int32_t*>(words) + offsets[index];
}

}  // namespace

TokenizedPair TokenizedDataset::operator[](int64_t index) const {
  const int32_t* words = PairWords(base_, offsets_, num_pairs_, index);
  const auto chosen = static_cast<size_t>(words[0]);
  const auto rejected = static_cast<size_t>(words[1]);
  const int32_t* ids = words + kPairHeaderWords;
  return {.chosen = {ids, chosen},
          .rejected = {ids + chosen, rejected},
          .chosen_prompt_length = words[2],
          .rejected_prompt_length = words[3]};
}

bool TokenizedDataset::truncated(int64_t index) const { return PairWords(base_, offsets_, num_pairs_, index)[4] != 0; }

absl::Status WriteTokenizedDataset(const std::filesystem::path& path, std::span<const OwnedPair> pairs,
                                   int64_t dropped_pairs) {
  std::vector<uint64_t> offsets = {0};
  std::vector<int32_t> words;
  for (const OwnedPair& pair : pairs) {
    words.insert(words.end(), {static_cast<int32_t>(pair.chosen.size()), static_cast<int32_t>(pair.rejected.size()),
                               pair.chosen_prompt_length, pair.rejected_prompt_length, pair.truncated ? 1 : 0});
    words.insert(words.end(), pair.chosen.begin(), pair.chosen.end());
    words.insert(words.end(), pair.rejected.begin(), pair.rejected.end());
    offsets.push_back(words.size());
  }
  Header header{
      .magic = {}, .pairs = pairs.size(), .dropped = static_cast<uint64_t>(dropped_pairs), .words = words.size()};
  memcpy(header.magic, kMagic, sizeof(kMagic));
  std::string content(reinterpret_cast<const char*>(&header), sizeof(header));
  content.append(reinterpret_cast<const char*>(offsets.data()), offsets.size() * 8);
  content.append(reinterpret_cast<const char*>(words.data()), words.size() * 4);
  return WriteFileAtomically(path, content);
}

}  // namespace simpo
