#ifndef SIMPO_COMMON_JOB_CONFIG_H_
#define SIMPO_COMMON_JOB_CONFIG_H_

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace simpo {

// A complete training job after parsing: every default filled in, every alias resolved, every
// relative input path absolute. What each key means, its default, unit and range stand once, in
// the table JobKeys(), which also prints `simpoctl help job-file`.
struct JobConfig {
  // --- the job
  std::string name;
  int32_t priority = 0;
  std::map<std::string, std::string> labels;
  int32_t max_restarts = 3;
  int64_t time_limit_s = 0;  // 0: none
  std::string launcher = "mpirun";

  // --- model and tokenizer
  std::string model_name_or_path;
  std::string model_revision = "main";
  std::string tokenizer_name_or_path;  // empty: the model's
  std::string chat_template;           // the template's text, or a path to a file; empty: the model's
  std::string torch_dtype = "auto";    // auto, float32, bfloat16

  // --- data
  std::vector<std::pair<std::string, double>> dataset_mixer;       // (path or hub id, fraction)
  std::vector<std::pair<std::string, double>> eval_dataset_mixer;  // empty: the mixer's own eval split
  std::vector<std::string> dataset_splits;                         // empty: train, and test if it is there
  std::vector<std::string> dataset_configs;
  int32_t preprocessing_num_workers = 0;  // 0: as many as cores
  bool shuffle = true;
  int64_t seed = 42;
  int32_t max_length = 2048;
  int32_t max_prompt_length = 0;  // 0: none
  std::string truncation_mode = "keep_end";
  std::string compat = "trl";
  bool drop_ties = false;

  // --- loss
  double beta = 2.0;
  double gamma_beta_ratio = 0.5;
  std::string loss_type = "sigmoid";  // sigmoid, hinge
  double label_smoothing = 0.0;
  double sft_weight = 0.0;

  // --- optimizer and schedule
  double learning_rate = 5e-7;
  std::string lr_scheduler_type = "cosine";  // cosine, linear, constant, constant_with_warmup
  double warmup_ratio = 0.1;
  int64_t warmup_steps = -1;  // -1: from warmup_ratio
  double weight_decay = 0.0;
  double adam_beta1 = 0.9;
  double adam_beta2 = 0.999;
  double adam_epsilon = 1e-8;
  double max_grad_norm = 1.0;  // 0: no clipping
  double num_train_epochs = 1.0;
  int64_t max_steps = -1;  // -1: from num_train_epochs

  // --- batches: global_batch_size = per_device x accumulation x ranks, or given
  int32_t per_device_train_batch_size = 0;  // 0: not given
  int32_t per_device_eval_batch_size = 0;   // 0: not given
  int32_t gradient_accumulation_steps = 0;  // 0: not given
  int32_t global_batch_size = 128;          // always filled in by the parser
  int32_t max_tokens_per_micro_batch = 0;   // 0: chosen by the trainer
  bool gradient_checkpointing = false;

  // --- sharding and placement
  int32_t zero_stage = 1;
  std::string offload_optimizer = "none";
  std::string reduce_dtype = "float32";
  bool deterministic = false;
  int32_t nodes = 1;
  int32_t ranks_per_node = 1;
  std::string device = "cpu";    // cpu, cuda
  int32_t threads_per_rank = 0;  // 0: cores / ranks of the node

  // --- evaluation, saving, logging
  bool do_eval = true;
  bool eval_on_start = false;
  std::string eval_strategy = "end";  // no, end (ours), steps, epoch
  int64_t eval_steps = 0;
  std::string save_strategy = "end";  // no, end (ours), steps, epoch
  int64_t save_steps = 0;
  int32_t save_total_limit = 0;  // 0: all are kept
  bool load_best_model_at_end = false;
  std::string metric_for_best_model = "eval_loss";
  std::string greater_is_better;  // "true", "false", or empty: by the metric's name
  int64_t logging_steps = 1;
  double recovery_minutes = 10;
  std::string output_dir;  // as given; empty: the server or the worker chooses
  bool overwrite_output_dir = false;
  std::string resume_from_checkpoint;  // a checkpoint folder, "true" (the newest of output_dir) or empty

  int32_t Ranks() const { return nodes * ranks_per_node; }
  bool operator==(const JobConfig&) const = default;
};

// One row of the table of keys.
struct JobKey {
  std::string_view name;      // as written in a job file; nested as "resources.nodes"
  std::string_view type;      // "string", "integer", "number", "boolean", "list", "map", "duration"
  std::string_view fallback;  // the default, as it would be written
  std::string_view unit;      // "", "tokens", "seconds", ...
  std::string_view range;     // "> 0", "0 to 1", "sigmoid | hinge", ...
  std::string_view section;   // heading in the help
  std::string_view help;      // one or two sentences
};

// Every key that a job file may contain, in the order of the help.
std::vector<JobKey> JobKeys();

// The text of `simpoctl help job-file`.
std::string JobFileHelp();

}  // namespace simpo

#endif  // SIMPO_COMMON_JOB_CONFIG_H_
