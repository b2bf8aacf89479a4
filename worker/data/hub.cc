#include "worker/data/hub.h"

#include <fnmatch.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/atomic_file.h"
#include "common/status_macros.h"
#include "worker/data/ffi_bytes.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Names = std::vector<std::string>;

constexpr char kWeights[] = "model.safetensors";
constexpr char kIndex[] = "model.safetensors.index.json";
constexpr int64_t kMaxTextBytes = 64 << 20;

struct Repo {
  const char* kind;  // "model", "dataset"
  const std::string& id;
  std::string revision;
  HubAccess access;
};

// What a revision holds.
struct Listing {
  std::string commit;
  fs::path folder;
  Names files;
  std::set<std::string> present;  // in the cache; known only where the hub is not asked
  std::string why_cached;         // empty: the hub is asked

  bool Has(const std::string& name) const { return std::find(files.begin(), files.end(), name) != files.end(); }
};

Json Request(const Repo& repo) {
  return {{"kind", repo.kind},
          {"repo", repo.id},
          {"revision", repo.revision},
          {"cache_only", repo.access == HubAccess::kCacheOnly}};
}

absl::StatusOr<Json> Call(int (*function)(const uint8_t*, size_t, SimpoBytes*), const Json& request) {
  const std::string text = request.dump();
  SimpoBytes reply{};
  const int code = function(BytePtr(text), text.size(), &reply);
  const std::string answer = TakeBytes(reply);
  if (code != 0) return absl::Status(static_cast<absl::StatusCode>(code), answer);
  return Json::parse(answer);
}

absl::StatusOr<Listing> List(const Repo& repo) {
  SIMPO_ASSIGN_OR_RETURN(const Json answer, Call(simpo_hub_list, Request(repo)));
  Listing listing{.commit = answer["commit"], .folder = answer["folder"].get<std::string>(), .files = answer["files"]};
  if (answer.contains("why_cached")) {
    listing.present = answer["present"].get<std::set<std::string>>();
    listing.why_cached = answer["why_cached"];
  }
  return listing;
}

std::string Name(const Repo& repo) {
  return absl::StrCat(std::string_view(repo.kind) == "dataset" ? "data set " : "model ", repo.id);
}

std::string Source(const Repo& repo, const Listing& listing) {
  return absl::StrCat(repo.id, ", revision ", repo.revision, ", commit ", listing.commit);
}

// Afterwards the files are in the folder.
absl::Status Fetch(const Repo& repo, const Listing& listing, const Names& names) {
  if (listing.why_cached.empty()) {
    Json request = Request(repo);
    request["commit"] = listing.commit;
    request["files"] = names;
    return Call(simpo_hub_fetch, request).status();
  }
  Names missing;
  std::copy_if(names.begin(), names.end(), std::back_inserter(missing),
               [&](const std::string& name) { return !listing.present.contains(name); });
  if (missing.empty()) return absl::OkStatus();
  const bool wanted = listing.why_cached.starts_with("HF_");
  return absl::Status(
      wanted ? absl::StatusCode::kNotFound : absl::StatusCode::kUnavailable,
      absl::StrCat(Name(repo), ", commit ", listing.commit, ": ", listing.why_cached, ", and the cache lacks ",
                   absl::StrJoin(missing, ", "), " (", listing.folder.string(),
                   "). Fetch it where the hub can be reached, with `simpo-worker prepare --job ...` or `hf download ",
                   repo.id, std::string_view(repo.kind) == "dataset" ? " --repo-type dataset" : "", " --revision ",
                   listing.commit, "`"));
}

bool HasSafetensors(const Listing& listing) { return listing.Has(kWeights) || listing.Has(kIndex); }

Names Among(const Listing& listing, const Names& wanted) {
  Names names;
  std::copy_if(wanted.begin(), wanted.end(), std::back_inserter(names),
               [&](const std::string& name) { return listing.Has(name); });
  return names;
}

Names TokenizerFiles(const Listing& listing) {
  return Among(listing, {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                         "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"});
}

// The revision to take where a repository has no safetensors: that of the hub's conversion.
absl::StatusOr<Repo> FindConversion(const Repo& repo, const Listing& listing) {
  const bool pickle = std::any_of(listing.files.begin(), listing.files.end(), [](const std::string& name) {
    return name.starts_with("pytorch_model") && name.find(".bin") != std::string::npos;
  });
  if (!pickle && listing.why_cached.empty()) {
    return absl::NotFoundError(absl::StrCat(Name(repo), ", revision ", repo.revision, " has neither ", kWeights,
                                            " nor ", kIndex, ": it is not a model in the form of transformers"));
  }
  SIMPO_ASSIGN_OR_RETURN(const Json found, Call(simpo_hub_conversion, Request(repo)));
  if (found.contains("revision")) return Repo{repo.kind, repo.id, found["revision"], repo.access};
  if (!listing.why_cached.empty()) {
    SIMPO_RETURN_IF_ERROR(Fetch(repo, listing, {kWeights}));
  }
  const bool closed = found.contains("closed") && found["closed"].is_string();
  return absl::NotFoundError(absl::StrCat(
      Name(repo), ", revision ", repo.revision,
      " has only pickle files (pytorch_model.bin), which can run code when they are read, and ",
      closed ? absl::StrCat("its owners closed the hub's conversion to safetensors; to take it nevertheless, set "
                            "model_revision: ",
                            found["closed"].get<std::string>())
             : "no conversion to safetensors by the hub. Ask for one at "
               "https://huggingface.co/spaces/safetensors/convert, "
               "or convert it where you trust it: from_pretrained(...).save_pretrained(folder)"));
}

// model.safetensors, or the index and its shards (the single file wins, as in ModelWeightsReader).
absl::Status FetchWeights(const Repo& repo, const Listing& listing) {
  if (listing.Has(kWeights)) return Fetch(repo, listing, {kWeights});
  SIMPO_RETURN_IF_ERROR(Fetch(repo, listing, {kIndex}));
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(listing.folder / kIndex, kMaxTextBytes));
  const Json index = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  std::set<std::string> shards;
  if (index.is_object() && index.contains("weight_map") && index["weight_map"].is_object()) {
    for (const auto& [tensor, file] : index["weight_map"].items()) {
      if (file.is_string()) shards.insert(file.get<std::string>());
    }
  }
  if (shards.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(Name(repo), ": ", (listing.folder / kIndex).string(), " names no files (no weight_map)"));
  }
  for (const std::string& shard : shards) {
    if (shard.ends_with(".safetensors") && (listing.Has(shard) || !listing.why_cached.empty())) continue;
    return absl::InvalidArgumentError(absl::StrCat(Name(repo), ": ", kIndex, " names '", shard,
                                                   "', which is no safetensors file of revision ", repo.revision));
  }
  return Fetch(repo, listing, Names(shards.begin(), shards.end()));
}

void NoteCached(const Repo& repo, const Listing& listing, Names* notes) {
  if (listing.why_cached.empty() || repo.access == HubAccess::kCacheOnly) return;
  notes->push_back(
      absl::StrCat(Name(repo), ": ", listing.why_cached, "; the cached commit ", listing.commit, " is used"));
}

// --- data sets

constexpr const char* kForms[] = {".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz"};

// The data files of the best form among them.
Names OfOneForm(const Names& files) {
  for (const std::string_view form : kForms) {
    Names names;
    std::copy_if(files.begin(), files.end(), std::back_inserter(names), [&](const std::string& name) {
      return name.ends_with(form) && !name.starts_with("dataset_info") && !name.starts_with('.');
    });
    std::sort(names.begin(), names.end());
    if (!names.empty()) return names;
  }
  return {};
}

// train.jsonl, data/train-00000-of-00002.parquet, train/0000.parquet, below `folder`.
bool IsNamedAfter(std::string_view file, std::string_view folder, std::string_view split) {
  if (!file.starts_with(folder)) return false;
  file.remove_prefix(folder.size());
  if (file.starts_with("data/")) file.remove_prefix(5);
  if (!file.starts_with(split) || file.size() == split.size()) return false;
  const std::string_view rest = file.substr(split.size());
  return rest[0] == '/' || ((rest[0] == '.' || rest[0] == '-') && rest.find('/') == rest.npos);
}

Names NamedAfter(const Names& files, std::string_view folder, const std::string& split) {
  Names names;
  std::copy_if(files.begin(), files.end(), std::back_inserter(names),
               [&](const std::string& name) { return IsNamedAfter(name, folder, split); });
  return OfOneForm(names);
}

// The YAML between the first two lines of dashes.
YAML::Node FrontMatter(std::string_view readme) {
  if (!readme.starts_with("---")) return {};
  const size_t end = readme.find("\n---", 3);
  if (end == readme.npos) return {};
  try {
    return YAML::Load(std::string(readme.substr(3, end - 3)));
  } catch (const YAML::Exception&) {
    return {};  // a README that datasets cannot read either says nothing
  }
}

std::string Text(const YAML::Node& node) { return node && node.IsScalar() ? node.Scalar() : ""; }

// The entry of `configs` that is asked for; none where README names none.
absl::StatusOr<YAML::Node> FindConfig(const YAML::Node& configs, const std::string& config) {
  Names names;
  YAML::Node chosen(YAML::NodeType::Undefined);
  for (const YAML::Node& entry : configs) {
    if (!entry.IsMap()) continue;
    const std::string name = Text(entry["config_name"]);
    names.push_back(name);
    const bool is_default = Text(entry["default"]) == "true" || (name == "default" && !chosen.IsDefined());
    if (config.empty() ? is_default : name == config) chosen.reset(entry);
  }
  if (chosen.IsDefined() || (names.empty() && config.empty())) return chosen;
  if (config.empty() && names.size() == 1) return configs[0];
  return absl::InvalidArgumentError(
      absl::StrCat(config.empty() ? "has several configurations" : absl::StrCat("has no configuration '", config, "'"),
                   "; set dataset_configs to one of ", absl::StrJoin(names, ", ")));
}

// The patterns of a configuration's data_files for a split; a list without splits is the training split.
Names Patterns(const YAML::Node& data_files, const std::string& split) {
  Names patterns;
  const auto add = [&](const YAML::Node& node) {
    if (node.IsScalar()) patterns.push_back(node.Scalar());
    if (!node.IsSequence()) return;
    for (const YAML::Node& item : node) {
      if (item.IsScalar()) patterns.push_back(item.Scalar());
    }
  };
  if (data_files.IsScalar() && split == "train") add(data_files);
  if (data_files.IsMap() && data_files[split]) add(data_files[split]);
  if (!data_files.IsSequence()) return patterns;
  for (const YAML::Node& item : data_files) {
    if (item.IsScalar() && split == "train") add(item);
    if (item.IsMap() && Text(item["split"]) == split && item["path"]) add(item["path"]);
  }
  return patterns;
}

Names Matching(const Names& files, const std::string& folder, const Names& patterns) {
  Names names;
  for (const std::string& file : files) {
    const bool matches = std::any_of(patterns.begin(), patterns.end(), [&](const std::string& pattern) {
      const bool any_depth = pattern.find("**") != pattern.npos;
      return fnmatch((folder + pattern).c_str(), file.c_str(), any_depth ? 0 : FNM_PATHNAME) == 0;
    });
    if (matches) names.push_back(file);
  }
  return OfOneForm(names);
}

absl::Status NoSplit(const Repo& repo, const Listing& listing, const std::string& split) {
  Names files;
  std::copy_if(listing.files.begin(), listing.files.end(), std::back_inserter(files),
               [](const std::string& name) { return !name.starts_with('.') && !name.ends_with(".md"); });
  const size_t shown = std::min<size_t>(files.size(), 12);
  return absl::NotFoundError(
      absl::StrCat(Name(repo), ", revision ", repo.revision, " has no split '", split, "' among its files (",
                   absl::StrJoin(files.begin(), files.begin() + static_cast<ptrdiff_t>(shown), ", "),
                   shown < files.size() ? ", ..." : "",
                   "): name its splits with dataset_splits, its configuration with "
                   "dataset_configs"));
}

// The hub's own conversion of any data set to Parquet: <config>/<split>/0000.parquet. No files where there
// is none.
absl::StatusOr<HubFiles> FetchConvertedSplit(const Repo& original, const Listing& main, const std::string& config,
                                             const std::string& split) {
  const Repo repo{original.kind, original.id, "refs/convert/parquet", original.access};
  const absl::StatusOr<Listing> listing = List(repo);
  if (absl::IsNotFound(listing.status()) || (!listing.ok() && !main.why_cached.empty())) return HubFiles{};
  SIMPO_RETURN_IF_ERROR(listing.status());
  const Names names = NamedAfter(listing->files, config.empty() ? "default/" : config + "/", split);
  if (names.empty()) return HubFiles{};
  SIMPO_RETURN_IF_ERROR(Fetch(repo, *listing, names));
  HubFiles result{.folder = listing->folder, .source = Source(repo, *listing)};
  for (const std::string& name : names) result.files.push_back(listing->folder / name);
  result.notes.push_back(absl::StrCat(Name(repo), " has no files with the name of the split ", split,
                                      "; the hub's own conversion to Parquet is used"));
  return result;
}

}  // namespace

bool IsHubDataset(std::string_view name) { return IsHubId(name.substr(0, name.find('@'))); }

bool IsHubId(std::string_view name) {
  const size_t slash = name.find('/');
  if (slash == name.npos || name.size() > 96) return false;
  const auto is_part = [](std::string_view part) {
    const auto plain = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; };
    return !part.empty() && plain(part.front()) && plain(part.back()) && part.find("..") == part.npos &&
           part.find("--") == part.npos &&
           std::all_of(part.begin(), part.end(), [&](char c) { return plain(c) || c == '-' || c == '.'; });
  };
  return is_part(name.substr(0, slash)) && is_part(name.substr(slash + 1));
}

absl::StatusOr<HubFiles> FetchModel(const std::string& id, const std::string& revision, HubAccess access,
                                    const std::function<absl::Status(const fs::path&)>& check_config) {
  Repo repo{"model", id, revision, access};
  HubFiles result;
  SIMPO_ASSIGN_OR_RETURN(Listing listing, List(repo));
  if (!HasSafetensors(listing)) {
    SIMPO_ASSIGN_OR_RETURN(const Repo conversion, FindConversion(repo, listing));
    SIMPO_ASSIGN_OR_RETURN(listing, List(conversion));
    result.notes.push_back(absl::StrCat(Name(repo), ", revision ", revision,
                                        " has only pickle files; the hub's own conversion to safetensors is used: "
                                        "revision ",
                                        conversion.revision, ", commit ", listing.commit,
                                        ". To pin it, set model_revision: ", listing.commit));
    repo.revision = conversion.revision;
    if (!HasSafetensors(listing)) {
      return absl::NotFoundError(absl::StrCat(Name(repo), ", revision ", repo.revision, " has no ", kWeights));
    }
  }
  if (listing.why_cached.empty() && !listing.Has("config.json")) {
    return absl::NotFoundError(absl::StrCat(Name(repo), ", revision ", repo.revision,
                                            " has no config.json: it is not a model in the form of transformers"));
  }
  Names first = {"config.json"};
  for (const std::string& name : Among(listing, {"generation_config.json"})) first.push_back(name);
  SIMPO_RETURN_IF_ERROR(Fetch(repo, listing, first));
  SIMPO_RETURN_IF_ERROR(check_config(listing.folder));
  SIMPO_RETURN_IF_ERROR(Fetch(repo, listing, TokenizerFiles(listing)));
  SIMPO_RETURN_IF_ERROR(FetchWeights(repo, listing));
  NoteCached(repo, listing, &result.notes);
  result.folder = listing.folder;
  result.source = Source(repo, listing);
  return result;
}

absl::StatusOr<HubFiles> FetchTokenizer(const std::string& id, const std::string& revision, HubAccess access) {
  const Repo repo{"model", id, revision, access};
  SIMPO_ASSIGN_OR_RETURN(const Listing listing, List(repo));
  if (listing.why_cached.empty() && !listing.Has("tokenizer.json")) {
    return absl::NotFoundError(absl::StrCat(Name(repo), ", revision ", revision, " has no tokenizer.json"));
  }
  HubFiles result{.folder = listing.folder, .source = Source(repo, listing)};
  SIMPO_RETURN_IF_ERROR(Fetch(repo, listing, TokenizerFiles(listing)));
  if (!listing.why_cached.empty()) SIMPO_RETURN_IF_ERROR(Fetch(repo, listing, {"tokenizer.json"}));
  NoteCached(repo, listing, &result.notes);
  return result;
}

absl::StatusOr<Names> SplitFiles(const Names& files, std::string_view readme, const std::string& config,
                                 const std::string& split) {
  const YAML::Node front = FrontMatter(readme);
  const YAML::Node configs = front.IsMap() ? front["configs"] : YAML::Node(YAML::NodeType::Undefined);
  if (configs.IsDefined() && configs.IsSequence() && configs.size() > 0) {
    SIMPO_ASSIGN_OR_RETURN(const YAML::Node entry, FindConfig(configs, config));
    std::string folder = Text(entry["data_dir"]);
    if (!folder.empty() && !folder.ends_with('/')) folder += '/';
    if (const YAML::Node data_files = entry["data_files"]) return Matching(files, folder, Patterns(data_files, split));
    return NamedAfter(files, folder, split);
  }
  if (!config.empty()) {
    Names named = NamedAfter(files, config + "/", split);
    if (named.empty()) named = NamedAfter(files, absl::StrCat("data/", config, "/"), split);
    return named;
  }
  Names named = NamedAfter(files, "", split);
  if (!named.empty() || split != "train") return named;
  // One file whose name says nothing is the training split.
  Names all = OfOneForm(files);
  return all.size() == 1 && all[0].find("test") == std::string::npos ? all : Names();
}

absl::StatusOr<HubFiles> FetchSplit(const std::string& source, const std::string& config, const std::string& split,
                                    bool required, HubAccess access) {
  const size_t at = source.find('@');
  const std::string id = source.substr(0, at);
  const Repo repo{"dataset", id, at == source.npos ? "main" : source.substr(at + 1), access};
  SIMPO_ASSIGN_OR_RETURN(const Listing listing, List(repo));
  std::string readme;
  if (listing.Has("README.md")) {
    SIMPO_RETURN_IF_ERROR(Fetch(repo, listing, {"README.md"}));
    SIMPO_ASSIGN_OR_RETURN(readme, ReadFile(listing.folder / "README.md", kMaxTextBytes));
  }
  absl::StatusOr<Names> names = SplitFiles(listing.files, readme, config, split);
  if (!names.ok()) return absl::Status(names.status().code(), absl::StrCat(Name(repo), " ", names.status().message()));
  if (names->empty()) {
    HubFiles converted;
    if (repo.revision == "main") {
      SIMPO_ASSIGN_OR_RETURN(converted, FetchConvertedSplit(repo, listing, config, split));
    }
    if (converted.files.empty() && required) return NoSplit(repo, listing, split);
    return converted;
  }
  SIMPO_RETURN_IF_ERROR(Fetch(repo, listing, *names));
  HubFiles result{.folder = listing.folder, .source = Source(repo, listing)};
  for (const std::string& name : *names) result.files.push_back(listing.folder / name);
  NoteCached(repo, listing, &result.notes);
  return result;
}

}  // namespace simpo
