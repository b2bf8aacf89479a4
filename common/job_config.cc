#include "common/job_config.h"

#include <array>

#include "absl/strings/str_cat.h"
#include "common/job_keys.h"

namespace simpo {
namespace {

using C = JobConfig;

// name, type, default, unit, range, section, help; field; whether it is a path
const JobKeyRow kRows[] = {
    {{"name", "string", "", "", "", "Job", "What lists and pages call the job."}, &C::name},
    {{"priority", "integer", "0", "", "-1000000 to 1000000", "Job", "Jobs of higher priority run first."},
     &C::priority},
    {{"labels", "map", "", "", "", "Job", "Labels of your own, to filter lists by; at most 64."}, &C::labels},
    {{"max_restarts", "integer", "3", "", "0 to 1000", "Job", "How often a faulty attempt is followed by another."},
     &C::max_restarts},
    {{"time_limit", "duration", "0", "seconds", ">= 0", "Job",
      "The job is stopped after this time (0: never). 90, 90s, 15m, 2h and 1d are all understood."},
     &C::time_limit_s},
    {{"launcher", "string", "mpirun", "", "mpirun", "Job", "What starts the ranks."}, &C::launcher},

    {{"model_name_or_path", "string", "", "", "", "Model",
      "Folder of a Hugging Face model: config.json, safetensors, tokenizer.json. Required."},
     &C::model_name_or_path,
     true},
    {{"model_revision", "string", "main", "", "", "Model", "Revision of a hub model."}, &C::model_revision},
    {{"tokenizer_name_or_path", "string", "", "", "", "Model", "Folder of another tokenizer than the model's."},
     &C::tokenizer_name_or_path,
     true},
    {{"chat_template", "string", "", "", "", "Model",
      "Jinja chat template, or a path to one; the default is the tokenizer's own."},
     &C::chat_template,
     true},
    {{"torch_dtype", "string", "auto", "", "auto | float32 | bfloat16", "Model",
      "Compute type. auto is float32 on the CPU. Master weights are always float32."},
     &C::torch_dtype},

    {{"dataset_mixer", "map", "", "", "", "Data",
      "Data files, folders, globs or data sets of the hub (owner/name, owner/name@revision), and the fraction of each "
      "to take. Required."},
     &C::dataset_mixer,
     true},
    {{"eval_dataset_mixer", "map", "", "", "", "Data",
      "Evaluation data of its own; the default is the mixer's evaluation split."},
     &C::eval_dataset_mixer,
     true},
    {{"dataset_splits", "list", "", "", "", "Data",
      "Names of the training split and the evaluation split; the default is train, and test where there is one."},
     &C::dataset_splits},
    {{"dataset_configs", "list", "", "", "", "Data",
      "Configurations (folders) of the data sets: one for all, or one for each."},
     &C::dataset_configs},
    {{"preprocessing_num_workers", "integer", "0", "", "0 to 1024", "Data",
      "Threads for tokenising (0: one per core)."},
     &C::preprocessing_num_workers},
    {{"shuffle", "boolean", "true", "", "", "Data", "Whether each epoch shuffles the pairs (by seed)."}, &C::shuffle},
    {{"seed", "integer", "42", "", ">= 0", "Data", "Decides the order of the pairs."}, &C::seed},
    {{"max_length", "integer", "2048", "tokens", "2 to 1048576", "Data", "Longest prompt plus response."},
     &C::max_length},
    {{"max_prompt_length", "integer", "0", "tokens", "0 to 1048576", "Data",
      "A pair that does not fit max_length has its prompt cut to this (0: prompts are not cut)."},
     &C::max_prompt_length},
    {{"truncation_mode", "string", "keep_end", "", "keep_end | keep_start", "Data", "Which end of a cut prompt stays."},
     &C::truncation_mode},
    {{"compat", "string", "trl", "", "trl | princeton", "Data",
      "Whose rules turn text into tokens: TRL's, or those of the paper's trainer, which clips no gradients either."},
     &C::compat},
    {{"drop_ties", "boolean", "false", "", "", "Data", "Drop pairs whose two scores are equal."}, &C::drop_ties},

    {{"beta", "number", "2.0", "", "> 0", "Loss", "Scale of the rewards."}, &C::beta},
    {{"gamma_beta_ratio", "number", "0.5", "", ">= 0", "Loss", "Target reward margin divided by beta."},
     &C::gamma_beta_ratio},
    {{"loss_type", "string", "sigmoid", "", "sigmoid | hinge", "Loss", "Shape of the pairwise loss."}, &C::loss_type},
    {{"label_smoothing", "number", "0", "", "0 to below 0.5", "Loss", "Assumed share of wrong labels (sigmoid only)."},
     &C::label_smoothing},
    {{"sft_weight", "number", "0", "", ">= 0", "Loss", "Weight of the cross-entropy of the chosen responses."},
     &C::sft_weight},

    {{"learning_rate", "number", "5e-7", "", "> 0", "Optimizer", "Peak learning rate."}, &C::learning_rate},
    {{"lr_scheduler_type", "string", "cosine", "", "cosine | linear | constant | constant_with_warmup", "Optimizer",
      "How the rate falls after the warm-up."},
     &C::lr_scheduler_type},
    {{"warmup_ratio", "number", "0.1", "", "0 to 1", "Optimizer", "Share of all steps in which the rate rises from 0."},
     &C::warmup_ratio},
    {{"warmup_steps", "integer", "-1", "steps", ">= -1", "Optimizer",
      "Wins over warmup_ratio when positive; a fraction below 1 is taken as the ratio."},
     &C::warmup_steps},
    {{"weight_decay", "number", "0", "", ">= 0", "Optimizer", "Decoupled weight decay; not on biases and norms."},
     &C::weight_decay},
    {{"adam_beta1", "number", "0.9", "", "0 to below 1", "Optimizer", "Decay of AdamW's first moment."},
     &C::adam_beta1},
    {{"adam_beta2", "number", "0.999", "", "0 to below 1", "Optimizer", "Decay of AdamW's second moment."},
     &C::adam_beta2},
    {{"adam_epsilon", "number", "1e-8", "", "> 0", "Optimizer", "AdamW's epsilon."}, &C::adam_epsilon},
    {{"max_grad_norm", "number", "1.0", "", ">= 0", "Optimizer",
      "Gradients are scaled down to this global norm (0: never)."},
     &C::max_grad_norm},
    {{"num_train_epochs", "number", "1", "epochs", "> 0", "Optimizer", "Passes over the data."}, &C::num_train_epochs},
    {{"max_steps", "integer", "-1", "steps", ">= -1", "Optimizer", "Wins over num_train_epochs when positive."},
     &C::max_steps},

    {{"per_device_train_batch_size", "integer", "0", "pairs", "0 to 65536", "Batches",
      "Most pairs of a micro-batch on one rank (0: as many as its tokens allow)."},
     &C::per_device_train_batch_size},
    {{"per_device_eval_batch_size", "integer", "0", "pairs", "0 to 65536", "Batches", "The same in evaluation."},
     &C::per_device_eval_batch_size},
    {{"gradient_accumulation_steps", "integer", "0", "", "0 to 1048576", "Batches",
      "Micro-batches of a rank per step; with per_device_train_batch_size and the ranks it gives the global batch (0: "
      "derived from it)."},
     &C::gradient_accumulation_steps},
    {{"global_batch_size", "integer", "128", "pairs", "1 to 1048576", "Batches",
      "Pairs of one optimizer step on all ranks together. The result does not depend on how they are split."},
     &C::global_batch_size},
    {{"max_tokens_per_micro_batch", "integer", "0", "tokens", ">= 0", "Batches",
      "Most tokens of a packed micro-batch (0: chosen by the trainer)."},
     &C::max_tokens_per_micro_batch},
    {{"gradient_checkpointing", "boolean", "false", "", "", "Batches",
      "Keep only each layer's input and compute the layer again on the way back: less memory, same result."},
     &C::gradient_checkpointing},

    {{"zero_stage", "integer", "1", "", "0 to 3", "Sharding",
      "What is split over the ranks (ZeRO). 0: nothing; 1: masters and moments of the optimizer; 2: gradients too; 3: "
      "weights too. Less memory with each, more traffic from 2 on; the result is the same."},
     &C::zero_stage},
    {{"offload_optimizer", "string", "none", "", "none | cpu", "Sharding",
      "cpu: masters, moments and accumulated gradients live in host memory, and the optimizer runs there."},
     &C::offload_optimizer},
    {{"reduce_dtype", "string", "float32", "", "float32 | bfloat16", "Sharding",
      "Type in which gradients travel to be summed over the ranks; bfloat16 halves the traffic and rounds. They are "
      "accumulated in float32 all the same."},
     &C::reduce_dtype},
    {{"deterministic", "boolean", "false", "", "", "Sharding", "Same layout, same bits. Always so on the CPU."},
     &C::deterministic},
    {{"resources.nodes", "integer", "1", "", "1 to 1", "Resources", "Machines of the gang."}, &C::nodes},
    {{"resources.ranks_per_node", "integer", "1", "", "1 to 1024", "Resources", "Ranks on each machine."},
     &C::ranks_per_node},
    {{"resources.device", "string", "cpu", "", "cpu | cuda", "Resources", "What the ranks compute on."}, &C::device},
    {{"resources.threads_per_rank", "integer", "0", "", "0 to 1024", "Resources",
      "Threads of each rank (0: the cores divided by the ranks)."},
     &C::threads_per_rank},

    {{"do_eval", "boolean", "true", "", "", "Evaluation and saving", "Whether the evaluation split is used."},
     &C::do_eval},
    {{"eval_on_start", "boolean", "false", "", "", "Evaluation and saving", "Evaluate before the first step."},
     &C::eval_on_start},
    {{"eval_strategy", "string", "end", "", "no | end | steps | epoch", "Evaluation and saving",
      "When to evaluate; always at the end too, unless no."},
     &C::eval_strategy},
    {{"eval_steps", "integer", "0", "steps", ">= 0", "Evaluation and saving", "For eval_strategy: steps."},
     &C::eval_steps},
    {{"save_strategy", "string", "end", "", "no | end | steps | epoch", "Evaluation and saving",
      "When to keep a checkpoint; the model is exported at the end, unless no."},
     &C::save_strategy},
    {{"save_steps", "integer", "0", "steps", ">= 0", "Evaluation and saving", "For save_strategy: steps."},
     &C::save_steps},
    {{"save_total_limit", "integer", "0", "", ">= 0", "Evaluation and saving", "Checkpoints to keep (0: all)."},
     &C::save_total_limit},
    {{"load_best_model_at_end", "boolean", "false", "", "", "Evaluation and saving",
      "Export the checkpoint with the best evaluation, which save_total_limit then spares, not the last one."},
     &C::load_best_model_at_end},
    {{"metric_for_best_model", "string", "eval_loss", "", "", "Evaluation and saving",
      "The metric of evaluations that load_best_model_at_end compares; has no effect without it."},
     &C::metric_for_best_model},
    {{"greater_is_better", "string", "", "", "", "Evaluation and saving",
      "Whether the greater metric_for_best_model is the better (not given: unless its name ends in loss)."},
     &C::greater_is_better},
    {{"logging_steps", "integer", "1", "steps", ">= 1", "Evaluation and saving",
      "How often a line goes to standard output; metrics.jsonl has every step."},
     &C::logging_steps},
    {{"recovery_minutes", "number", "10", "minutes", ">= 0", "Evaluation and saving",
      "How often a rolling checkpoint is written, beside your own (0: never)."},
     &C::recovery_minutes},
    {{"output_dir", "string", "", "", "", "Evaluation and saving",
      "An absolute folder for everything of the job. A submitted job with a relative one, or none, gets "
      "DATA_DIR/outputs/NAME-ID of the coordinator."},
     &C::output_dir},
    {{"overwrite_output_dir", "boolean", "false", "", "", "Evaluation and saving",
      "Allow output_dir to hold an earlier run, which is removed."},
     &C::overwrite_output_dir},
    {{"resume_from_checkpoint", "string", "", "", "", "Evaluation and saving",
      "A checkpoint folder, or true for the newest of output_dir."},
     &C::resume_from_checkpoint,
     true},
};

constexpr JobKeyAlias kAliases[] = {
    {"evaluation_strategy", "eval_strategy"},
    {"dtype", "torch_dtype"},
    {"run_name", "name"},
    {"dataset_num_proc", "preprocessing_num_workers"},
    {"dataset_config", "dataset_configs"},
    {"data_seed", "seed"},
};

// name, the key that it sets, how
constexpr ConvertedJobKey kConverted[] = {
    {"simpo_gamma", "gamma_beta_ratio", "TRL CPO: gamma_beta_ratio = simpo_gamma / beta"},
    {"cpo_alpha", "sft_weight", "TRL CPO: sft_weight"},
    {"gamma", "gamma_beta_ratio", "gamma_beta_ratio = gamma / beta"},
    {"bf16", "", "true is torch_dtype: bfloat16"},
    {"optim", "", "adamw_torch and its other names; no other optimizer is supported"},
    {"dataset_name", "dataset_mixer", "dataset_mixer with the whole of one data set"},
    {"dataset_mixture", "dataset_mixer", "dataset_mixer; the form {datasets: [{id, weight, split}]} too"},
    {"datasets", "dataset_mixer", "dataset_mixer as a list of {id or path, weight, split}"},
    {"dataset_train_split", "", "the first of dataset_splits"},
    {"dataset_test_split", "", "the second of dataset_splits"},
};

constexpr IgnoredJobKey kIgnored[] = {
    {"report_to", "metrics go to metrics.jsonl and, under a coordinator, to Prometheus"},
    {"push_to_hub", "the model stays in output_dir/final"},
    {"hub_model_id", "the model stays in output_dir/final"},
    {"hub_strategy", "the model stays in output_dir/final"},
    {"hub_private_repo", "the model stays in output_dir/final"},
    {"remove_unused_columns", "columns that are not needed are not read"},
    {"tf32", "matrix products run in the compute type"},
    {"ddp_*", "ranks are synchronised by the trainer itself"},
    {"deepspeed", "sharding is said by zero_stage"},
    {"fsdp", "sharding is said by zero_stage"},
    {"fsdp_config", "sharding is said by zero_stage"},
    {"attn_implementation", "attention is exact and without padding"},
    {"use_flash_attention_2", "attention is exact and without padding"},
    {"gradient_checkpointing_kwargs", "a layer is recomputed whole"},
    {"disable_dropout", "there is no dropout"},
    {"trainer_type", "the loss is SimPO, and text becomes tokens by the rules that compat names"},
    {"log_level", "logs are complete"},
    {"do_train", "a job always trains"},
    {"logging_strategy", "metrics.jsonl has every step"},
    {"logging_first_step", "metrics.jsonl has every step"},
    {"save_only_model", "checkpoints always hold what a resume needs; final holds the model alone"},
    {"save_safetensors", "models and checkpoints are always safetensors"},
    {"save_on_each_node", "output_dir is shared by all nodes"},
    {"logging_dir", "metrics.jsonl and the logs are in output_dir"},
};

// name, why, the switch without which the key means nothing
constexpr RefusedJobKey kRefused[] = {
    {"fp16", "training in float16 is not supported; use torch_dtype: bfloat16 or float32", ""},
    {"load_in_8bit", "quantised training is not supported", ""},
    {"load_in_4bit", "quantised training is not supported", ""},
    {"bnb_4bit_*", "quantised training is not supported", "load_in_4bit"},
    {"use_bnb_nested_quant", "quantised training is not supported", "load_in_4bit"},
    {"use_peft", "adapters are not supported: all weights are trained", ""},
    {"lora_*", "adapters are not supported: all weights are trained", "use_peft"},
    {"test_split_size",
     "holding out a part of the training data is not supported yet; name evaluation data with "
     "eval_dataset_mixer",
     ""},
};

}  // namespace

std::span<const JobKeyRow> JobKeyRows() { return kRows; }
std::span<const JobKeyAlias> JobKeyAliases() { return kAliases; }
std::span<const ConvertedJobKey> ConvertedJobKeys() { return kConverted; }
std::span<const IgnoredJobKey> IgnoredJobKeys() { return kIgnored; }
std::span<const RefusedJobKey> RefusedJobKeys() { return kRefused; }

std::vector<JobKey> JobKeys() {
  std::vector<JobKey> keys;
  for (const JobKeyRow& row : kRows) keys.push_back(row.key);
  return keys;
}

bool MatchesJobKey(std::string_view pattern, std::string_view key) {
  if (!pattern.ends_with('*')) return pattern == key;
  return key.starts_with(pattern.substr(0, pattern.size() - 1));
}

namespace {

std::string OwnKeysHelp() {
  std::string text;
  std::string_view section;
  for (const JobKey& key : JobKeys()) {
    if (key.section != section) {
      section = key.section;
      absl::StrAppend(&text, "\n", std::string(section), "\n");
    }
    std::string head = absl::StrCat("  ", std::string(key.name), ": ", std::string(key.type));
    if (!key.unit.empty()) absl::StrAppend(&head, " in ", std::string(key.unit));
    if (!key.range.empty()) absl::StrAppend(&head, ", ", std::string(key.range));
    if (!key.fallback.empty()) absl::StrAppend(&head, " (default ", std::string(key.fallback), ")");
    absl::StrAppend(&text, head, "\n      ", std::string(key.help), "\n");
  }
  return text;
}

void AppendPair(std::string* text, std::string_view name, std::string_view meaning) {
  absl::StrAppend(text, "  ", std::string(name), ": ", std::string(meaning), "\n");
}

}  // namespace

std::string JobFileHelp() {
  std::string text =
      "A job file is YAML: the keys of TRL and alignment-handbook, and a few of ours.\n"
      "Only model_name_or_path and dataset_mixer are required. Relative paths of inputs start at the file's "
      "folder.\n";
  absl::StrAppend(&text, OwnKeysHelp(), "\nOther names\n");
  for (const JobKeyAlias& alias : kAliases) AppendPair(&text, alias.alias, alias.name);
  absl::StrAppend(&text, "\nConverted, with a note\n");
  for (const ConvertedJobKey& converted : kConverted) AppendPair(&text, converted.name, converted.becomes);
  absl::StrAppend(&text, "\nAccepted without effect, with a note of what happens instead\n");
  for (const IgnoredJobKey& ignored : kIgnored) AppendPair(&text, ignored.name, ignored.instead);
  absl::StrAppend(&text, "\nRefused, unless switched off\n");
  for (const RefusedJobKey& refused : kRefused) AppendPair(&text, refused.name, refused.reason);
  return text;
}

}  // namespace simpo
