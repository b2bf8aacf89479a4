#include "worker/data/data_report.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace simpo {
namespace {

using Json = nlohmann::ordered_json;

LengthSummary Summarize(std::vector<int64_t> lengths) {
  if (lengths.empty()) return {};
  std::sort(lengths.begin(), lengths.end());
  // The smallest length that this share of all pairs does not exceed.
  auto percentile = [&](size_t percent) { return lengths[(lengths.size() * percent + 99) / 100 - 1]; };
  double sum = 0;
  for (const int64_t length : lengths) sum += static_cast<double>(length);
  return {.mean = sum / static_cast<double>(lengths.size()),
          .p50 = percentile(50),
          .p90 = percentile(90),
          .p99 = percentile(99),
          .longest = lengths.back()};
}

Json ToJson(const LengthSummary& s) {
  return {{"mean", s.mean}, {"p50", s.p50}, {"p90", s.p90}, {"p99", s.p99}, {"longest", s.longest}};
}

LengthSummary SummaryFromJson(const Json& json) {
  return {.mean = json["mean"], .p50 = json["p50"], .p90 = json["p90"], .p99 = json["p99"], .longest = json["longest"]};
}

}  // namespace

void DataReport::Measure(std::span<const OwnedPair> kept) {
  pairs = static_cast<int64_t>(kept.size());
  std::vector<int64_t> prompts, chosens, rejecteds, longer;
  double shared = 0;
  double total = 0;
  for (const OwnedPair& pair : kept) {
    const auto chosen_size = static_cast<int64_t>(pair.chosen.size());
    const auto rejected_size = static_cast<int64_t>(pair.rejected.size());
    truncated += pair.truncated ? 1 : 0;
    prompts.push_back(pair.chosen_prompt_length);
    chosens.push_back(chosen_size - pair.chosen_prompt_length);
    rejecteds.push_back(rejected_size - pair.rejected_prompt_length);
    longer.push_back(std::max(chosen_size, rejected_size));
    shared += TokenizedPair{.chosen = pair.chosen, .rejected = pair.rejected}.SharedPrefixLength();
    total += static_cast<double>(chosen_size + rejected_size);
  }
  prompt = Summarize(std::move(prompts));
  chosen = Summarize(std::move(chosens));
  rejected = Summarize(std::move(rejecteds));
  longer_sequence = Summarize(std::move(longer));
  shared_prefix_share = total > 0 ? 2 * shared / total : 0;
}

Json ToJson(const DataReport& r) {
  return {{"rows", r.rows},
          {"pairs", r.pairs},
          {"dropped", r.dropped},
          {"truncated", r.truncated},
          {"ties", r.ties},
          {"prompt_tokens", ToJson(r.prompt)},
          {"chosen_tokens", ToJson(r.chosen)},
          {"rejected_tokens", ToJson(r.rejected)},
          {"longer_sequence_tokens", ToJson(r.longer_sequence)},
          {"shared_prefix_share", r.shared_prefix_share}};
}

DataReport ReportFromJson(const Json& json) {
  return {.rows = json["rows"],
          .pairs = json["pairs"],
          .dropped = json["dropped"].get<std::map<std::string, int64_t>>(),
          .truncated = json["truncated"],
          .ties = json["ties"],
          .prompt = SummaryFromJson(json["prompt_tokens"]),
          .chosen = SummaryFromJson(json["chosen_tokens"]),
          .rejected = SummaryFromJson(json["rejected_tokens"]),
          .longer_sequence = SummaryFromJson(json["longer_sequence_tokens"]),
          .shared_prefix_share = json["shared_prefix_share"]};
}

std::string DataReport::ToString() const {
  std::string text = absl::StrFormat("  %d rows, %d pairs", rows, pairs);
  for (const auto& [reason, count] : dropped) absl::StrAppend(&text, ", ", count, " dropped (", reason, ")");
  absl::StrAppend(&text, absl::StrFormat(", %d truncated", truncated));
  if (ties > 0) absl::StrAppend(&text, absl::StrFormat(", %d with equal scores", ties));
  absl::StrAppend(&text, "\n  tokens (mean; 50%, 90%, 99% of the pairs have at most; longest): ");
  const std::pair<const char*, const LengthSummary*> parts[] = {
      {"prompt", &prompt}, {"chosen", &chosen}, {"rejected", &rejected}, {"longer sequence", &longer_sequence}};
  for (const auto& [name, s] : parts) {
    absl::StrAppend(&text, absl::StrFormat("%s %.1f; %d, %d, %d; %d%s", name, s->mean, s->p50, s->p90, s->p99,
                                           s->longest, s == &longer_sequence ? "" : " | "));
  }
  absl::StrAppend(&text, absl::StrFormat("\n  %.0f%% of all tokens are in prefixes that both responses share\n",
                                         100 * shared_prefix_share));
  return text;
}

}  // namespace simpo
