#include "worker/shard/checkpoint_manifest.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/atomic_file.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/model/json_fields.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

constexpr int64_t kFormat = 2;  // 1 had neither compute_dtype nor hf_files
constexpr int64_t kMaxBytes = 256 << 20;
constexpr int64_t kMaxRanks = 1 << 20;
constexpr int64_t kMaxElements = int64_t{1} << 60;
constexpr size_t kDigestLength = 64;
constexpr const char* kDigestKey = "manifest_sha256";

// JSON has no numbers for these.
OrderedJson FormatDouble(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  return value;
}

bool ParseDouble(const Json& json, double* value) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const std::string text = json.is_string() ? json.get<std::string>() : "";
  if (json.is_number()) *value = json.get<double>();
  if (text == "NaN") *value = std::numeric_limits<double>::quiet_NaN();
  if (text == "Infinity") *value = kInfinity;
  if (text == "-Infinity") *value = -kInfinity;
  return json.is_number() || text == "NaN" || text == "Infinity" || text == "-Infinity";
}

TrainerState ParseState(JsonFields& fields) {
  TrainerState state;
  state.step = fields.Integer("step", 0, kMaxElements);
  state.steps_planned = fields.Integer("steps_planned", 0, kMaxElements);
  state.global_batch_size = fields.Integer("global_batch_size", 0, kMaxElements);
  state.pairs_seen = fields.Integer("pairs_seen", 0, kMaxElements);
  state.tokens_seen = fields.Integer("tokens_seen", 0, kMaxElements);
  state.seed = fields.Integer("seed", std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max());
  for (const auto& [key, value] : fields.Object("extra").items()) {
    if (!ParseDouble(value, &state.extra[key])) fields.Fail(key, "must be a number");
  }
  return state;
}

// Elements of a shape from a file; no more than kMaxElements + 1 are counted.
int64_t Numel(const std::vector<int64_t>& shape) {
  int64_t numel = 1;
  for (int64_t size : shape) {
    if (size < 0 || (size > 0 && numel > kMaxElements / size)) return kMaxElements + 1;
    numel *= size;
  }
  return numel;
}

// Whether every tensor lies within its bucket.
void CheckPlaces(const CheckpointManifest& manifest, JsonFields& fields) {
  for (const CheckpointManifest::Layout& bucket : manifest.buckets) {
    if (bucket.shard_numel > kMaxElements / manifest.world_size) return fields.Fail("shard_numel", "is too large");
    for (const CheckpointManifest::Slot& slot : bucket.slots) {
      if (slot.offset + Numel(slot.shape) > bucket.shard_numel * manifest.world_size) {
        return fields.Fail(slot.name, absl::StrCat("does not lie within its bucket ", bucket.name));
      }
    }
  }
}

CheckpointManifest::Slot ParseSlot(const Json& json, JsonFields& parent) {
  JsonFields fields(json, "slot");
  CheckpointManifest::Slot slot;
  slot.name = fields.Text("name");
  slot.offset = fields.Integer("offset", 0, kMaxElements);
  for (const Json& size : fields.Array("shape")) {
    if (!size.is_number_unsigned()) fields.Fail("shape", "must be whole numbers");
    if (fields.status().ok()) slot.shape.push_back(size.get<int64_t>());
  }
  if (fields.status().ok() && Numel(slot.shape) > kMaxElements) fields.Fail("shape", "is larger than any tensor");
  parent.Merge(fields);
  return slot;
}

CheckpointManifest::Layout ParseLayout(const Json& json, JsonFields& parent) {
  JsonFields fields(json, "buckets");
  CheckpointManifest::Layout layout;
  layout.name = fields.Text("name");
  layout.shard_numel = fields.Integer("shard_numel", 1, kMaxElements);
  for (const Json& slot : fields.Array("slots")) layout.slots.push_back(ParseSlot(slot, fields));
  parent.Merge(fields);
  return layout;
}

std::vector<CheckpointManifest::File> ParseFiles(JsonFields& parent, const char* key) {
  std::vector<CheckpointManifest::File> files;
  for (const Json& item : parent.Array(key)) {
    JsonFields file(item, key);
    files.push_back({file.Text("name"), file.Integer("bytes", 0, kMaxElements), file.Text("sha256")});
    parent.Merge(file);
  }
  return files;
}

OrderedJson FormatFiles(const std::vector<CheckpointManifest::File>& files) {
  OrderedJson json = OrderedJson::array();
  for (const auto& [name, bytes, sha256] : files) {
    json.push_back({{"name", name}, {"bytes", bytes}, {"sha256", sha256}});
  }
  return json;
}

CheckpointManifest ParseFields(JsonFields& fields) {
  CheckpointManifest manifest;
  const int64_t format = fields.Integer("format", 0, kMaxElements);
  if (format < 1 || format > kFormat) {
    fields.Fail("format", absl::StrCat("is ", format, "; this program reads 1 to ", kFormat));
  }
  manifest.state = ParseState(fields);
  manifest.world_size = static_cast<int>(fields.Integer("world_size", 1, kMaxRanks));
  manifest.zero_stage = static_cast<int>(fields.Integer("zero_stage", 0, 3));
  for (const Json& bucket : fields.Array("buckets")) {
    manifest.buckets.push_back(ParseLayout(bucket, fields));
  }
  if (fields.status().ok()) CheckPlaces(manifest, fields);
  manifest.files = ParseFiles(fields, "files");
  for (size_t i = 0; i < manifest.files.size(); ++i) {
    if (manifest.files[i].name != CheckpointShardName(static_cast<int>(i), manifest.world_size)) {
      fields.Fail("files", "has a name that is not its rank's");
    }
  }
  if (manifest.files.size() != static_cast<size_t>(manifest.world_size)) {
    fields.Fail("files", "must be one per rank");
  }
  if (format < 2) return manifest;
  manifest.compute_dtype = fields.Text("compute_dtype");
  if (manifest.compute_dtype != "float32" && manifest.compute_dtype != "bfloat16") {
    fields.Fail("compute_dtype", "must be float32 or bfloat16");
  }
  manifest.hf_files = ParseFiles(fields, "hf_files");
  for (const CheckpointManifest::File& file : manifest.hf_files) {
    if (file.name.empty() || file.name[0] == '.' || file.name.find('/') != std::string::npos) {
      fields.Fail("hf_files", "must be names of files");
    }
  }
  return manifest;
}

// Where the manifest's own digest stands in its text.
size_t FindDigest(const std::string& text) {
  const size_t key = text.rfind(kDigestKey);
  if (key == std::string::npos) return key;
  const size_t colon = text.find(':', key);
  const size_t quote = text.find('"', colon);
  return quote == std::string::npos || quote + 1 + kDigestLength > text.size() ? std::string::npos : quote + 1;
}

}  // namespace

std::string CheckpointShardName(int rank, int world_size) {
  return absl::StrFormat("shard-%05d-of-%05d.safetensors", rank, world_size);
}

std::string FormatManifest(const CheckpointManifest& manifest) {
  const TrainerState& state = manifest.state;
  OrderedJson json = {{"format", kFormat},
                      {"step", state.step},
                      {"steps_planned", state.steps_planned},
                      {"global_batch_size", state.global_batch_size},
                      {"pairs_seen", state.pairs_seen},
                      {"tokens_seen", state.tokens_seen},
                      {"seed", state.seed},
                      {"extra", OrderedJson::object()},
                      {"world_size", manifest.world_size},
                      {"zero_stage", manifest.zero_stage},
                      {"compute_dtype", manifest.compute_dtype},
                      {"buckets", OrderedJson::array()},
                      {"files", FormatFiles(manifest.files)},
                      {"hf_files", FormatFiles(manifest.hf_files)}};
  for (const auto& [key, value] : state.extra) json["extra"][key] = FormatDouble(value);
  for (const CheckpointManifest::Layout& bucket : manifest.buckets) {
    OrderedJson slots = OrderedJson::array();
    for (const CheckpointManifest::Slot& slot : bucket.slots) {
      slots.push_back({{"name", slot.name}, {"shape", slot.shape}, {"offset", slot.offset}});
    }
    json["buckets"].push_back({{"name", bucket.name}, {"shard_numel", bucket.shard_numel}, {"slots", slots}});
  }
  json[kDigestKey] = std::string(kDigestLength, '0');
  return SignManifest(json.dump(1) + "\n");
}

std::string SignManifest(std::string text) {
  const size_t digest = FindDigest(text);
  if (digest == std::string::npos) return text;
  text.replace(digest, kDigestLength, kDigestLength, '0');
  return text.replace(digest, kDigestLength, Sha256(text));
}

absl::StatusOr<CheckpointManifest> ReadManifest(const fs::path& path) {
  const std::string where = (path / "manifest.json").string();
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(where, kMaxBytes));
  return ParseManifest(text, where);
}

absl::StatusOr<CheckpointManifest> ParseManifest(const std::string& text, const std::string& where) {
  if (FindDigest(text) == std::string::npos || SignManifest(text) != text) {
    return absl::DataLossError(absl::StrCat(where, " is damaged: its ", kDigestKey, " is not that of its text"));
  }
  const absl::StatusOr<Json> json = ParseJsonObject(text, where);
  if (!json.ok()) return absl::DataLossError(json.status().message());
  JsonFields fields(*json, where);
  CheckpointManifest manifest = ParseFields(fields);
  if (!fields.status().ok()) return absl::DataLossError(fields.status().message());
  return manifest;
}

absl::Status CheckShardFiles(const fs::path& path, const CheckpointManifest& manifest, size_t first, size_t stride) {
  const size_t shards = manifest.files.size();
  for (size_t i = first; i < shards + manifest.hf_files.size(); i += stride) {
    const CheckpointManifest::File& file = i < shards ? manifest.files[i] : manifest.hf_files[i - shards];
    const fs::path name = i < shards ? path / file.name : path / kHfFilesFolder / file.name;
    std::error_code error;
    const auto size = static_cast<int64_t>(fs::file_size(name, error));
    if (error) {
      return absl::DataLossError(absl::StrCat("cannot read ", name.string(), ": ", error.message()));
    }
    if (size != file.bytes) {
      return absl::DataLossError(
          absl::StrCat(name.string(), " has ", size, " bytes where the manifest says ", file.bytes));
    }
    SIMPO_ASSIGN_OR_RETURN(const std::string digest, Sha256OfFile(name));
    if (digest != file.sha256) {
      return absl::DataLossError(absl::StrCat(name.string(), " is damaged: its SHA-256 is not the manifest's"));
    }
  }
  return absl::OkStatus();
}

}  // namespace simpo
