"""Hydra's and OmegaConf's errors in our one form: `key=value rule: remedy`, in one line."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import errors
from yaml import YAMLError

from tptrain.config import Config, ConfigError, refuse
from tptrain.job import keys

REFUSALS = (HydraException, errors.OmegaConfBaseException, YAMLError, ValueError)
"""What Hydra raises, outside our own task, for a command line or a YAML file that it cannot use."""


def explain(error: Exception, overrides: Sequence[str], schema: type = Config) -> ConfigError:
    """The ConfigError that says what is wrong with the command line `overrides`, or with the YAML behind it.

    schema: the config class that it should have made.
    """
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, OverrideParseException):
        said = next((line for line in error.message.splitlines() if not line.startswith(("Error parsing", "See "))), "")
        return ConfigError(f"{error.override} cannot be read ({said}): use key=value, quoted where value has spaces or any of , [ {{ $ =")
    if isinstance(error, MissingConfigException):
        return _missing_file(error)
    if str(error).startswith("Ambiguous value for argument"):
        override = str(error).split("'")[1]
        return ConfigError(f"{override} has several values: use tptrain -m to run one job for each, or brackets for a list")
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, errors.OmegaConfBaseException) and link.full_key:
            file = re.match(r"In '([^']+)'", str(error))
            return ConfigError(f"{file[1]}.yaml: {_bad_key(link, (), schema)}") if file else _bad_key(link, overrides, schema)
        link = link.__cause__ or link.__context__
    return ConfigError(f"{_line(error)}: see tptrain --help")


def unknown_key(key: str, value: object, schema: type = Config) -> ConfigError:
    """The refusal of a key that the schema has not, with the nearest keys that it has."""
    if key.startswith("hydra"):
        return refuse(key, value, "is an unknown key", "see tptrain --cfg hydra")
    is_value = "." in key
    known = [name for name, kind in keys(schema).items() if not (is_value and is_dataclass(kind))]
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.75)
    near += [name for name in known if name.rpartition(".")[2] == leaf and name not in near]
    return refuse(key, value, "is an unknown key", f"use {_either(near[:3])}" if near else "see the keys that --cfg job shows")


def _missing_file(error: MissingConfigException) -> ConfigError:
    """A group has no such option, or there is no such file."""
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not error.options:
        return ConfigError(f"{_line(error).split(' Config search path')[0]}: see tptrain --info searchpath")
    likeness = {name: difflib.SequenceMatcher(None, option, name).ratio() for name in error.options}
    nearest = sorted(error.options, key=lambda name: -likeness[name])
    return refuse(group, option, "is unknown", f"use {_either(nearest[:20])}")


def _bad_key(error: errors.OmegaConfBaseException, overrides: Sequence[str], schema: type) -> ConfigError:
    """A key that is unknown, missing, of the wrong type, or refers to one of these."""
    key, value = _asked(str(error.full_key).partition("[")[0], error.value, overrides)
    said = str(error.msg).splitlines()[0].rstrip(".")
    if isinstance(error, errors.MissingMandatoryValue):
        return refuse(key, "???", "has no value", f"use {key}=VALUE")
    if isinstance(error, errors.InterpolationResolutionError):
        return refuse(key, value, f"cannot be resolved ({said})", f"use {key}=VALUE")
    if isinstance(error, errors.ValidationError):
        wanted, remedy = _kind(key, schema)
        return refuse(key, value, f"is not {wanted}", f"use {remedy}")
    if isinstance(error, (AttributeError, KeyError)):
        return unknown_key(key, value, schema)
    return refuse(key, value, f"is refused ({said})", "see what --cfg job shows")


def _kind(key: str, schema: type) -> tuple[str, str]:
    """What the schema wants for `key`, in words, and what to write instead."""
    hint = keys(schema).get(key)
    inner = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    if typing.get_origin(hint) is list:
        return f"a list of {'numbers' if inner == [float] else 'texts'}", f"brackets, as in {key}=[a,b]"
    if inner == [int, str]:
        return "an integer or auto", "1, 2, ... or auto"
    words = {
        int: ("an integer", "1, 2, ..."),
        float: ("a number", "a number such as 3e-4"),
        bool: ("true or false", "true or false"),
        str: ("text", "text, quoted if need be"),
    }
    if is_dataclass(hint):
        return "a group of keys", f"{key}.KEY=VALUE"
    return words.get(inner[0], ("of its type", "a value of the type that tptrain --cfg all shows"))


def _asked(key: str, value: object, overrides: Sequence[str]) -> tuple[str, object]:
    """The key and the value as the command line has them, where it set `key` or, if that is no group at all, a key in it."""
    for override in reversed(overrides):
        name, equals, text = override.lstrip("+~").partition("=")
        if equals and (name == key or name.startswith(f"{key}.")):
            return name, text
    return key, value


def _either(options: Iterable[str]) -> str:
    """`a, b or c`."""
    *head, last = options
    return f"{', '.join(head)} or {last}" if head else str(last)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
