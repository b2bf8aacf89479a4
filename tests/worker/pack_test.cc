#include "worker/pack.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/golden.h"

namespace simpo {
namespace {

using testing::ElementsAre;

std::vector<int64_t> ToVector(const at::Tensor& tensor) {
  return {tensor.data_ptr<int64_t>(), tensor.data_ptr<int64_t>() + tensor.numel()};
}

PackedBatch PackOwned(const std::vector<OwnedPair>& pairs) { return Pack(Views(pairs)); }

TEST(Pack, SharesThePrefixOfAPair) {
  // prompt 1 2 3; the responses begin alike with 4.
  const PackedBatch batch = PackOwned({{{1, 2, 3, 4, 5, 9}, {1, 2, 3, 4, 7, 8, 9}, 3, 3}});
  ASSERT_EQ(batch.pairs.size(), 1u);
  EXPECT_EQ(batch.pairs[0].prefix, 4);  // past the prompt: whatever both share
  EXPECT_EQ(batch.pairs[0].chosen_rest, 1);
  EXPECT_EQ(batch.pairs[0].rejected_rest, 2);
  EXPECT_THAT(ToVector(batch.input_ids_T), ElementsAre(1, 2, 3, 4, 5, 7, 8));
  EXPECT_THAT(ToVector(batch.positions_T), ElementsAre(0, 1, 2, 3, 4, 4, 5));  // start again after the prefix
  EXPECT_EQ(PackedSize(Views(std::vector<OwnedPair>{{{1, 2, 3, 4, 5, 9}, {1, 2, 3, 4, 7, 8, 9}, 3, 3}})[0]), 7);
  // The prompt's first two rows predict nothing that is scored.
  EXPECT_THAT(ToVector(batch.head_rows_N), ElementsAre(2, 3, 4, 5, 6));
  EXPECT_THAT(batch.scored_tokens, ElementsAre(3, 4));
  EXPECT_EQ(batch.source_tokens, 13);
}

TEST(Pack, OneRowScoresBothResponses) {
  const PackedBatch batch = PackOwned({{{1, 2, 3, 4, 5, 9}, {1, 2, 3, 4, 7, 8, 9}, 3, 3}});
  std::vector<std::array<int, 3>> scored;
  for (const ScoredToken& token : batch.scored) scored.push_back({token.row, token.target, token.response});
  using Token = std::array<int, 3>;
  EXPECT_THAT(scored, ElementsAre(Token{0, 4, 0}, Token{1, 5, 0}, Token{2, 9, 0},                    // chosen
                                  Token{0, 4, 1}, Token{1, 7, 1}, Token{3, 8, 1}, Token{4, 9, 1}));  // rejected
}

TEST(Pack, OneResponseMayBeginTheOther) {
  const PackedBatch batch = PackOwned({{{1, 2, 3, 4, 5}, {1, 2, 3, 4}, 2, 2}});
  EXPECT_EQ(batch.pairs[0].prefix, 3);  // the last token of a sequence is never an input
  EXPECT_EQ(batch.pairs[0].chosen_rest, 1);
  EXPECT_EQ(batch.pairs[0].rejected_rest, 0);
  EXPECT_THAT(ToVector(batch.input_ids_T), ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(batch.scored_tokens, ElementsAre(3, 2));
}

TEST(Pack, PromptsMayDiffer) {
  const PackedBatch batch = PackOwned({{{1, 5, 6}, {2, 5, 7}, 1, 1}});
  EXPECT_EQ(batch.pairs[0].prefix, 0);
  EXPECT_THAT(ToVector(batch.input_ids_T), ElementsAre(1, 5, 2, 5));
  EXPECT_THAT(ToVector(batch.positions_T), ElementsAre(0, 1, 0, 1));
  EXPECT_THAT(ToVector(batch.head_rows_N), ElementsAre(0, 1, 2, 3));
}

TEST(Pack, PairsFollowOneAnother) {
  const Golden golden("untied");
  const PackedBatch batch = PackOwned(golden.pairs);
  int64_t size = 0;
  int64_t scored = 0;
  for (size_t i = 0; i < golden.pairs.size(); ++i) {
    const OwnedPair& pair = golden.pairs[i];
    EXPECT_EQ(batch.pairs[i].begin, size);
    EXPECT_EQ(batch.pairs[i].size(), PackedSize(Views(golden.pairs)[i]));
    size += batch.pairs[i].size();
    EXPECT_EQ(batch.pair_scored_begin[i], scored);
    EXPECT_EQ(batch.scored_tokens[2 * i], static_cast<int32_t>(pair.chosen.size()) - pair.chosen_prompt_length);
    EXPECT_EQ(batch.scored_tokens[2 * i + 1], static_cast<int32_t>(pair.rejected.size()) - pair.rejected_prompt_length);
    scored += batch.scored_tokens[2 * i] + batch.scored_tokens[2 * i + 1];
  }
  EXPECT_EQ(batch.input_ids_T.numel(), size);
  EXPECT_EQ(static_cast<int64_t>(batch.scored.size()), scored);
  const std::vector<int64_t> rows = ToVector(batch.head_rows_N);
  EXPECT_TRUE(std::is_sorted(rows.begin(), rows.end()) && std::adjacent_find(rows.begin(), rows.end()) == rows.end());
}

// Every scored token is predicted by the row of the token before it in its own sequence.
TEST(Pack, ScoredTokensFollowTheirRows) {
  const Golden golden("tied");
  const PackedBatch batch = PackOwned(golden.pairs);
  for (size_t i = 0; i < golden.pairs.size(); ++i) {
    const PackedPair& place = batch.pairs[i];
    size_t next = batch.pair_scored_begin[i];
    for (const bool is_chosen : {true, false}) {
      const std::vector<int32_t>& ids = is_chosen ? golden.pairs[i].chosen : golden.pairs[i].rejected;
      const int32_t prompt = is_chosen ? golden.pairs[i].chosen_prompt_length : golden.pairs[i].rejected_prompt_length;
      for (int64_t t = prompt; t < static_cast<int64_t>(ids.size()); ++t, ++next) {
        const ScoredToken& token = batch.scored[next];
        const int64_t row = batch.head_rows_N[token.row].item<int64_t>();
        EXPECT_EQ(token.target, ids[t]);
        EXPECT_EQ(batch.input_ids_T[row].item<int64_t>(), ids[t - 1]);
        EXPECT_EQ(batch.positions_T[row].item<int64_t>(), t - 1);
        const int64_t offset = row - place.begin;
        EXPECT_TRUE(offset < place.prefix || (offset < place.prefix + place.chosen_rest) == is_chosen);
      }
    }
  }
}

// Where angles depend on the length, a pair with a sequence beyond the limit shares nothing.
TEST(Pack, SharesUpToALength) {
  const std::vector<OwnedPair> pairs = {{{1, 2, 3, 4, 5}, {1, 2, 3, 6}, 2, 2},
                                        {{1, 2, 3, 4, 5, 6}, {1, 2, 3, 7}, 2, 2}};
  const std::vector<TokenizedPair> views = Views(pairs);
  const PackedBatch batch = Pack(views, /*share_up_to=*/5);
  EXPECT_EQ(batch.pairs[0].prefix, 3);
  EXPECT_EQ(batch.pairs[1].prefix, 0);
  EXPECT_EQ(batch.pairs[1].chosen_rest, 5);
  EXPECT_EQ(batch.pairs[1].rejected_rest, 3);
  for (int i : {0, 1}) EXPECT_EQ(batch.pairs[i].size(), PackedSize(views[i], 5));
  EXPECT_EQ(batch.scored_tokens, Pack(views).scored_tokens);
}

}  // namespace
}  // namespace simpo
