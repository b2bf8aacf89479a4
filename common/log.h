#ifndef SIMPO_COMMON_LOG_H_
#define SIMPO_COMMON_LOG_H_

#include <string_view>

namespace simpo {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// Lines below this level are not written. The default is kInfo. Thread-safe.
void SetLogLevel(LogLevel level);

// Writes one line to standard error: UTC time, level, text. A line break in the text becomes "\n", so
// that one call is always one line. Thread-safe.
void Log(LogLevel level, std::string_view text);

}  // namespace simpo

#define LOG_DEBUG(text) ::simpo::Log(::simpo::LogLevel::kDebug, text)
#define LOG_INFO(text) ::simpo::Log(::simpo::LogLevel::kInfo, text)
#define LOG_WARNING(text) ::simpo::Log(::simpo::LogLevel::kWarning, text)
#define LOG_ERROR(text) ::simpo::Log(::simpo::LogLevel::kError, text)

#endif  // SIMPO_COMMON_LOG_H_
