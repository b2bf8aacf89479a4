#ifndef SIMPO_WORKER_DATA_HUB_H_
#define SIMPO_WORKER_DATA_HUB_H_

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace simpo {

// Models and data sets of the Hugging Face hub, in the cache that huggingface_hub uses too. Settings come
// from the environment: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE (docs/hub.md). Errors: NOT_FOUND,
// PERMISSION_DENIED (gated), UNAVAILABLE (network), RESOURCE_EXHAUSTED (disk), DATA_LOSS (checksum).

// Who may download: one process of a machine; the others take what it left in the cache.
enum class HubAccess { kDownload, kCacheOnly };

// Whether `name` has the form "owner/name" of a hub repository.
bool IsHubId(std::string_view name);

// Whether `name` is one of a data set's: "owner/name", or "owner/name@revision" with a branch, tag or commit.
bool IsHubDataset(std::string_view name);

struct HubFiles {
  std::filesystem::path folder;              // the snapshot, which may hold other files as well
  std::vector<std::filesystem::path> files;  // what was asked for, in reading order; of data sets only
  std::string source;                        // "org/name, revision main, commit 0123..."
  std::vector<std::string> notes;            // what was done otherwise than asked, for the user
};

// A model folder with config.json, tokenizer and safetensors. `check_config` is called with the folder when
// only config.json and generation_config.json are there; its error ends the download. Where a repository
// holds pickle files only, the hub's own conversion to safetensors is taken and noted.
absl::StatusOr<HubFiles> FetchModel(const std::string& id, const std::string& revision, HubAccess access,
                                    const std::function<absl::Status(const std::filesystem::path&)>& check_config);

// The tokenizer files of a model.
absl::StatusOr<HubFiles> FetchTokenizer(const std::string& id, const std::string& revision, HubAccess access);

// The files of a data set (IsHubDataset) that carry `split` of a configuration (empty: the data set's default).
// Where it has no such split, nor the hub's own conversion to Parquet (of the revision main): NOT_FOUND if it is
// `required`, else no files.
absl::StatusOr<HubFiles> FetchSplit(const std::string& source, const std::string& config, const std::string& split,
                                    bool required, HubAccess access);

// Which of a repository's files carry a split, as `datasets` decides it: what the front matter of its README
// says, else folders and files with the split's name (within a folder `config`, if one is asked for). Of
// several forms one is taken: Parquet, JSON Lines, JSON, CSV. INVALID_ARGUMENT where README names configurations and
// `config` is none of them.
absl::StatusOr<std::vector<std::string>> SplitFiles(const std::vector<std::string>& files, std::string_view readme,
                                                    const std::string& config, const std::string& split);

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_HUB_H_
