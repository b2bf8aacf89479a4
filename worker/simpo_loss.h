#ifndef SIMPO_WORKER_SIMPO_LOSS_H_
#define SIMPO_WORKER_SIMPO_LOSS_H_

#include <array>
#include <cstddef>

#include "common/job_config.h"

namespace simpo {

// The SimPO loss of one pair (arXiv 2405.14734, equation 6; label smoothing and hinge as in
// princeton-nlp/SimPO). With s the length-averaged log-probability of a response,
//   z = beta * (s_chosen - s_rejected - gamma_beta_ratio)
//   sigmoid: -(1 - eps) * logsigmoid(z) - eps * logsigmoid(-z)      hinge: max(0, 1 - z)
struct SimpoLoss {
  enum class Type { kSigmoid, kHinge };
  Type type = Type::kSigmoid;
  double beta = 2.0;
  double gamma_beta_ratio = 0.5;
  double label_smoothing = 0.0;  // sigmoid only
  double sft_weight = 0.0;       // of the token-mean cross-entropy over the chosen responses

  static SimpoLoss FromConfig(const JobConfig& config);

  struct PairLoss {
    double loss = 0;      // without the SFT term
    double d_chosen = 0;  // d loss / d s_chosen; that of s_rejected is its negative
  };
  PairLoss ForPair(double logp_chosen, double logp_rejected) const;
};

// Sums over pairs, from which every metric of a step follows. Adds up over micro-batches and ranks.
struct SimpoStats {
  double pairs = 0;
  double loss = 0;
  double logps_chosen = 0, logps_rejected = 0;    // of s
  double accuracy = 0;                            // pairs with s_chosen > s_rejected
  double logits_chosen = 0, logits_rejected = 0;  // of the vocabulary's mean logit, over scored tokens
  double tokens_chosen = 0, tokens_rejected = 0;  // scored
  double nll_chosen = 0;                          // -sum of log-probabilities, chosen tokens
  double source_tokens = 0;                       // as PackedBatch::source_tokens
  double truncated = 0;

  // The fields in the order above, for sums over micro-batches and ranks.
  static constexpr size_t kFields = 12;
  std::array<double, kFields> ToArray() const;
  static SimpoStats FromArray(const std::array<double, kFields>& values);
  SimpoStats& operator+=(const SimpoStats& other);
};

}  // namespace simpo

#endif  // SIMPO_WORKER_SIMPO_LOSS_H_
