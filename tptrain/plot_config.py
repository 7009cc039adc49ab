"""The schema of `tptrain plot`, and the checks of its own values. Values live in `conf/plot.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tptrain.config import refuse


@dataclass
class PlotConfig:
    """Which run is drawn, and where the pictures go."""

    run: str
    """A run folder."""
    to: str | None
    """The folder of the pictures; null: plots/ in the run folder."""
    step: int | None
    """The traced step that timeline.png shows; null: the last one."""

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run)

    @property
    def folder(self) -> Path:
        """Where the pictures go."""
        return self.run_dir / "plots" if self.to is None else Path(self.to)


def refuse_bad_values(config: PlotConfig) -> None:
    """Check each key by itself. Raises ConfigError."""
    if not config.run_dir.is_dir():
        raise refuse("run", config.run, "is no folder", "use a run folder, such as outputs/DATE/TIME")
    if config.to is not None and config.folder.exists() and not config.folder.is_dir():
        raise refuse("to", config.to, "is no folder", "use to=FOLDER with one that you may write to")
    if config.step is not None and config.step < 1:
        raise refuse("step", config.step, "is below 1", "use the number of a traced step, or null for the last one")
