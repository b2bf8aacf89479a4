// Any bytes as a safetensors file: an error or a file whose every tensor can be read, within its bounds.
#include <ATen/ATen.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "worker/model/safetensors.h"

namespace {

// The header's length is written for the fuzzer, which would hardly find it.
std::string WithLength(const uint8_t* data, size_t size) {
  std::string file(reinterpret_cast<const char*>(data), size);
  if (size < 2 || data[0] % 4 == 0) return file;
  const size_t end = file.find("}}");
  const uint64_t length = end == std::string::npos ? size - 1 : end + 1;
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + file.substr(1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string file = WithLength(data, size);
  static const int fd = memfd_create("fuzz", MFD_CLOEXEC);
  if (ftruncate(fd, 0) != 0 || pwrite(fd, file.data(), file.size(), 0) != static_cast<ssize_t>(file.size())) abort();
  const auto opened = simpo::SafetensorsFile::Open("/proc/self/fd/" + std::to_string(fd));
  if (!opened.ok()) return 0;
  size_t bytes = 0;
  for (const simpo::SafetensorsEntry& entry : (*opened)->entries()) {
    const at::Tensor tensor = (*opened)->View(entry);
    if (tensor.nbytes() != entry.end - entry.begin || entry.end > file.size()) abort();
    bytes += tensor.nbytes();
    const auto* first = static_cast<const volatile char*>(tensor.data_ptr());
    for (size_t i = 0; i < tensor.nbytes(); ++i) static_cast<void>(first[i]);
    (*opened)->Drop(entry);
    if ((*opened)->Find(entry.name) == nullptr) abort();
  }
  if (bytes > file.size()) abort();
  return 0;
}
