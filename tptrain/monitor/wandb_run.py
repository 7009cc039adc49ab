"""Weights & Biases: the run's records once more, for its web pages. Training never waits for it and never depends on it.

    training ── log ──> queue ── a thread ──> wandb (its own process) ──> RUN/wandb/offline-run-*/   always, in every mode
                                                                              └── upload.py ──> the server   wandb.mode=online

Whatever fails becomes one warning, and the run goes on. The API key is W&B's own business (`wandb login`, WANDB_API_KEY): it is no
part of the config and reaches none of our files.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tptrain.config import Config
from tptrain.monitor.log import prepare_logger
from tptrain.monitor.metrics import Record, read_metrics
from tptrain.monitor.wandb_id import adopt_id
from tptrain.monitor.wandb_recorder import Recorder

_STOPPED_SECONDS = 3.0
"""How long a run that was asked to stop waits for its upload: what goes on in the same run folder uploads all of it."""
_CLOSE_SECONDS = 60.0
"""How long wandb may take to write the end of the run to disk."""
_RESTARTS = 3
"""Times that the recording begins anew after wandb's process has died."""


class WandbRun:
    """A W&B run that a thread records, or, without a recorder, one that does nothing."""

    def __init__(self, recorder: Recorder | None = None, earlier: Sequence[Record] = (), upload_seconds: float = 0.0) -> None:
        """earlier: the records that the run begins with. upload_seconds: how long the end waits for the upload."""
        self._recorder, self._upload_seconds = recorder, upload_seconds
        self._queue: queue.SimpleQueue[Record | str] = queue.SimpleQueue()  # a text is the state in which the run ends
        self._restarts = 0
        self._thread = threading.Thread(target=self._work, args=(earlier,), name="wandb", daemon=True)
        if recorder is not None:
            self._thread.start()

    @property
    def active(self) -> bool:
        """Whether records are still passed on."""
        return self._recorder is not None

    def log(self, record: Record) -> None:
        """Pass on a record that stands in `metrics.jsonl`; returns at once."""
        if self._recorder is not None:
            self._queue.put(dict(record))

    def finish(self, state: str = "done") -> None:
        """Write out what is left. state: of `status.STATES`; other than done, W&B shows the run as failed or preempted.

        Waits for an upload while the server answers, up to upload_seconds. A second call does nothing.
        """
        if self._recorder is None:
            return
        self._queue.put(state)
        self._thread.join(_CLOSE_SECONDS + self._upload_seconds)
        if self._thread.is_alive():
            _warn("W&B did not finish; what it lacks is in metrics.jsonl")
        self._recorder = None

    # ---- in the thread ---------------------------------------------------------------------------------------

    def _work(self, earlier: Sequence[Record]) -> None:
        recorder = self._recorder
        assert recorder is not None
        try:
            recorder.begin(earlier)
            while isinstance(item := self._queue.get(), dict):
                self._do(recorder, recorder.log, item)
            limit = self._upload_seconds if item == "done" else min(_STOPPED_SECONDS, self._upload_seconds)
            self._do(recorder, recorder.finish, item, limit)
        except Exception as error:
            self._recorder = None
            _warn(f"W&B records nothing: {_line(error)}; metrics.jsonl has all numbers")
        finally:
            recorder.close()

    def _do(self, recorder: Recorder, what: Callable[..., None], *args: Any) -> None:
        """Do it; where wandb's process has died, as when a scheduler signals every process of the job, first record anew what
        `metrics.jsonl` has. A record that is logged twice counts once.
        """
        try:
            what(*args)
        except Exception:
            self._restarts += 1
            if self._restarts > _RESTARTS:
                raise
            recorder.close()
            recorder.begin(read_metrics(recorder.run_dir))
            what(*args)


def start_wandb(
    config: Config,
    run_dir: Path,
    facts: Mapping[str, Any],
    *,
    earlier: Sequence[Record] | None = (),
    say: Callable[[str], None] = lambda text: None,
) -> WandbRun:
    """Start the W&B run of this run folder, on the one process that logs; returns at once. Never prompts.

    facts: what the config does not say (parameters, data); kept in W&B's config under `facts`, with the versions and the commit.
    earlier: the records of metrics.jsonl that the run goes on from, all of which are recorded again,
    so that one folder has the whole run and replaces earlier ones; None where they are not known, and those stay. say: shows a line.
    """
    if config.wandb.mode == "disabled":
        return WandbRun()
    run_dir = Path(run_dir).absolute()
    adopt_id(run_dir, secrets.token_hex(4))  # here and now: a checkpoint may ask for it before wandb has started
    known = json.loads(json.dumps(dict(facts), default=str))
    recorder = Recorder(config, run_dir, known, replaces=earlier is not None, say=say, warn=_warn)
    return WandbRun(recorder, earlier or (), config.wandb.upload_seconds)


def _warn(text: str) -> None:
    prepare_logger().warning("%s", text)


def _line(error: Exception) -> str:
    """One line, whatever the error's text looks like."""
    return " ".join(str(error).split()) or type(error).__name__
