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

constexpr int64_t kFormat = 1;
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

CheckpointManifest::Slot ParseSlot(const Json& json, JsonFields& parent) {
  JsonFields fields(json, "slot");
  CheckpointManifest::Slot slot;
  slot.name = fields.Text("name");
  slot.offset = fields.Integer("offset", 0, kMaxElements);
  for (const Json& size : fields.Array("shape")) {
    if (!size.is_number_unsigned()) fields.Fail("shape", "must be whole numbers");
    if (fields.status().ok()) slot.shape.push_back(size.get<int64_t>());
  }
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

CheckpointManifest ParseManifest(const Json& json, JsonFields& fields) {
  CheckpointManifest manifest;
  if (fields.Integer("format", 0, kMaxElements) != kFormat) {
    fields.Fail("format", absl::StrCat("is not ", kFormat, ", which this program reads"));
  }
  manifest.state = ParseState(fields);
  manifest.world_size = static_cast<int>(fields.Integer("world_size", 1, kMaxRanks));
  manifest.zero_stage = static_cast<int>(fields.Integer("zero_stage", 0, 3));
  for (const Json& bucket : fields.Array("buckets")) {
    manifest.buckets.push_back(ParseLayout(bucket, fields));
  }
  for (const Json& item : fields.Array("files")) {
    JsonFields file(item, "files");
    manifest.files.push_back({file.Text("name"), file.Integer("bytes", 0, kMaxElements), file.Text("sha256")});
    const auto rank = static_cast<int>(manifest.files.size()) - 1;
    if (manifest.files.back().name != CheckpointShardName(rank, manifest.world_size)) {
      file.Fail("name", "is not this rank's");
    }
    fields.Merge(file);
  }
  if (manifest.files.size() != static_cast<size_t>(manifest.world_size)) {
    fields.Fail("files", "must be one per rank");
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
                      {"buckets", OrderedJson::array()},
                      {"files", OrderedJson::array()}};
  for (const auto& [key, value] : state.extra) json["extra"][key] = FormatDouble(value);
  for (const CheckpointManifest::Layout& bucket : manifest.buckets) {
    OrderedJson slots = OrderedJson::array();
    for (const CheckpointManifest::Slot& slot : bucket.slots) {
      slots.push_back({{"name", slot.name}, {"shape", slot.shape}, {"offset", slot.offset}});
    }
    json["buckets"].push_back({{"name", bucket.name}, {"shard_numel", bucket.shard_numel}, {"slots", slots}});
  }
  for (const CheckpointManifest::File& file : manifest.files) {
    json["files"].push_back({{"name", file.name}, {"bytes", file.bytes}, {"sha256", file.sha256}});
  }
  json[kDigestKey] = std::string(kDigestLength, '0');
  std::string text = json.dump(1) + "\n";
  const std::string digest = Sha256(text);
  return text.replace(FindDigest(text), kDigestLength, digest);
}

absl::StatusOr<CheckpointManifest> ReadManifest(const fs::path& path) {
  const std::string where = (path / "manifest.json").string();
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(where, kMaxBytes));
  std::string unsigned_text = text;
  const size_t digest = FindDigest(text);
  if (digest != std::string::npos) {
    unsigned_text.replace(digest, kDigestLength, kDigestLength, '0');
  }
  if (digest == std::string::npos || Sha256(unsigned_text) != text.substr(digest, kDigestLength)) {
    return absl::DataLossError(absl::StrCat(where, " is damaged: its ", kDigestKey, " is not that of its text"));
  }
  const absl::StatusOr<Json> json = ParseJsonObject(text, where);
  if (!json.ok()) return absl::DataLossError(json.status().message());
  JsonFields fields(*json, where);
  CheckpointManifest manifest = ParseManifest(*json, fields);
  if (!fields.status().ok()) return absl::DataLossError(fields.status().message());
  return manifest;
}

absl::Status CheckShardFiles(const fs::path& path, const CheckpointManifest& manifest, size_t first, size_t stride) {
  for (size_t i = first; i < manifest.files.size(); i += stride) {
    const CheckpointManifest::File& file = manifest.files[i];
    const fs::path name = path / file.name;
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
