#ifndef SIMPO_TESTS_WORKER_TEXT_GOLDEN_H_
#define SIMPO_TESTS_WORKER_TEXT_GOLDEN_H_

#include <filesystem>
#include <nlohmann/json.hpp>

#include "tests/worker/io/test_files.h"
#include "worker/data/chat_template.h"
#include "worker/data/tokenizer.h"

namespace simpo {

// tests/goldens/text: a tokenizer, and what transformers and TRL make of texts with it.
struct TextGolden {
  std::filesystem::path dir = std::filesystem::path(SIMPO_GOLDENS_DIR) / "text";
  nlohmann::json numbers = nlohmann::json::parse(ReadText(dir / "golden.json"));
  std::unique_ptr<Tokenizer> tokenizer = Tokenizer::Load(dir).value();
  std::unique_ptr<ChatTemplate> chat_template = ChatTemplate::Parse(tokenizer->chat_template()).value();
};

}  // namespace simpo

#endif  // SIMPO_TESTS_WORKER_TEXT_GOLDEN_H_
