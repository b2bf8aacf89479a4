// Runs a fuzz target without libFuzzer, with any compiler and sanitizer: the files that are named, then ROUNDS inputs
// that the target's own mutator makes, each from an earlier one.
//
//   NAME ROUNDS [SEED [FILE...]]
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed);

namespace {

constexpr size_t kMaxBytes = 16384;
constexpr size_t kMaxKept = 200;

std::mt19937_64& Source() {
  static std::mt19937_64 source;
  return source;
}
size_t Below(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(Source()); }

void Run(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

}  // namespace

// A byte more, less or other.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size) {
  if (size < max_size && (size == 0 || Below(3) == 0)) {
    data[size] = static_cast<uint8_t>(Below(256));
    return size + 1;
  }
  if (size > 1 && Below(3) == 0) return size - 1;
  if (size > 0) data[Below(size)] = static_cast<uint8_t>(Below(256));
  return size;
}

int main(int argc, char** argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: %s ROUNDS [SEED [FILE...]]\n", argv[0]);
    return 2;
  }
  const long rounds = atol(argv[1]);
  Source().seed(argc > 2 ? strtoull(argv[2], nullptr, 10) : 1);
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    if (!file) {
      fprintf(stderr, "%s: cannot read %s\n", argv[0], argv[i]);
      return 2;
    }
    Run({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
  }
  std::vector<std::string> kept(1);
  for (long round = 0; round < rounds; ++round) {
    std::string input = kept[Below(kept.size())];
    const size_t size = input.size();
    input.resize(kMaxBytes);
    input.resize(LLVMFuzzerCustomMutator(reinterpret_cast<uint8_t*>(input.data()), size, kMaxBytes,
                                         static_cast<unsigned>(Source()())));
    Run(input);
    if (kept.size() < kMaxKept) {
      kept.push_back(std::move(input));
    } else if (Below(4) == 0) {
      kept[1 + Below(kMaxKept - 1)] = std::move(input);
    }
  }
  printf("%ld inputs\n", rounds);
  return 0;
}
