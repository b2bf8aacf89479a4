#ifndef SIMPO_WORKER_DATA_FFI_BYTES_H_
#define SIMPO_WORKER_DATA_FFI_BYTES_H_

#include <string>
#include <string_view>

#include "worker/hf_ffi/hf_ffi.h"

namespace simpo {

// Copies what the Rust side returned and gives it back.
inline std::string TakeBytes(SimpoBytes bytes) {
  std::string text(reinterpret_cast<const char*>(bytes.data), bytes.size);
  simpo_bytes_free(bytes);
  return text;
}

inline const uint8_t* BytePtr(std::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); }

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_FFI_BYTES_H_
