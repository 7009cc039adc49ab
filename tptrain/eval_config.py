"""The schema of `tptrain eval`, and the checks of its own values. Values live in `conf/eval.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.config import DataConfig, HardwareConfig, LaunchConfig, refuse
from tptrain.generate_config import GenerateCheckpointConfig


@dataclass
class EvalParallelConfig:
    """The layout, which need not be the one that the run was trained under."""

    tp: int
    """Tensor-parallel size: ranks that share each layer."""
    pp: int
    """Pipeline-parallel size: ranks that share the stack of layers."""
    dp: int
    """Data-parallel size: copies of the model, each of which reads other rows."""
    micro_batch_size: int | None
    """Rows in one forward; null: as in training."""


@dataclass
class EvalConfig:
    """Everything that an evaluation is made of. The model, the tokenizer and the precision are the run's."""

    run: str
    """A run folder."""
    data: DataConfig | None
    """What the loss is measured on; null: nothing."""
    whole: bool
    """All text of `data` (or its val_split) is evaluated, rather than what its keys hold out."""
    eval_steps: int | None
    """Read so many of the run's global batches of each validation set; null: all of it."""
    choices: Any
    """A file of multiple-choice questions, or a list of them; null: none."""
    delimiter: str
    """Stands between a question's context and each of its choices."""
    cut_context: bool
    """Cut from the context's left what the model cannot see; false: such a question is refused."""
    to: str | None
    """Where the results go; null: `eval` in the run folder."""
    checkpoint: GenerateCheckpointConfig
    parallel: EvalParallelConfig
    hardware: HardwareConfig
    launch: LaunchConfig

    @property
    def processes(self) -> int:
        """Ranks of the layout."""
        return self.parallel.tp * self.parallel.pp * self.parallel.dp

    @property
    def files(self) -> list[str]:
        """The files of questions, none, one or several, as a list."""
        return [] if self.choices is None else [self.choices] if isinstance(self.choices, str) else list(self.choices)

    @property
    def folder(self) -> Path:
        """Where the results go, absolute."""
        return Path(self.to).expanduser().absolute() if self.to is not None else Path(self.run).absolute() / "eval"


def refuse_bad_values(config: EvalConfig) -> None:
    """Check each key by itself. Raises ConfigError. What the groups hold is for `config.resolve`."""
    choices = config.choices if isinstance(config.choices, list) else [config.choices]
    if config.choices is not None and not (choices and all(isinstance(choice, str) and choice for choice in choices)):
        raise refuse("choices", config.choices, "names no file", "use choices=FILE.jsonl, or a list of such files")
    if config.data is None and not config.files:
        raise refuse("data", None, "and choices=null leave nothing to evaluate", "use data=own, another data=OPTION, or choices=FILE.jsonl")
    if config.eval_steps is not None and config.eval_steps < 1:
        raise refuse("eval_steps", config.eval_steps, "is below 1", "use 1 or more, or null")
    if config.folder.exists() and not config.folder.is_dir():
        raise refuse("to", config.to or config.folder, "is a file", "use to=FOLDER with a folder")
