// Rows as JSON text: parsed in every form, or refused.
#include "worker/data/preference_dataset.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto row = simpo::ParsePreferenceRow({reinterpret_cast<const char*>(data), size});
  if (row.ok() && row->dropped.empty() && row->conversational &&
      (row->chosen_messages.empty() || row->rejected_messages.empty() || row->prompt_messages.empty())) {
    __builtin_trap();  // what tokenising relies on
  }
  return 0;
}
