"""What a sweep is going to run: its folder and its jobs, kept from Hydra's config of the sweep for when the jobs have ended.

Hydra tells a callback that a sweep begins, but not that it ends where a job has failed. So the callback leaves the sweep's config where
Hydra keeps that of a job, `HydraConfig`; each job puts it back when it ends, and `started` finds it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from tptrain.config import refuse

STOPPING = ".stopping"
"""The file in a sweep's folder while no other job is to start."""


@dataclass(frozen=True)
class Plan:
    """A sweep that was started."""

    folder: Path
    jobs: list[list[str]] | None
    """The overrides of each job by its number; None where a sweeper chooses them as it goes."""
    in_workers: bool = False
    """Whether jobs run in worker processes of this one, as under the joblib launcher."""


class Remember(Callback):
    """`hydra.callbacks.sweep`: keeps a sweep's config for `started`."""

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Settle the sweep's folder, which has the time in its name, and keep the config."""
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import open_dict, read_write

        folder = str(config.hydra.sweep.dir)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweep.dir = folder
        HydraConfig.instance().set_config(config)
        (Path(folder) / STOPPING).unlink(missing_ok=True)


def refuse_shared_folder(overrides: Sequence[str]) -> None:
    """Refuse one folder for all jobs, which would go on with each other's training. Raises ConfigError."""
    for key, _, subdir in (override.partition("=") for override in overrides):
        if key == "hydra.sweep.subdir" and "${" not in subdir:
            raise refuse(key, subdir, "is the same folder for all jobs", "use hydra.sweep.subdir='${hydra.job.num}'")


def forget() -> None:
    """Before Hydra begins: no sweep has started."""
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().cfg = None


def started() -> Plan | None:
    """The sweep that Hydra has started since `forget`, or None where it came to none."""
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.instance().cfg is None:
        return None
    settings = HydraConfig.get()
    return Plan(Path(settings.sweep.dir), _jobs(settings), "joblib" in settings.launcher._target_)


def _jobs(settings: Any) -> list[list[str]] | None:
    """The jobs that Hydra's own sweeper makes of the command line and of `hydra.sweeper.params`."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    if not settings.sweeper._target_.endswith(".BasicSweeper"):
        return None
    params = [f"{key}={value}" for key, value in (settings.sweeper.params or {}).items()]
    given: Any = OmegaConf.to_container(settings.overrides.task, resolve=False)
    try:
        return BasicSweeper.split_arguments(OverridesParser.create().parse_overrides([*params, *given]), None)[0]
    except (HydraException, AssertionError):  # glob() needs to know the files
        return None
