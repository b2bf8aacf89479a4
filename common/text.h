#ifndef SIMPO_COMMON_TEXT_H_
#define SIMPO_COMMON_TEXT_H_

#include <cstddef>
#include <string>
#include <string_view>

namespace simpo {

// Whether all of `text` is well-formed UTF-8; if not, *bad is the offset of the first wrong byte.
bool IsValidUtf8(std::string_view text, size_t* bad);

// The same text as UTF-8 of at most `max_bytes`: wrong bytes become '?', and what is too long ends with "...", not
// within a character. Messages of protobuf may hold nothing else.
std::string ToUtf8(std::string_view text, size_t max_bytes = std::string_view::npos);

// The same on one line that a terminal can show: control characters become spaces.
std::string OneLine(std::string_view text, size_t max_bytes = std::string_view::npos);

// Whether a path names files by a pattern, as rows/part-*.jsonl.
inline bool IsGlob(std::string_view path) { return path.find_first_of("*?[") != std::string_view::npos; }

}  // namespace simpo

#endif  // SIMPO_COMMON_TEXT_H_
