"""Numbers and foreign text as the terminal shows them: numbers in fixed widths, text harmless."""

from __future__ import annotations

import math
import shutil
import sys
import unicodedata
from textwrap import wrap


def fixed(value: float | None, width: int) -> str:
    """A number in `width` characters, with as many decimals as fit; `-` where it is unknown.

    >>> fixed(2.34561, 6), fixed(10.8234, 6), fixed(0.9134, 4), fixed(123.4, 4), fixed(None, 4)
    ('2.3456', '10.823', '0.91', ' 123', '   -')
    """
    if value is None:
        return "-".rjust(width)
    if math.isfinite(value):
        for decimals in range(width - 2, -1, -1):
            text = f"{value:.{decimals}f}"
            if len(text) <= width:
                return text.rjust(width)
        return f"{value:.0e}".rjust(width)
    return str(value).rjust(width)


def compact(value: float | None) -> str:
    """Three digits and a unit.

    >>> compact(950), compact(12_345), compact(1_048_576), compact(999_950), compact(7e9), compact(None)
    ('950', '12.3k', '1.05M', '1.00M', '7.00B', '-')
    """
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    for unit in ("", "k", "M", "B"):
        if abs(value) < 999.5:
            decimals = 0 if not unit and value == int(value) else 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{decimals}f}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds.

    >>> duration(45), duration(3723), duration(200_000), duration(None)
    ('0:45', '1:02:03', '2d 7:33:20', '-:--')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def harmless(text: str, encoding: str = "utf-8") -> str:
    r"""Text that a terminal of this encoding prints and does not obey: control characters and lone surrogates are
    written out. Line ends and tabs stay.

    >>> print(harmless("a\x1b[2Jb"), harmless("é", "ascii"))
    a\x1b[2Jb \xe9
    """  # fmt: skip
    shown = "".join(
        char.encode("unicode_escape").decode() if char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") else char
        for char in text.replace("\r\n", "\n")
    )
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def fitted(line: str, width: int, indent: int) -> str:
    """A line broken at blanks so that a terminal of this width does not break it; what goes on below begins in column `indent`.

    A word that is wider stays whole, as a path does that is to be copied.

    >>> print(fitted("data   10 tokens, 3 held out", 18, 7))
    data   10 tokens,
           3 held out
    """
    if len(line) <= width or width <= 2 * indent:
        return line
    parts = wrap(line[indent:], width - indent, break_long_words=False, break_on_hyphens=False, replace_whitespace=False, expand_tabs=False)
    return line[:indent] + f"\n{' ' * indent}".join(parts)


def tell(line: str) -> None:
    """Print a line, fitted to the terminal if it goes to one."""
    print(fitted(line, shutil.get_terminal_size().columns, 2) if sys.stdout.isatty() else line, flush=True)
