#ifndef SIMPO_WORKER_MODEL_READ_MODEL_CONFIG_H_
#define SIMPO_WORKER_MODEL_READ_MODEL_CONFIG_H_

#include <filesystem>

#include "absl/status/statusor.h"
#include "worker/model/model_config.h"

namespace simpo {

// Reads `model_dir`/config.json (and generation_config.json when present). An unknown family or a
// field whose value is not supported is INVALID_ARGUMENT that names file, field and value.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::filesystem::path& model_dir);

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_READ_MODEL_CONFIG_H_
