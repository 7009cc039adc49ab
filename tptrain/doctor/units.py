"""Numbers as the tables and the findings show them."""

from __future__ import annotations


def amount(value: float | None, unit: str) -> str:
    """Three digits, a prefix of 1000s and the unit; `-` where it is unknown.

    >>> amount(72_340_000_000, "FLOP/s"), amount(999_600, "B"), amount(12, "B"), amount(None, "B")
    ('72.3 GFLOP/s', '1.00 MB', '12.0 B', '-')
    """
    if value is None:
        return "-"
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5 or prefix == "T":
            break
        value /= 1000
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {prefix}{unit}"


def seconds(value: float) -> str:
    """In microseconds, milliseconds or seconds.

    >>> seconds(0.000123), seconds(0.0456), seconds(3), seconds(-0.0005)
    ('123 us', '45.6 ms', '3.00 s', '-500 us')
    """
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if abs(value) < 999.5 * size:
            return f"{value / size:.{0 if abs(value) >= 99.95 * size else 1}f} {unit}"
    return f"{value:.2f} s"


def percent(share: float) -> str:
    """A share as a whole percentage.

    >>> percent(0.523), percent(0.0)
    ('52 %', '0 %')
    """
    return f"{100 * share:.0f} %"
