#include "simpoctl/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

bool LocaleIsUtf8() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const std::string value = absl::AsciiStrToLower(Variable(name));
    if (value.empty()) continue;
    return value.find("utf-8") != std::string::npos || value.find("utf8") != std::string::npos;
  }
  return false;
}

int out_error = 0;  // of the first write to standard output that failed

void FlushStdout() {
  if (std::fflush(stdout) != 0 && out_error == 0) out_error = errno;
}

bool IsContinuation(char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; }

}  // namespace

TerminalLook LookOf(int fd) {
  TerminalLook look;
  const std::string term = Variable("TERM");
  look.is_terminal = isatty(fd) == 1 && !term.empty() && term != "dumb";
  look.color = look.is_terminal && Variable("NO_COLOR").empty();
  look.utf8 = LocaleIsUtf8();
  winsize size{};
  if (look.is_terminal && ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 && size.ws_row > 0) {
    look.width = size.ws_col;
    look.height = size.ws_row;
  }
  return look;
}

std::string Colored(std::string_view text, Color color, const TerminalLook& look) {
  if (!look.color) return std::string(text);
  const char* code = "";
  switch (color) {
    case Color::kNone:
      return std::string(text);
    case Color::kRed:
      code = "31";
      break;
    case Color::kGreen:
      code = "32";
      break;
    case Color::kYellow:
      code = "33";
      break;
    case Color::kCyan:
      code = "36";
      break;
    case Color::kBold:
      code = "1";
      break;
    case Color::kDim:
      code = "2";
      break;
  }
  return absl::StrCat("\x1b[", code, "m", std::string(text), "\x1b[0m");
}

int DisplayWidth(std::string_view text) {
  int width = 0;
  for (const char c : text) width += IsContinuation(c) ? 0 : 1;
  return width;
}

std::string Clip(std::string_view text, int width) {
  size_t end = 0;
  int taken = 0;
  while (end < text.size()) {
    if (!IsContinuation(text[end]) && taken++ == width) break;
    ++end;
  }
  return std::string(text.substr(0, end));
}

void PrintOut(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); }

void PrintErr(std::string_view text) {
  FlushStdout();  // both may go to one file
  std::fwrite(text.data(), 1, text.size(), stderr);
}

absl::Status FlushOut() {
  FlushStdout();
  if (out_error == 0 && std::ferror(stdout) == 0) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("cannot write to standard output: ", std::strerror(out_error)));
}

}  // namespace simpo
