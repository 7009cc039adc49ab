"""All that is asked of the wandb library, in one thread: a run on disk, and its upload beside it.

A recording is always one folder, `RUN/wandb/offline-run-*-ID`, with every record of the run from its first step on. What goes on after
a stop or a crash begins a new folder from `metrics.jsonl` and removes the old one: the tail that a killed process lost is there, and
steps that were trained again stand there once. Uploaded again under its id, it is the same run on the server, which keeps the steps
that it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tptrain.config import Config
from tptrain.monitor.facts import about_code
from tptrain.monitor.metrics import Record, plain
from tptrain.monitor.uploader import Uploader
from tptrain.monitor.wandb_id import keep_id, kept_id, run_name

_FLUSH_SECONDS = 5.0
"""How often wandb writes to disk what it has, also for the upload."""
_EXIT_CODES = {"done": 0, "stopped": 75, "failed": 1}


class Recorder:
    """Writes one run by wandb. Only one thread may use it; it imports wandb in `begin`."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        facts: Mapping[str, Any],
        *,
        replaces: bool,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        """What the arguments mean: see `wandb_run.start_wandb`. warn: shows a warning; called once at most."""
        self.config, self.run_dir, self._facts = config, run_dir, dict(facts)
        self._replaces, self._say, self._warn = replaces, say, warn
        self._run: Any = None
        self._uploader: Uploader | None = None
        self._link: str | None = None
        self._told = False  # that nothing is uploaded

    def begin(self, records: Sequence[Record]) -> None:
        """Start a recording with these records. Raises what wandb raises."""
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            x_disable_stats=True,
            x_service_wait=60,
            x_transaction_log_flush_interval=_FLUSH_SECONDS,
        )
        wandb.setup(settings=settings)
        chosen = self.config.wandb
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            dir=str(self.run_dir),
            id=kept_id(self.run_dir),
            mode="offline",
            entity=chosen.entity,
            project=chosen.project,
            name=chosen.name or run_name(self.config),
            group=chosen.group,
            tags=list(chosen.tags),
            config={**dataclasses.asdict(self.config), "facts": {**self._facts, **about_code()}},
            settings=settings,
        )
        keep_id(self.run_dir, self._run.id)  # an agent of W&B's sweeps has set its own
        self._run.define_metric("*", step_metric="step")
        if self._replaces:
            self._remove_others()
        self._replaces = True  # of this recording all records are known
        for record in records:
            self._log(record)
        if chosen.mode == "online" and not self._told:
            self._uploader = Uploader(self.folder)

    @property
    def folder(self) -> Path:
        """The folder of the recording."""
        return Path(self._run.dir).parent

    def log(self, record: Record) -> None:
        """Add a record. Raises what wandb raises."""
        self._log(record)
        if self._uploader is not None:
            self._look_at_upload(self._uploader)

    def finish(self, state: str, upload_seconds: float) -> None:
        """Write the end of the run and let the upload come to its end, if the server answers, for so long at most."""
        if state == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=_EXIT_CODES.get(state, 1))
        if self._uploader is not None:
            self._uploader.finish(upload_seconds)
            self._look_at_upload(self._uploader)

    def close(self) -> None:
        """End wandb's processes, whatever state they are in."""
        uploader, self._uploader = self._uploader, None
        if uploader is not None:
            uploader.kill()
        with contextlib.suppress(Exception):
            import wandb

            wandb.teardown()
        with contextlib.suppress(Exception):
            from wandb.sdk.artifacts.artifact import Artifact
            from wandb.sdk.data_types import _private

            # Python would remove them at the interpreter's end, which a rank does not wait for.
            for folder in (_private.MEDIA_TMP, Artifact._TMP_DIR):
                folder.cleanup()

    def _log(self, record: Record) -> None:
        """The record's step is W&B's own step, so that records of one step make one row. Unknown numbers are left out."""
        known = {key: number for key, value in record.items() if (number := plain(value)) is not None}
        if "time" in known:
            known["_timestamp"] = known.pop("time")
        self._run.log(known, step=known.get("step"))

    def _remove_others(self) -> None:
        """Remove earlier recordings of this run."""
        for folder in self.folder.parent.glob(f"offline-run-*-{self._run.id}*"):
            if folder != self.folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _look_at_upload(self, uploader: Uploader) -> None:
        """Say once where the run is to be seen, and once that it is not uploaded."""
        if self._link is None and (link := uploader.link()) is not None:
            self._link = link
            self._say(f"W&B: {link}")
        if not self._told and (reason := uploader.failure()) is not None:
            self._told = True
            self._warn(f"W&B has the run on disk only: {reason}. To upload it: wandb sync {self.folder}")
