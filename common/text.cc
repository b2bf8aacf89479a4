#include "common/text.h"

namespace simpo {
namespace {

constexpr std::string_view kCut = "...";

// Bytes of the UTF-8 character at the start of `text`; 0 when it is none (too short, overlong, a
// surrogate, or above U+10FFFF).
size_t Utf8Length(std::string_view text) {
  auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return 1;
  size_t length = 0;
  if (lead >= 0xc2 && lead < 0xe0) length = 2;
  if (lead >= 0xe0 && lead < 0xf0) length = 3;
  if (lead >= 0xf0 && lead < 0xf5) length = 4;
  if (length == 0 || length > text.size()) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  const bool overlong = (lead == 0xe0 && byte(1) < 0xa0) || (lead == 0xf0 && byte(1) < 0x90);
  const bool beyond = (lead == 0xed && byte(1) >= 0xa0) || (lead == 0xf4 && byte(1) >= 0x90);
  return overlong || beyond ? 0 : length;
}

// U+0080 to U+009F are control characters too.
bool IsControl(std::string_view character) {
  const auto first = static_cast<unsigned char>(character[0]);
  return first < 0x20 || first == 0x7f ||
         (character.size() == 2 && first == 0xc2 && static_cast<unsigned char>(character[1]) < 0xa0);
}

std::string Convert(std::string_view text, size_t max_bytes, bool one_line) {
  std::string result;
  size_t room_for_cut = 0;  // the length of `result` up to which kCut still fits
  for (size_t i = 0; i < text.size();) {
    const size_t length = Utf8Length(text.substr(i));
    std::string_view character = length == 0 ? "?" : text.substr(i, length);
    if (one_line && IsControl(character)) character = " ";
    if (result.size() + character.size() > max_bytes) {
      result.resize(room_for_cut);
      if (kCut.size() <= max_bytes) result += kCut;
      break;
    }
    result += character;
    if (result.size() + kCut.size() <= max_bytes) room_for_cut = result.size();
    i += length == 0 ? 1 : length;
  }
  return result;
}

}  // namespace

bool IsValidUtf8(std::string_view text, size_t* bad) {
  for (size_t i = 0; i < text.size();) {
    const size_t length = Utf8Length(text.substr(i));
    *bad = i;
    if (length == 0) return false;
    i += length;
  }
  return true;
}

std::string ToUtf8(std::string_view text, size_t max_bytes) { return Convert(text, max_bytes, /*one_line=*/false); }

std::string OneLine(std::string_view text, size_t max_bytes) { return Convert(text, max_bytes, /*one_line=*/true); }

}  // namespace simpo
