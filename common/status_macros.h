#ifndef SIMPO_COMMON_STATUS_MACROS_H_
#define SIMPO_COMMON_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns from the function when `expression` (an absl::Status) is not OK.
#define SIMPO_RETURN_IF_ERROR(expression)                               \
  do {                                                                  \
    if (absl::Status simpo_status = (expression); !simpo_status.ok()) { \
      return simpo_status;                                              \
    }                                                                   \
  } while (false)

#define SIMPO_CONCAT_INNER(a, b) a##b
#define SIMPO_CONCAT(a, b) SIMPO_CONCAT_INNER(a, b)

// Evaluates `expression` (an absl::StatusOr); returns its error or assigns its value to `lhs`,
// which may be a declaration.
#define SIMPO_ASSIGN_OR_RETURN(lhs, ...) \
  SIMPO_ASSIGN_OR_RETURN_IMPL(SIMPO_CONCAT(simpo_statusor_, __LINE__), lhs, __VA_ARGS__)
#define SIMPO_ASSIGN_OR_RETURN_IMPL(result, lhs, ...)  \
  auto result = (__VA_ARGS__);                         \
  if (!result.ok()) return std::move(result).status(); \
  lhs = *std::move(result)

#endif  // SIMPO_COMMON_STATUS_MACROS_H_
