#!/usr/bin/env python3
"""Draws what a terminal showed as an SVG picture.

    script -f -q -c 'stty cols 100 rows 44; deploy/quickstart/run.sh' quickstart.log
    docs/quickstart_picture.py quickstart.log docs/quickstart.svg

Standard library only. Knows the control codes that our programs write.
"""

import html
import pathlib
import re
import sys

COLUMN, LINE, MARGIN, BAR = 8.43, 16.5, 18, 34  # pixels
DOTS = ("#ff5f56", "#ffbd2e", "#27c93f")
FONT = "DejaVu Sans Mono, Menlo, Consolas, monospace"
COLORS = {31: "#ff7b72", 32: "#7ee787", 33: "#e3b341", 34: "#79c0ff", 35: "#d2a8ff", 36: "#76e3ea", 90: "#8b949e"}
CODES = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]")


class Screen:
    """Lines of (character, style), and where the next character goes. Nothing scrolls away."""

    def __init__(self):
        self.lines, self.row, self.column, self.style = [[]], 0, 0, (None, False, False)

    def feed(self, text):
        for match in CODES.finditer(text):
            if match.group(2):
                self.control(match.group(1), match.group(2))
            elif match.group() == "\r":
                self.column = 0
            elif match.group() == "\n":
                self.move_down()
            else:
                self.put(match.group())

    def move_down(self):
        self.row += 1
        self.column = 0
        if self.row == len(self.lines):
            self.lines.append([])

    def put(self, character):
        line = self.lines[self.row]
        line.extend([(" ", (None, False, False))] * (self.column + 1 - len(line)))
        line[self.column] = (character, self.style)
        self.column += 1

    def control(self, arguments, code):
        if code == "m":
            for number in map(int, (arguments or "0").split(";")):
                if number in (38, 48):
                    break  # an extended colour, which ours do not use
                self.style = restyle(self.style, number)
        elif code == "A":
            self.row = max(0, self.row - int(arguments or 1))
        elif code == "J":
            del self.lines[self.row][self.column:], self.lines[self.row + 1:]
        elif code == "K":
            del self.lines[self.row][self.column:]


def restyle(style, number):
    color, bold, dim = style
    if number == 0:
        return (None, False, False)
    if number in (1, 2):
        return (color, bold or number == 1, dim or number == 2)
    return (COLORS.get(number if number < 100 else number - 60, color), bold, dim)


def runs(line):
    """The line as (first column, text, style), one for each change of style."""
    begin = 0
    for i in range(1, len(line) + 1):
        if i == len(line) or line[i][1] != line[begin][1]:
            text = "".join(character for character, _ in line[begin:i])
            if text.strip():
                yield begin, text, line[begin][1]
            begin = i


def svg(lines, title):
    width = MARGIN * 2 + COLUMN * max(len(line) for line in lines)
    height = BAR + MARGIN + LINE * len(lines)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img"><title>{html.escape(title)}</title>',
        '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>',
        *(f'<circle cx="{MARGIN + 18 * i}" cy="17" r="6" fill="{color}"/>' for i, color in enumerate(DOTS)),
        f'<g font-family="{FONT}" font-size="14" fill="#e6edf3" xml:space="preserve">',
    ]
    for row, line in enumerate(lines):
        for column, text, (color, bold, dim) in runs(line):
            look = f' fill="{color}"' if color else ""
            look += (' font-weight="bold"' if bold else "") + (' opacity="0.6"' if dim else "")
            parts.append(f'<text x="{MARGIN + COLUMN * column:.1f}" y="{BAR + LINE * row + 14}" '
                         f'textLength="{COLUMN * len(text):.1f}"{look}>{html.escape(text)}</text>')
    return "\n".join(parts) + "\n</g>\n</svg>\n"


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    log, picture = map(pathlib.Path, sys.argv[1:])
    screen = Screen()
    # Bytes, since read_text would turn each \r into a new line.
    text = log.read_bytes().decode(errors="replace").replace("\r\n", "\n")
    screen.feed(re.sub(r"^Script (started|done).*\n", "", text, flags=re.MULTILINE))
    lines = screen.lines
    while lines and not any(character.strip() for character, _ in lines[-1]):
        lines.pop()
    if not lines:
        sys.exit(f"quickstart_picture: {log} shows nothing; record a run with script (see --help)")
    picture.write_text(svg(lines, "the quickstart in a terminal"))


if __name__ == "__main__":
    main()
