"""The schema of `tptrain export`, and the checks of its own values. Values live in `conf/export.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tptrain.config import refuse
from tptrain.generate_config import GenerateCheckpointConfig


@dataclass
class ExportConfig:
    """Which model is written, and where."""

    run: str
    """A run folder."""
    to: str
    """The folder to make; it must not exist yet, or be empty."""
    max_shard_bytes: int
    """The most bytes of weights in one file; a tensor that is larger has a file of its own."""
    checkpoint: GenerateCheckpointConfig

    @property
    def folder(self) -> Path:
        """Where the model goes, absolute."""
        return Path(self.to).expanduser().absolute()


def refuse_bad_values(config: ExportConfig) -> None:
    """Check each key by itself. Raises ConfigError."""
    if config.max_shard_bytes < 1:
        raise refuse("max_shard_bytes", config.max_shard_bytes, "is below 1", "use a number of bytes such as 5000000000")
    if config.folder.exists() and not config.folder.is_dir():
        raise refuse("to", config.to, "is a file", "use to=FOLDER with a new one")
    if config.folder.is_dir() and any(config.folder.iterdir()):
        raise refuse("to", config.to, "is not empty", "use to=FOLDER with a new one")
