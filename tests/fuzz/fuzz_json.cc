// Data files of the form .json: rows or an error.
#include "tests/fuzz/row_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return simpo::FuzzRowFile(data, size, ".json");
}
