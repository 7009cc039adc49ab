"""The words of the command line: the verb, Hydra's flags, and the overrides."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NoReturn

from tptrain.config import ConfigError

if TYPE_CHECKING:
    from tptrain.job import Place


def take_verb(arguments: list[str], verbs: Collection[str]) -> str:
    """Remove the verb from the arguments, `train` where there is none. A first word that is neither an override nor a flag must be one."""
    first = arguments[0] if arguments else ""
    if not first or first[0] in "-~+" or "=" in first:
        return "train"
    if first not in verbs:
        near = difflib.get_close_matches(first, verbs, n=1)
        raise ConfigError(f"{first} is an unknown verb: use {near[0] if near else ' or '.join(verbs)}")
    return arguments.pop(0)


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and the overrides, in whichever order they stood. Raises ConfigError."""
    from hydra._internal.utils import get_args_parser

    def error(message: str) -> NoReturn:
        raise ConfigError(f"{message}: see tptrain --hydra-help")

    parser = get_args_parser()
    parser.error = error  # type: ignore[method-assign]
    known, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        raise ConfigError(f"{unknown[0]} is an unknown flag: see tptrain --hydra-help")
    overrides = [*known.overrides, *rest]
    return [argument for argument in arguments if argument not in overrides], overrides


def check_single_run(flags: list[str], overrides: list[str], place: Place) -> None:
    """Refuse a sweep inside ranks that somebody else started."""
    if is_sweep(flags, overrides):
        raise ConfigError(
            f"-m starts one job after another, but this is rank {place.rank} of {place.world_size} that a launcher started for one run: "
            f"use tptrain -m {' '.join(overrides)}, without torchrun or srun"
        )


def is_sweep(flags: list[str], overrides: list[str]) -> bool:
    """Whether the line asks for several jobs: by a flag, by the mode, or by a preset, `sweep=NAME`."""
    chosen = [override.lstrip("+").partition("=") for override in overrides]
    preset = any(key == "sweep" and value not in ("", "null") for key, _, value in chosen)
    return preset or bool({"-m", "--multirun"} & set(flags)) or "hydra.mode=multirun" in [override.lower() for override in overrides]


def is_later_node(overrides: list[str]) -> bool:
    """Whether this is the command of a node that takes node 0's run folder."""
    ranks = [override.partition("=")[2] for override in overrides if override.lstrip("+").startswith("launch.node_rank=")]
    return bool(ranks) and ranks[-1].isdecimal() and int(ranks[-1]) > 0


def as_text(override: str, texts: Mapping[str, str]) -> str:
    """`word=TEXT` so that Hydra reads it as that text, whatever is in it, for a word of `texts`.

    What begins as a quoted text or as a list is left to Hydra.

    >>> print(as_text("prompt=def f('a'", {"prompt": "prompt"}))
    prompt='def f(\\'a\\''
    """
    from tptrain.job import as_override

    word, equals, text = override.partition("=")
    if not equals or word not in texts:
        return override
    kept = text[:1] in ("", "'", '"', "[")
    return f"{texts[word]}={text}" if kept else as_override(texts[word], text)


def without_folder(overrides: list[str]) -> list[str]:
    """The overrides of what makes no run folder: a verb that keeps none, a rank above 0, which takes rank 0's."""
    folder = {"hydra.run.dir": ".", "hydra.output_subdir": "null", "hydra/job_logging": "none", "hydra/hydra_logging": "none"}
    kept = [override for override in overrides if override.partition("=")[0] not in folder]
    return [*kept, *(f"{key}={value}" for key, value in folder.items())]
