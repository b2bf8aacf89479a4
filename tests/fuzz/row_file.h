#ifndef SIMPO_TESTS_FUZZ_ROW_FILE_H_
#define SIMPO_TESTS_FUZZ_ROW_FILE_H_

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>

#include "worker/data/preference_dataset.h"
#include "worker/data/row_files.h"

namespace simpo {

// Reads the bytes as a data file of this extension, every row of it.
inline int FuzzRowFile(const uint8_t* data, size_t size, const char* extension) {
  static const std::string path =
      std::filesystem::temp_directory_path() / ("simpo-fuzz-" + std::to_string(getpid()) + extension);
  FILE* file = fopen(path.c_str(), "wb");
  if (file == nullptr || fwrite(data, 1, size, file) != size || fclose(file) != 0) __builtin_trap();
  int64_t rows = 0;
  const absl::Status read = ReadRows(path, [&](std::string_view json, const std::string&) {
    (void)ParsePreferenceRow(json);
    return ++rows < 100000;
  });
  if (!read.ok() && read.message().empty()) __builtin_trap();
  unlink(path.c_str());
  return 0;
}

}  // namespace simpo

#endif  // SIMPO_TESTS_FUZZ_ROW_FILE_H_
