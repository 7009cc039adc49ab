"""What the command line of `tptrain eval` stands on: the data of the run that it names.

    data=own (the default)    the run's group `data`, of which single keys may be changed: data.path=..., data.store_dir=...
    data=none                 no data
    data=OPTION               that option, in whole, in sequences as long as the run's; the run's tokenizer reads any text
    choices=FILE              data=none, unless data is asked for too

So `run=FOLDER` is looked up before Hydra composes. A folder that is no run's is refused later, whatever is asked of its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tptrain.config import Config, refuse
from tptrain.job import Job, literal

_OWN, _NONE = "own", "none"


def filled_in(overrides: Sequence[str]) -> list[str]:
    """The overrides, after those that follow from them and from the run; offers the run's data to Hydra as the option `own`.

    Raises ConfigError for keys of a tokenizer.
    """
    given = dict(override.lstrip("+~").partition("=")[::2] for override in overrides)
    for key, value in given.items():
        if key.startswith("data.tokenizer"):
            raise refuse(
                key, value, "asks for a vocabulary, and the model knows only its run's", "leave it away: the run's tokenizer reads any text"
            )
    trained = _trained(given.get("run", ""))
    _offer(_NONE, None)
    _offer(_OWN, asdict(trained.data) if trained is not None else None)
    if trained is None:
        return [override for override in overrides if not _is_of_data(override.lstrip("+~").partition("=")[0])]
    if given.get("data", _OWN) not in (_OWN, _NONE):
        return ["whole=true", f"data.seq_len={trained.data.seq_len}", *overrides]
    alone = given.get("choices", "null") != "null" and not any(map(_is_of_data, given))
    return [*[f"data={_NONE}"] * alone, *overrides]


def _is_of_data(key: str) -> bool:
    return key == "data" or key.startswith("data.")


def _trained(run: str) -> Config | None:
    """The config of the run in a folder, as a word of the command line; None where there is none that can be read."""
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    folder = Path(run[1:-1] if run[:1] in ("'", '"') and run[-1:] == run[:1] else run)
    try:
        config: Config = Job.load("train", folder, folder).config
    except (OmegaConfBaseException, YAMLError, OSError, ValueError):
        return None
    return config


def _offer(name: str, data: dict[str, Any] | None) -> None:
    """Make the group's values an option of it; None leaves the group as it is, which is null."""
    from hydra.core.config_store import ConfigStore

    package = "_global_" if data is None else None
    ConfigStore.instance().store(group="data", name=name, node=literal(data or {}), package=package)
