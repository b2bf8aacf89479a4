// Which files of a data source hold a split.
#include <glob.h>
#include <unistd.h>

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/host_name.h"
#include "common/status_macros.h"
#include "common/text.h"
#include "worker/data/row_files.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Paths = std::vector<fs::path>;

// train.jsonl, train-00000-of-00002.parquet
bool CarriesName(const fs::path& path, const std::string& split) {
  const std::string name = path.filename().string();
  return name.starts_with(split) &&
         (name.size() == split.size() || name[split.size()] == '.' || name[split.size()] == '-');
}

Paths FilesIn(const fs::path& folder) {
  Paths files;
  std::error_code error;
  for (const auto& item : fs::directory_iterator(folder, error)) {
    if (item.is_regular_file(error) && !item.path().filename().string().starts_with(".")) files.push_back(item.path());
  }
  return files;
}

// In the folder itself, its data/, and in folders of the split's name.
Paths SplitFilesOf(const fs::path& folder, const std::string& split) {
  Paths found;
  for (const fs::path& base : {folder, folder / "data"}) {
    for (const fs::path& file : FilesIn(base)) {
      if (CarriesName(file, split)) found.push_back(file);
    }
    for (const fs::path& file : FilesIn(base / split)) {
      if (IsRowFile(file)) found.push_back(file);
    }
  }
  return found;
}

absl::StatusOr<Paths> FilesOfFolder(const fs::path& source, const SplitQuery& query) {
  if (!query.config.empty()) {
    Paths files = SplitFilesOf(source / query.config, query.split);
    if (files.empty()) files = SplitFilesOf(source / "data" / query.config, query.split);
    std::error_code error;
    if (files.empty() && !fs::is_directory(source / query.config, error) &&
        !fs::is_directory(source / "data" / query.config, error) && query.config != "default") {
      return absl::NotFoundError(absl::StrCat("dataset '", source.string(), "' has no folder ", query.config,
                                              ", which dataset_configs names"));
    }
    if (!files.empty() || query.config != "default") return files;
  }
  Paths files = SplitFilesOf(source, query.split);
  if (!files.empty()) return files;
  std::set<std::string> configs;
  std::error_code error;
  for (const auto& item : fs::directory_iterator(source, error)) {
    if (!item.is_directory(error)) continue;
    Paths more = SplitFilesOf(item.path(), query.split);
    if (more.empty()) continue;
    configs.insert(item.path().filename().string());
    files = std::move(more);
  }
  if (configs.contains("default")) return SplitFilesOf(source / "default", query.split);
  if (configs.size() <= 1) return files;
  return absl::InvalidArgumentError(absl::StrCat("dataset '", source.string(), "' has the split ", query.split,
                                                 " in several configurations (", absl::StrJoin(configs, ", "),
                                                 "); choose one with dataset_configs"));
}

// Files of a glob that carry names of splits are chosen by them; others all belong to the query that
// takes unnamed files.
absl::StatusOr<Paths> FilesOfGlob(const fs::path& pattern, const SplitQuery& query) {
  glob_t matches{};
  const int code = glob(pattern.c_str(), 0, nullptr, &matches);
  Paths all(matches.gl_pathv, matches.gl_pathv + (code == 0 ? matches.gl_pathc : 0));
  globfree(&matches);
  if (all.empty()) return absl::NotFoundError(absl::StrCat("dataset '", pattern.string(), "' matches no file"));
  Paths named;
  for (const fs::path& path : all) {
    if (CarriesName(path, query.split) || path.parent_path().filename() == query.split) named.push_back(path);
  }
  if (!named.empty() || !query.unnamed) return named;
  return all;
}

}  // namespace

absl::StatusOr<Paths> FindSplitFiles(const fs::path& source, const SplitQuery& query) {
  std::error_code error;
  Paths files;
  if (fs::is_regular_file(source, error)) {
    if (query.unnamed) files.push_back(source);
  } else if (fs::is_directory(source, error)) {
    SIMPO_ASSIGN_OR_RETURN(files, FilesOfFolder(source, query));
  } else if (IsGlob(source.string())) {
    SIMPO_ASSIGN_OR_RETURN(files, FilesOfGlob(source, query));
  } else {
    return absl::NotFoundError(absl::StrCat(
        "dataset '", source.string(), "' is neither a file nor a folder on ", HostName(),
        ". Give the path of a .jsonl, .json, .csv or .parquet file, or of a folder with train.jsonl or the like."));
  }
  // Others, a README say, are no data, unless they are all that there is.
  if (std::any_of(files.begin(), files.end(), IsRowFile))
    std::erase_if(files, [](const fs::path& f) { return !IsRowFile(f); });
  std::sort(files.begin(), files.end());
  std::set<std::string> forms;
  for (const fs::path& file : files)
    forms.insert((file.extension() == ".gz" ? file.stem() : file).extension().string());
  if (forms.size() > 1) {
    return absl::InvalidArgumentError(absl::StrCat("dataset '", source.string(), "' has the split ", query.split,
                                                   " as ", files.front().string(), " and as ", files.back().string(),
                                                   ": the same rows twice? Name one of them, or remove one."));
  }
  return files;
}

}  // namespace simpo
