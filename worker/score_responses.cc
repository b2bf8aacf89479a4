// Shape letters: T tokens, N rows of the head, H hidden, V vocabulary.
#include "worker/score_responses.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <vector>

#include "worker/model/kernels_aten.h"

namespace simpo {
namespace {

// The work on one micro-batch: each row's softmax statistics, then each pair's loss, then each scored
// token's share of the gradient.
class Scorer {
 public:
  Scorer(const Decoder& decoder, const at::Tensor& normed_NH, const PackedBatch& batch, const SimpoLoss& loss,
         const GlobalBatchSize& global)
      : head_(decoder.head()),
        softcap_(decoder.config().final_logit_softcapping),
        normed_NH_(normed_NH),
        batch_(batch),
        loss_(loss),
        global_(global) {
    const int64_t rows = normed_NH.size(0);
    lse_N_ = at::empty({rows}, at::kFloat);
    mean_N_ = at::empty({rows}, at::kFloat);
    scale_N_ = at::zeros({rows}, at::kFloat);
    target_logits_.resize(batch.scored.size());
    coefficients_.resize(batch.scored.size());
  }

  int64_t vocab() const { return head_->shape()[0]; }

  // Scores the pairs [first, last), whose rows are [begin, end), at most chunk_rows rows at a time.
  void ScoreGroup(int64_t first, int64_t last, int64_t chunk_rows, at::Tensor* grad_normed_NH) {
    const int64_t begin = batch_.pair_head_begin[first];
    const int64_t end = batch_.pair_head_begin[last];
    at::Tensor logits;
    for (int64_t row = begin; row < end; row += chunk_rows) {
      const int64_t count = std::min(chunk_rows, end - row);
      logits = Logits(row, count);
      ReadStats(logits, row, count, first, last);
    }
    for (int64_t pair = first; pair < last; ++pair) AddPair(pair);
    if (grad_normed_NH == nullptr) return;
    const bool kept = end - begin <= chunk_rows;
    for (int64_t row = begin; row < end; row += chunk_rows) {
      const int64_t count = std::min(chunk_rows, end - row);
      if (!kept) logits = Logits(row, count);
      Backward(logits, row, count, first, last, *grad_normed_NH);
    }
  }

  const SimpoStats& stats() const { return stats_; }

 private:
  // The scored tokens whose row lies in [row, row + count), of pairs [first, last).
  struct Selection {
    std::vector<int64_t> entries;
    at::Tensor rows, targets;  // int64, rows relative to `row`
  };
  Selection Select(int64_t row, int64_t count, int64_t first, int64_t last) const {
    Selection selection;
    std::vector<int64_t> rows, targets;
    for (int64_t i = batch_.pair_scored_begin[first]; i < batch_.pair_scored_begin[last]; ++i) {
      const ScoredToken& token = batch_.scored[i];
      if (token.row < row || token.row >= row + count) continue;
      selection.entries.push_back(i);
      rows.push_back(token.row - row);
      targets.push_back(token.target);
    }
    selection.rows = at::tensor(rows, at::kLong);
    selection.targets = at::tensor(targets, at::kLong);
    return selection;
  }

  // On the logits' device.
  at::Tensor Moved(const at::Tensor& host) const { return host.to(normed_NH_.device()); }

  at::Tensor Logits(int64_t row, int64_t count) const {
    at::Tensor logits = at::mm(normed_NH_.narrow(0, row, count), head_->value().t());
    if (softcap_ > 0) SIMPO_KERNEL(logits, SoftcapInPlace)(logits, softcap_);
    return logits;
  }

  void ReadStats(const at::Tensor& logits, int64_t row, int64_t count, int64_t first, int64_t last) {
    const at::Tensor lse = at::empty({count}, logits.options().dtype(at::kFloat));
    const at::Tensor mean = at::empty_like(lse);
    SIMPO_KERNEL(logits, LogitStats)(logits, lse, mean);
    lse_N_.narrow(0, row, count).copy_(lse);
    mean_N_.narrow(0, row, count).copy_(mean);
    const Selection selection = Select(row, count, first, last);
    const at::Tensor values = logits.index({Moved(selection.rows), Moved(selection.targets)}).to(at::kCPU, at::kFloat);
    for (size_t i = 0; i < selection.entries.size(); ++i) {
      target_logits_[selection.entries[i]] = values.data_ptr<float>()[i];
    }
  }

  // The pair's loss, and d loss / d log-probability of each of its scored tokens.
  void AddPair(int64_t pair) {
    double sum[2] = {0, 0};
    double mean_logits[2] = {0, 0};
    const float* lse = lse_N_.data_ptr<float>();
    const float* mean = mean_N_.data_ptr<float>();
    const int64_t begin = batch_.pair_scored_begin[pair];
    const int64_t end = batch_.pair_scored_begin[pair + 1];
    for (int64_t i = begin; i < end; ++i) {
      const ScoredToken& token = batch_.scored[i];
      const int which = token.response & 1;
      sum[which] += static_cast<double>(target_logits_[i]) - static_cast<double>(lse[token.row]);
      mean_logits[which] += static_cast<double>(mean[token.row]);
    }
    const double tokens[2] = {static_cast<double>(batch_.scored_tokens[2 * pair]),
                              static_cast<double>(batch_.scored_tokens[2 * pair + 1])};
    const double chosen = sum[0] / tokens[0];
    const double rejected = sum[1] / tokens[1];
    const SimpoLoss::PairLoss pair_loss = loss_.ForPair(chosen, rejected);
    stats_ += {.pairs = 1,
               .loss = pair_loss.loss,
               .logps_chosen = chosen,
               .logps_rejected = rejected,
               .accuracy = chosen > rejected ? 1.0 : 0.0,
               .logits_chosen = mean_logits[0],
               .logits_rejected = mean_logits[1],
               .tokens_chosen = tokens[0],
               .tokens_rejected = tokens[1],
               .nll_chosen = -sum[0]};

    const double d_chosen = pair_loss.d_chosen / global_.pairs / tokens[0] - loss_.sft_weight / global_.chosen_tokens;
    const double d_rejected = -pair_loss.d_chosen / global_.pairs / tokens[1];
    float* scale = scale_N_.data_ptr<float>();
    for (int64_t i = begin; i < end; ++i) {
      const ScoredToken& token = batch_.scored[i];
      coefficients_[i] = static_cast<float>((token.response & 1) == 0 ? d_chosen : d_rejected);
      scale[token.row] -= coefficients_[i];
    }
  }

  // logits becomes d loss / d logits: coefficient * (1[v = target] - softmax), times the softcap's
  // derivative, then the products.
  void Backward(at::Tensor logits, int64_t row, int64_t count, int64_t first, int64_t last,
                at::Tensor& grad_normed_NH) const {
    SIMPO_KERNEL(logits, ScaledSoftmaxInPlace)
    (logits, Moved(lse_N_.narrow(0, row, count)), Moved(scale_N_.narrow(0, row, count)), softcap_);
    const Selection selection = Select(row, count, first, last);
    std::vector<float> values;
    for (int64_t entry : selection.entries) {
      const float tanh = softcap_ > 0 ? target_logits_[entry] / static_cast<float>(softcap_) : 0.0f;
      values.push_back(coefficients_[entry] * (1 - tanh * tanh));
    }
    logits.index_put_({Moved(selection.rows), Moved(selection.targets)},
                      Moved(at::tensor(values, at::kFloat).to(logits.scalar_type())), /*accumulate=*/true);
    at::Tensor grad = grad_normed_NH.narrow(0, row, count);
    at::mm_out(grad, logits, head_->value());
    AccumulateWeightGrad(head_->grad(), logits, normed_NH_.narrow(0, row, count));
  }

  const WeightRef& head_;
  const double softcap_;  // 0: none
  const at::Tensor normed_NH_;
  const PackedBatch& batch_;
  const SimpoLoss& loss_;
  const GlobalBatchSize& global_;
  at::Tensor lse_N_, mean_N_;         // on the host
  at::Tensor scale_N_;                // minus the sum of the coefficients of each row's scored tokens
  std::vector<float> target_logits_;  // by scored token
  std::vector<float> coefficients_;   // by scored token: d loss / d log-probability
  SimpoStats stats_;
};

}  // namespace

ScoredBatch ScoreResponses(const Decoder& decoder, const at::Tensor& hidden_TH, const PackedBatch& batch,
                           const SimpoLoss& loss, const GlobalBatchSize& global, bool with_gradients,
                           int64_t max_logits) {
  const at::Tensor head_rows_N = batch.head_rows_N.to(hidden_TH.device());
  at::Tensor rows_NH = hidden_TH.detach().index_select(0, head_rows_N);
  at::Tensor normed_NH;
  {
    at::AutoGradMode grad_mode(with_gradients);
    normed_NH = decoder.FinalNorm(rows_NH.requires_grad_(with_gradients));
  }
  at::NoGradGuard no_grad;
  Scorer scorer(decoder, normed_NH.detach(), batch, loss, global);
  at::Tensor grad_normed_NH = with_gradients ? at::empty_like(normed_NH) : at::Tensor();
  const int64_t chunk_rows = std::max<int64_t>(1, max_logits / scorer.vocab());
  for (int64_t first = 0; first < batch.num_pairs();) {
    int64_t last = first + 1;
    while (last < batch.num_pairs() && batch.pair_head_begin[last + 1] - batch.pair_head_begin[first] <= chunk_rows) {
      ++last;
    }
    scorer.ScoreGroup(first, last, chunk_rows, with_gradients ? &grad_normed_NH : nullptr);
    first = last;
  }

  ScoredBatch result{.stats = scorer.stats()};
  result.stats.source_tokens = static_cast<double>(batch.source_tokens);
  if (with_gradients) {
    const at::Tensor grad_rows = torch::autograd::grad({normed_NH}, {rows_NH}, {grad_normed_NH})[0];
    result.grad_TH = at::zeros_like(hidden_TH).index_copy_(0, head_rows_N, grad_rows);
  }
  return result;
}

}  // namespace simpo
