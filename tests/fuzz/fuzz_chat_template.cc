// A chat template of a stranger, and a conversation through it.
#include "worker/data/chat_template.h"

// A template may store a namespace in itself, and minijinja counts references: such a cycle is never freed. The
// trainer renders in a child process that soon ends (worker/data/isolated.h), so that is no finding.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto chat_template = simpo::ChatTemplate::Parse({reinterpret_cast<const char*>(data), size});
  if (!chat_template.ok()) return 0;
  const std::vector<simpo::Message> messages = {{"system", "S"}, {"user", "Q \xc3\xa9"}, {"assistant", "A"}};
  const auto text = (*chat_template)->Render(messages, true, "<s>", "</s>");
  if (!text.ok() && text.status().message().empty()) __builtin_trap();
  return 0;
}
