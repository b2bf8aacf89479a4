#include "worker/data/tokenizer.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/data/ffi_bytes.h"

namespace simpo {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxFileBytes = 512 << 20;

absl::StatusOr<Json> ReadObject(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) return Json::object();
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxFileBytes));
  Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::InvalidArgumentError(absl::StrCat(path.string(), ": not a JSON object"));
  return json;
}

// "</s>" or {"content": "</s>", ...}; empty for null.
std::string TokenText(const Json& config, const char* key) {
  if (!config.contains(key)) return "";
  const Json& value = config[key];
  if (value.is_string()) return value.get<std::string>();
  if (value.is_object() && value.contains("content") && value["content"].is_string())
    return value["content"].get<std::string>();
  return "";
}

std::string TemplateText(const Json& config) {
  if (!config.contains("chat_template")) return "";
  const Json& value = config["chat_template"];
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return "";
  for (const Json& item : value) {
    if (item.is_object() && item.value("name", "") == "default") return item.value("template", "");
  }
  return "";
}

}  // namespace

Tokenizer::~Tokenizer() { simpo_tokenizer_free(handle_); }

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::filesystem::path& dir) {
  const std::filesystem::path path = dir / "tokenizer.json";
  if (!std::filesystem::exists(path)) {
    return absl::NotFoundError(absl::StrCat(dir.string(),
                                            " has no tokenizer.json; make one with transformers: "
                                            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"));
  }
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxFileBytes));
  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer());
  SimpoBytes error{};
  tokenizer->handle_ = simpo_tokenizer_new(BytePtr(text), text.size(), &error);
  if (tokenizer->handle_ == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(path.string(), ": not a tokenizer: ", TakeBytes(error)));
  }
  SIMPO_RETURN_IF_ERROR(tokenizer->ReadConfig(dir));
  tokenizer->digest_ = Sha256(absl::StrCat(Sha256(text), "\n", tokenizer->bos_token_, "\n", tokenizer->eos_token_));
  return tokenizer;
}

absl::Status Tokenizer::ReadConfig(const std::filesystem::path& dir) {
  SIMPO_ASSIGN_OR_RETURN(const Json config, ReadObject(dir / "tokenizer_config.json"));
  SIMPO_ASSIGN_OR_RETURN(const Json special, ReadObject(dir / "special_tokens_map.json"));
  auto find = [&](const char* key, std::string* text, std::optional<int32_t>* id) -> absl::Status {
    *text = TokenText(config.contains(key) ? config : special, key);
    if (text->empty()) return absl::OkStatus();
    const int64_t value = simpo_tokenizer_token_to_id(handle_, BytePtr(*text), text->size());
    if (value < 0) {
      return absl::InvalidArgumentError(absl::StrCat((dir / "tokenizer_config.json").string(), ": ", key, " '", *text,
                                                     "' is not in tokenizer.json's vocabulary"));
    }
    *id = static_cast<int32_t>(value);
    return absl::OkStatus();
  };
  SIMPO_RETURN_IF_ERROR(find("bos_token", &bos_token_, &bos_id_));
  SIMPO_RETURN_IF_ERROR(find("eos_token", &eos_token_, &eos_id_));
  if (std::filesystem::exists(dir / "chat_template.jinja")) {
    SIMPO_ASSIGN_OR_RETURN(chat_template_, ReadFile(dir / "chat_template.jinja", 1 << 20));
    chat_template_source_ = "chat_template.jinja";
  } else if (chat_template_ = TemplateText(config); !chat_template_.empty()) {
    chat_template_source_ = "tokenizer_config.json";
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text) const {
  SimpoIds ids{};
  SimpoBytes error{};
  if (!simpo_tokenizer_encode(handle_, BytePtr(text), text.size(), &ids, &error)) {
    return absl::InvalidArgumentError(absl::StrCat("cannot tokenise: ", TakeBytes(error)));
  }
  std::vector<int32_t> result(ids.data, ids.data + ids.size);
  simpo_ids_free(ids);
  return result;
}

int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(simpo_tokenizer_vocab_size(handle_)); }

}  // namespace simpo
