#ifndef SIMPO_SIMPOCTL_TERMINAL_H_
#define SIMPO_SIMPOCTL_TERMINAL_H_

#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace simpo {

// What the place that text goes to can show.
struct TerminalLook {
  bool is_terminal = false;  // the cursor can be moved: a display may redraw itself
  bool color = false;        // a terminal, and NO_COLOR is not set
  bool utf8 = false;         // the locale's character set
  int width = 80;            // columns
  int height = 24;           // rows
};

// Of a file descriptor, as it is now (a window may change its size).
TerminalLook LookOf(int fd);

enum class Color { kNone, kRed, kGreen, kYellow, kCyan, kBold, kDim };
// `text` in a colour, or as it is where there are none.
std::string Colored(std::string_view text, Color color, const TerminalLook& look);

// Columns that UTF-8 text takes (one per character), and its longest beginning of at most `width` columns.
int DisplayWidth(std::string_view text);
std::string Clip(std::string_view text, int width);

// Data to standard output, messages to standard error.
void PrintOut(std::string_view text);
void PrintErr(std::string_view text);
// That standard output has taken everything.
absl::Status FlushOut();

}  // namespace simpo

#endif  // SIMPO_SIMPOCTL_TERMINAL_H_
