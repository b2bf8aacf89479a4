#ifndef SIMPO_WORKER_DATA_CHAT_TEMPLATE_H_
#define SIMPO_WORKER_DATA_CHAT_TEMPLATE_H_

#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

struct SimpoTemplate;

namespace simpo {

struct Message {
  std::string role;
  std::string content;
  bool operator==(const Message&) const = default;
};

// A Jinja chat template, rendered as transformers' apply_chat_template does. Instructions and output are
// bounded, so an endless template ends in an error (memory for the values in between is not). Thread-safe.
class ChatTemplate {
 public:
  // INVALID_ARGUMENT names the template's line.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Parse(std::string_view source);
  ~ChatTemplate();
  // bos_token and eos_token: the template's variables of these names; empty becomes undefined there.
  absl::StatusOr<std::string> Render(std::span<const Message> messages, bool add_generation_prompt,
                                     std::string_view bos_token, std::string_view eos_token) const;

  // Whether the template speaks of system messages, as alignment-handbook looks for it.
  bool MentionsSystem() const { return mentions_system_; }

 private:
  ChatTemplate() = default;
  bool mentions_system_ = false;
  SimpoTemplate* handle_ = nullptr;
};

// The template for a model that has none: its family's, else ChatML. `name` says which.
std::string_view DefaultChatTemplate(std::string_view model_type, std::string* name);

// The form in which the paper's trainer writes conversations for every model with mistral in its name:
// [INST] question [/INST] answer </s>, without BOS, a system message before the first question.
std::string_view PrincetonMistralTemplate();

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_CHAT_TEMPLATE_H_
