#include "common/metric_names.h"

namespace simpo {
namespace {

constexpr bool kInEval = true;
constexpr bool kCounter = true;

constexpr std::string_view kReward = "Mean reward of a response: beta times its length-averaged log-probability";
constexpr std::string_view kLogps = "Mean length-averaged log-probability of a response";
constexpr std::string_view kLogits = "Mean logit over scored response tokens and the vocabulary";
constexpr std::string_view kLengths = "Mean number of scored tokens of a response";

constexpr MetricName kNames[] = {
    {"loss", "simpo_job_loss", "", kInEval, false, "", "SimPO loss, with the weighted SFT term when there is one"},
    {"sft_loss", "simpo_job_sft_loss", "", kInEval, false, "nats per token", "Cross-entropy of the chosen responses"},
    {"nll_loss", "", "", kInEval, false, "nats per token", "Another name of sft_loss"},
    {"grad_norm", "simpo_job_grad_norm", "", false, false, "", "Global gradient norm before clipping"},
    {"clip_coefficient", "simpo_job_clip_coefficient", "", false, false, "", "Factor on the gradient by clipping"},
    {"learning_rate", "simpo_job_learning_rate", "", false, false, "", "Learning rate of the last update"},
    {"rewards/chosen", "simpo_job_reward", "chosen", kInEval, false, "", kReward},
    {"rewards/rejected", "simpo_job_reward", "rejected", kInEval, false, "", kReward},
    {"rewards/margins", "simpo_job_reward_margin", "", kInEval, false, "", "Mean of chosen minus rejected reward"},
    {"rewards/accuracies", "simpo_job_reward_accuracy_ratio", "", kInEval, false, "ratio",
     "Share of the pairs whose chosen response has the greater reward"},
    {"logps/chosen", "simpo_job_logps", "chosen", kInEval, false, "nats per token", kLogps},
    {"logps/rejected", "simpo_job_logps", "rejected", kInEval, false, "nats per token", kLogps},
    {"logits/chosen", "simpo_job_logits", "chosen", kInEval, false, "", kLogits},
    {"logits/rejected", "simpo_job_logits", "rejected", kInEval, false, "", kLogits},
    {"lengths/chosen", "simpo_job_response_tokens", "chosen", kInEval, false, "tokens", kLengths},
    {"lengths/rejected", "simpo_job_response_tokens", "rejected", kInEval, false, "tokens", kLengths},
    {"epoch", "simpo_job_epoch", "", false, false, "epochs", "Passes over the training data so far"},
    {"num_input_tokens_seen", "simpo_job_tokens_total", "", false, kCounter, "tokens",
     "Tokens trained on, without padding"},
    {"tokens_per_second", "simpo_job_tokens_per_second", "", false, false, "tokens per second",
     "Tokens trained on per second in the last step"},
    {"mfu", "simpo_job_mfu_ratio", "", false, false, "ratio",
     "Floating-point operations of the last step over what matrix products reach on this machine"},
    {"step_seconds", "", "", false, false, "seconds", "Duration of the step; in simpo_job_step_duration_seconds"},
    {"truncated_pairs", "simpo_job_truncated_pairs", "", false, false, "pairs", "Pairs of the last step that were cut"},
    {"dropped_pairs", "simpo_job_dropped_pairs", "", false, false, "pairs", "Pairs of the data that were left out"},
};

}  // namespace

std::span<const MetricName> MetricNames() { return kNames; }

}  // namespace simpo
