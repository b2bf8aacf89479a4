#include "worker/model/json_fields.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

using Json = nlohmann::json;

constexpr int kMaxDepth = 32;

}  // namespace

JsonFields::JsonFields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
  if (!object_.is_object()) Fail("value", "must be a JSON object");
}

bool JsonFields::Has(const char* key) const {
  const auto it = object_.find(key);
  return it != object_.end() && !it->is_null();
}

void JsonFields::Fail(const std::string& field, const std::string& problem) {
  if (status_.ok()) {
    status_ = absl::InvalidArgumentError(absl::StrCat(where_, ": ", field, ": ", problem));
  }
}

bool JsonFields::Given(const char* key, bool has_fallback) {
  if (Has(key)) return true;
  if (!has_fallback) Fail(key, "is missing");
  return false;
}

int64_t JsonFields::Integer(const char* key, int64_t low, int64_t high, std::optional<int64_t> fallback) {
  if (!Given(key, fallback.has_value())) return fallback.value_or(0);
  const Json& field = object_[key];
  if (!field.is_number_integer()) {
    Fail(key, "must be a whole number");
    return fallback.value_or(0);
  }
  const bool too_large = field.is_number_unsigned() && field.get<uint64_t>() > INT64_MAX;
  const int64_t value = too_large ? INT64_MAX : field.get<int64_t>();
  if (too_large || value < low || value > high) {
    Fail(key, absl::StrCat(field.dump(), " is not within ", low, " to ", high));
    return fallback.value_or(0);
  }
  return value;
}

double JsonFields::Positive(const char* key, std::optional<double> fallback) {
  if (!Given(key, fallback.has_value())) return fallback.value_or(0);
  const Json& field = object_[key];
  const double value = field.is_number() ? field.get<double>() : 0;
  if (value > 0) return value;
  Fail(key, "must be a number above 0");
  return fallback.value_or(0);
}

bool JsonFields::Bool(const char* key, bool fallback) {
  if (!Has(key)) return fallback;
  if (object_[key].is_boolean()) return object_[key].get<bool>();
  Fail(key, "must be true or false");
  return fallback;
}

std::string JsonFields::Text(const char* key, const std::optional<std::string>& fallback) {
  if (!Given(key, fallback.has_value())) return fallback.value_or("");
  if (object_[key].is_string()) return object_[key].get<std::string>();
  Fail(key, "must be a string");
  return fallback.value_or("");
}

const Json& JsonFields::Member(const char* key, bool right_type, const char* expected, const Json& fallback) {
  if (right_type) return object_[key];
  Fail(key, Has(key) ? expected : "is missing");
  return fallback;
}

const Json& JsonFields::Array(const char* key) {
  static const Json empty = Json::array();
  return Member(key, Has(key) && object_[key].is_array(), "must be a list", empty);
}

const Json& JsonFields::Object(const char* key) {
  static const Json empty = Json::object();
  return Member(key, Has(key) && object_[key].is_object(), "must be an object", empty);
}

absl::StatusOr<Json> ParseJsonObject(const std::string& text, const std::string& where) {
  bool too_deep = false;
  const auto watch = [&](int depth, Json::parse_event_t, Json&) {
    too_deep |= depth > kMaxDepth;
    return !too_deep;
  };
  Json json = Json::parse(text, watch, /*allow_exceptions=*/false);
  if (too_deep) return absl::InvalidArgumentError(absl::StrCat(where, ": nests too deep"));
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": is not a JSON object"));
  }
  return json;
}

absl::StatusOr<Json> ReadJsonObject(const std::filesystem::path& path, int64_t max_bytes) {
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, max_bytes));
  return ParseJsonObject(text, path.string());
}

}  // namespace simpo
