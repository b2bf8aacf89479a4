// A tokenizer.json of a stranger, and a text through it.
#include <string>

#include "worker/data/ffi_bytes.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  SimpoBytes error{};
  SimpoTokenizer* tokenizer = simpo_tokenizer_new(data, size, &error);
  if (tokenizer == nullptr) {
    if (simpo::TakeBytes(error).empty()) __builtin_trap();
    return 0;
  }
  for (const std::string_view text : {"Hello, \xc3\xa9 \xf0\x9f\x98\x80 <|x|> 12\n", "", "   "}) {
    SimpoIds ids{};
    if (simpo_tokenizer_encode(tokenizer, simpo::BytePtr(text), text.size(), &ids, &error)) {
      simpo_ids_free(ids);
    } else if (simpo::TakeBytes(error).empty()) {
      __builtin_trap();
    }
  }
  simpo_tokenizer_free(tokenizer);
  return 0;
}
