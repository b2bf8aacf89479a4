#include "worker/data/chat_template.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "worker/data/ffi_bytes.h"

namespace simpo {
namespace {

constexpr std::string_view kChatMl =
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

// The form that Mistral-7B-Instruct was trained on; a system message goes before the first question.
constexpr std::string_view kMistral =
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\\n\\n' %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}"
    "{% set ns.system = '' %}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}{% endfor %}";

// The first message after the system's carries its text; every text is trimmed.
constexpr std::string_view kPrincetonMistral =
    "{% set ns = namespace(before='') %}{% for message in messages %}"
    "{% if loop.first and message['role'] == 'system' %}{% set ns.before = message['content'].strip() + '\n\n' %}"
    "{% else %}{% set text = (ns.before + message['content']).strip() %}{% set ns.before = '' %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + text + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + text + ' ' + eos_token }}{% endif %}{% endif %}{% endfor %}";

}  // namespace

ChatTemplate::~ChatTemplate() { simpo_template_free(handle_); }

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Parse(std::string_view source) {
  SimpoBytes error{};
  SimpoTemplate* handle = simpo_template_new(BytePtr(source), source.size(), &error);
  if (handle == nullptr) return absl::InvalidArgumentError(TakeBytes(error));
  std::unique_ptr<ChatTemplate> chat_template(new ChatTemplate());
  chat_template->handle_ = handle;
  chat_template->mentions_system_ =
      source.find("system") != std::string_view::npos || source.find("<|im_start|>") != std::string_view::npos;
  return chat_template;
}

absl::StatusOr<std::string> ChatTemplate::Render(std::span<const Message> messages, bool add_generation_prompt,
                                                 std::string_view bos_token, std::string_view eos_token) const {
  nlohmann::ordered_json context;
  context["messages"] = nlohmann::ordered_json::array();
  for (const Message& message : messages) {
    context["messages"].push_back({{"role", message.role}, {"content", message.content}});
  }
  context["add_generation_prompt"] = add_generation_prompt;
  // transformers defines these two whether they are given or not.
  context["tools"] = nullptr;
  context["documents"] = nullptr;
  if (!bos_token.empty()) context["bos_token"] = bos_token;
  if (!eos_token.empty()) context["eos_token"] = eos_token;
  const std::string json = context.dump();
  SimpoBytes text{};
  SimpoBytes error{};
  if (!simpo_template_render(handle_, BytePtr(json), json.size(), &text, &error)) {
    return absl::InvalidArgumentError(TakeBytes(error));
  }
  return TakeBytes(text);
}

std::string_view DefaultChatTemplate(std::string_view model_type, std::string* name) {
  if (model_type == "mistral") {
    *name = "default of mistral";
    return kMistral;
  }
  *name = "ChatML";
  return kChatMl;
}

std::string_view PrincetonMistralTemplate() { return kPrincetonMistral; }

}  // namespace simpo
