"""Bytes, seconds and money in figures that one reads at a glance. Decimal units, as in vendors' data sheets."""

from __future__ import annotations


def as_bytes(count: float) -> str:
    """Bytes in the largest unit that keeps them above 1.

    >>> as_bytes(81_234_000_000), as_bytes(999), as_bytes(1_234), as_bytes(0)
    ('81.2 GB', '999 B', '1.23 kB', '0 B')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.0f} PB"


def as_seconds(seconds: float) -> str:
    """A duration below some hours.

    >>> as_seconds(12.345), as_seconds(0.01234), as_seconds(1.2e-5), as_seconds(0), as_seconds(4567)
    ('12.3 s', '12.3 ms', '12 us', '0 s', '4,567 s')
    """
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * scale >= 0.9995 or not seconds or unit == "us":
            value = seconds * scale
            return f"{value:,.0f} {unit}" if value >= 999.5 else f"{value:.3g} {unit}"
    raise AssertionError


def as_days(days: float) -> str:
    """A training.

    >>> as_days(33.6), as_days(0.25), as_days(0.001)
    ('33.6 days', '6 hours', '1.44 minutes')
    """
    for scale, unit in ((1, "days"), (24, "hours")):
        if days * scale >= 1:
            return f"{days * scale:,.3g} {unit}" if days * scale < 999.5 else f"{days * scale:,.0f} {unit}"
    return f"{days * 1440:.3g} minutes"


def as_count(number: float) -> str:
    """Tokens and dollars, short.

    >>> as_count(300e9), as_count(1_234_567), as_count(950)
    ('300 billion', '1.23 million', '950')
    """
    for scale, unit in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= 0.9995 * scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def percent(share: float | None) -> str:
    """A share.

    >>> percent(0.4512), percent(None)
    ('45.1 %', 'unknown')
    """
    return "unknown" if share is None else f"{100 * share:.1f} %"
