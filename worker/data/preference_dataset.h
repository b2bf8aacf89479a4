#ifndef SIMPO_WORKER_DATA_PREFERENCE_DATASET_H_
#define SIMPO_WORKER_DATA_PREFERENCE_DATASET_H_

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
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
  bool prompt_beside = false;  // prompt_messages stood beside the responses, not inside them
  bool tie = false;            // both scores are given and equal
  std::string dropped;         // not empty: why the row cannot be used, though nothing is wrong with its form
};

// The columns that rows are made of, whatever their form; others are not read.
std::span<const std::string_view> PreferenceColumns();

// One JSON object of a row in any of the forms of docs/data.md. INVALID_ARGUMENT says what is wrong,
// without the place.
absl::StatusOr<PreferenceRow> ParsePreferenceRow(std::string_view json);

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_PREFERENCE_DATASET_H_
