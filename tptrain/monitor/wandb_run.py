"""Weights & Biases: the run's records once more, for its web pages. Training never depends on it.

Whatever fails here becomes one warning, and the run goes on without W&B. The API key is W&B's own business
(`wandb login`, WANDB_API_KEY): it is no part of the config and reaches none of our files.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from pathlib import Path
from typing import Any

from tptrain.config import Config
from tptrain.files import write_atomically
from tptrain.monitor.log import prepare_logger
from tptrain.monitor.metrics import Record, plain

_ID_FILE = "wandb_id"


class WandbRun:
    """A started W&B run, or, made with None, one that does nothing."""

    def __init__(self, run: Any = None) -> None:
        self._run = run

    @property
    def active(self) -> bool:
        """Whether records are still passed on."""
        return self._run is not None

    def log(self, record: Record) -> None:
        """Pass on one record of `metrics.jsonl`. Unknown numbers are left out.

        The record's step is W&B's own step, so that records of one step make one row, and a step that a resumed
        run logs again is not kept twice.
        """
        if self._run is None:
            return
        try:
            known = {key: number for key, value in record.items() if (number := plain(value)) is not None}
            self._run.log(known, step=known.get("step"))
        except Exception as error:
            self._run = None
            _warn("stops recording", error)

    def finish(self, exit_code: int = 0) -> None:
        """Write out what is left, and mark the run as failed where exit_code is not 0. A second call does nothing."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            _warn("did not finish", error)


def start_wandb(config: Config, run_dir: Path, facts: dict[str, Any]) -> WandbRun:
    """Start the W&B run of this run folder, on the one process that logs.

    facts: what the config does not say (parameters, versions); kept in W&B's config under `facts`.
    The run's id is made once, kept in `run_dir/wandb_id`, and used again when the run resumes. Never prompts.
    """
    if config.wandb.mode == "disabled":
        return WandbRun()
    try:
        import wandb

        run_dir = Path(run_dir).absolute()
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=30)
        # Silent before a login is tried: that is what keeps W&B from asking for a key on a terminal.
        wandb.setup(settings=settings)
        run = wandb.init(
            dir=str(run_dir),
            id=_id_of(run_dir),
            resume="allow",
            mode=config.wandb.mode,  # type: ignore[arg-type]
            project=config.wandb.project,
            name=config.wandb.name or run_name(config),
            group=config.wandb.group,
            tags=list(config.wandb.tags),
            config={**dataclasses.asdict(config), "facts": json.loads(json.dumps(facts, default=str))},
            settings=settings,
        )
        run.define_metric("*", step_metric="step")
    except Exception as error:
        _warn("did not start", error)
        return WandbRun()
    return WandbRun(run)


def run_name(config: Config) -> str:
    """The model and the parts of the layout larger than 1: `gpt_tiny-tp2_pp2`, `gpt_tiny-single`."""
    sizes = {"tp": config.parallel.tp, "pp": config.parallel.pp, "dp": int(config.parallel.dp)}
    layout = "_".join(f"{part}{size}" for part, size in sizes.items() if size > 1)
    return f"{config.model.name}-{layout or 'single'}"


def kept_id(run_dir: Path) -> str | None:
    """The id of the W&B run of a run folder, or None where there was none yet."""
    path = run_dir / _ID_FILE
    return (path.read_text().strip() if path.exists() else "") or None


def adopt_id(run_dir: Path, wandb_id: str | None) -> None:
    """Let a run folder that has no W&B run yet go on in the one whose id a checkpoint brought, if it did."""
    if wandb_id and kept_id(run_dir) is None:
        write_atomically(run_dir / _ID_FILE, f"{wandb_id}\n".encode())


def _id_of(run_dir: Path) -> str:
    made = secrets.token_hex(4)
    adopt_id(run_dir, made)
    return kept_id(run_dir) or made


def _warn(what: str, error: Exception) -> None:
    """One line, whatever the error's text looks like."""
    text = " ".join(str(error).split()) or type(error).__name__
    prepare_logger().warning("W&B %s, training goes on without it: %s", what, text)
