#ifndef SIMPO_WORKER_DATA_PREFERENCE_DATASET_H_
#define SIMPO_WORKER_DATA_PREFERENCE_DATASET_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/data/chat_template.h"

namespace simpo {

// One row of preference data: either texts as they are, or conversations for a chat template.
struct PreferenceRow {
  std::string where;  // "file:line", for messages
  bool conversational = false;
  std::string prompt, chosen, rejected;                     // texts
  std::vector<Message> prompt_messages;                     // conversations: what both share
  std::vector<Message> chosen_messages, rejected_messages;  // what differs, ending with the assistant
  bool tie = false;                                         // score_chosen equals score_rejected
};

// One JSON object of a row in any of the forms of docs/data.md. INVALID_ARGUMENT says what is wrong,
// without the place.
absl::StatusOr<PreferenceRow> ParsePreferenceRow(std::string_view json);

// All rows of a JSON Lines file; empty lines are passed over. INVALID_ARGUMENT lists the first bad
// rows, each with file and line, and how many there are.
absl::StatusOr<std::vector<PreferenceRow>> ReadPreferenceFile(const std::filesystem::path& path);

// The files of a data source that hold `split`: the source itself when it is a file and `is_train`,
// or those of a folder (or its data/ folder) whose names begin with the split's name. Empty when
// there are none. Formats other than .jsonl are refused by name.
absl::StatusOr<std::vector<std::filesystem::path>> FindSplitFiles(const std::filesystem::path& source,
                                                                  const std::string& split, bool is_train);

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_PREFERENCE_DATASET_H_
