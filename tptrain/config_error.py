"""The one form in which a config is refused: one line with the key, its value, the rule, and what would do."""

from __future__ import annotations


class ConfigError(ValueError):
    """The config asks for something that cannot run. The message is one line and ends with a remedy."""


def refuse(key: str, value: object, rule: str, remedy: str) -> ConfigError:
    """The one form of a refusal: `key=value rule: remedy`."""
    return ConfigError(f"{key}={as_text(value)} {rule}: {remedy}")


def as_text(value: object) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(as_text, value))}]"  # no blanks: a shell would split there
    return str(value)
