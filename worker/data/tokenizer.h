#ifndef SIMPO_WORKER_DATA_TOKENIZER_H_
#define SIMPO_WORKER_DATA_TOKENIZER_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

struct SimpoTokenizer;

namespace simpo {

// A Hugging Face tokenizer: the folder's tokenizer.json, and what tokenizer_config.json or
// special_tokens_map.json say of its special tokens. Thread-safe.
class Tokenizer {
 public:
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::filesystem::path& dir);
  ~Tokenizer();

  // Token ids without any that a post-processor would add; special tokens in the text are recognised.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text) const;
  int64_t vocab_size() const;
  // Absent where the files say null.
  const std::optional<int32_t>& bos_id() const { return bos_id_; }
  const std::optional<int32_t>& eos_id() const { return eos_id_; }
  const std::string& bos_token() const { return bos_token_; }
  const std::string& eos_token() const { return eos_token_; }
  // The chat template of chat_template.jinja or tokenizer_config.json ("default" where there are
  // several), and which of the two it was; empty when there is none.
  const std::string& chat_template() const { return chat_template_; }
  const std::string& chat_template_source() const { return chat_template_source_; }
  // SHA-256 over everything that decides its behaviour.
  const std::string& digest() const { return digest_; }

 private:
  Tokenizer() = default;
  absl::Status ReadConfig(const std::filesystem::path& dir);
  SimpoTokenizer* handle_ = nullptr;
  std::optional<int32_t> bos_id_, eos_id_;
  std::string bos_token_, eos_token_;
  std::string chat_template_, chat_template_source_;
  std::string digest_;
};

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_TOKENIZER_H_
