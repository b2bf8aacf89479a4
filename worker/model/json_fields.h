#ifndef SIMPO_WORKER_MODEL_JSON_FIELDS_H_
#define SIMPO_WORKER_MODEL_JSON_FIELDS_H_

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace simpo {

// Reads typed fields of one JSON object whose author is not trusted. Nothing throws: a field that
// is missing, of another type or out of range yields its fallback (or a zero value), and the first
// such problem is kept in status() as INVALID_ARGUMENT "where: field: problem". null counts as
// missing. A field without a fallback is required.
class JsonFields {
 public:
  // `object` must outlive this; `where` is the file's path, with the place in it if nested.
  JsonFields(const nlohmann::json& object, std::string where);

  bool Has(const char* key) const;
  int64_t Integer(const char* key, int64_t low, int64_t high, std::optional<int64_t> fallback = std::nullopt);
  // A finite number above zero.
  double Positive(const char* key, std::optional<double> fallback = std::nullopt);
  bool Bool(const char* key, bool fallback);
  std::string Text(const char* key, const std::optional<std::string>& fallback = std::nullopt);
  const nlohmann::json& Array(const char* key);   // required
  const nlohmann::json& Object(const char* key);  // required

  void Fail(const std::string& field, const std::string& problem);
  // Takes over the problem of a nested object's reader, unless there is one already.
  void Merge(const JsonFields& nested) {
    if (status_.ok()) status_ = nested.status_;
  }
  const absl::Status& status() const { return status_; }

 private:
  const nlohmann::json& Member(const char* key, bool right_type, const char* expected, const nlohmann::json& fallback);
  // Whether there is a value to read; fails when there is neither value nor fallback.
  bool Given(const char* key, bool has_fallback);

  const nlohmann::json& object_;
  std::string where_;
  absl::Status status_;
};

// Parses a JSON object; INVALID_ARGUMENT names `where` for other text and for brackets that nest
// deeper than any file that we read.
absl::StatusOr<nlohmann::json> ParseJsonObject(const std::string& text, const std::string& where);

// The same for a file; errors of reading it name the path.
absl::StatusOr<nlohmann::json> ReadJsonObject(const std::filesystem::path& path, int64_t max_bytes);

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_JSON_FIELDS_H_
