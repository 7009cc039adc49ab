"""Saves a run's training states, in the background if asked, and keeps the run going where that fails.

The loop waits while each rank copies the part that it writes into memory of its own (async), or until all is on disk (sync).
The rest is the same for both, on a thread (async) and on a process group of its own:

    rank 0  makes the folder step-N.partial, where the disk has room
    all     write their parts and put them on disk
    rank 0  adds state.json and the manifest, renames the folder and deletes old checkpoints; or clears it away
    all     hear how it ended
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tptrain.checkpoint.division import Division, divide
from tptrain.checkpoint.folder import checkpoint_folder, complete_checkpoints, home_of, make_room, partial_folder, publish, rotate
from tptrain.checkpoint.progress import told_in_the_log
from tptrain.checkpoint.sharded import training_tensors, write_tensors
from tptrain.checkpoint.staging import Staging
from tptrain.config import CheckpointConfig

LOGGER = logging.getLogger("tptrain")
_SPARE_BYTES = 16 << 20
"""Of the disk, left for the index, the state and the run's other files."""


class SaveError(RuntimeError):
    """The last checkpoint of a run could not be written."""


@dataclass(frozen=True)
class Saved:
    """How a save ended: `error` is None, or a line that says what went wrong on which rank."""

    step: int
    error: str | None


class Saver:
    """Saves the states of one run. Every rank has one and calls the same methods in the same order."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, group: dist.ProcessGroup) -> None:
        """group: all ranks, over gloo, and used by nobody else (`mesh.background_group`); its time limit is that of the slowest disk."""
        self.run_dir, self.config, self.group = run_dir, config, group
        self.home = home_of(config, run_dir)
        self.last: Saved | None = None
        """How the last save ended that has ended."""
        self._division: Division | None = None
        self._staging: Staging | None = None
        self._thread: threading.Thread | None = None
        self._raised: BaseException | None = None
        self._unreported: int | None = None

    def prepare(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Begin, in the background, with what the first save would wait for: the ranks agree who writes what, and get their memory.

        To be called after a step, when the optimizer has its state. A second call does nothing.
        """
        if self.config.async_save and self._division is None and self._thread is None:
            tensors = training_tensors(parameters, optimizer)
            self._begin(lambda: self._divide(tensors))

    def save(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Save a state as the checkpoint of step state["step"]. Where an earlier save is still under way, wait for it first.

        parameters: those that this rank saves, by their names in the whole model, and their optimizer. state: what else a resume needs, as
        JSON; rank 0's is taken. Where writing fails, it is said in the log and the run goes on. The values may change after the call.
        """
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - began
        tensors = training_tensors(parameters, optimizer)
        if self._division is None or not self._division.fits(tensors):  # as where the first step was left out: on all ranks alike
            self._divide(tensors)
        assert self._division is not None
        own = self._division.own(tensors)
        if self._staging is None:
            self._work(state, own)
            return
        copies, arrive = self._staging.copy(own)
        held = time.perf_counter() - began
        LOGGER.info(f"step {state['step']}: saves {self._staging.bytes:,} bytes of this rank in the background; the loop was held "
                    f"{held:.2f} s, {waited:.2f} s of it by the save before")  # fmt: skip
        self._begin(lambda: self._work(state, copies, arrive))

    def take_complete(self) -> int | None:
        """The step of a checkpoint that has become complete since the last call, or None. Raises what broke the writing: see `wait`."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        step, self._unreported = self._unreported, None
        return step

    def wait(self) -> None:
        """Wait for what is under way in the background. Raises what broke it other than a failed write: another rank's end."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised

    def finish(self) -> None:
        """Wait for the last save of the run. Raises SaveError on all ranks where it failed."""
        self.wait()
        if self.last is not None and self.last.error is not None:
            raise SaveError(f"the last checkpoint, of step {self.last.step}, was not written: {self.last.error}")

    def close(self) -> None:
        """After the run, however it ended: a save that needs no other rank comes to its end."""
        if self._thread is not None and self.group.size() == 1:
            self._thread.join()

    # ---- in the background -----------------------------------------------------------------------------------

    def _begin(self, work: Callable[[], None]) -> None:
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # a new thread begins with the first one
                work()
            except BaseException as error:
                self._raised = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _divide(self, tensors: Mapping[str, Tensor]) -> None:
        """Agree with the other ranks who writes what, and get memory for this rank's part."""
        self._division = divide(tensors, self.group)
        self._staging = Staging(self._division.own(tensors)) if self.config.async_save else None

    def _work(self, state: dict[str, Any], own: Mapping[str, Tensor], arrive: Callable[[], None] = lambda: None) -> None:
        """Write a checkpoint together with the other ranks. own: what this rank writes, once `arrive` has returned."""
        began, first = time.perf_counter(), dist.get_rank() == 0
        final = checkpoint_folder(self.home, state["step"])
        partial = partial_folder(final)
        arrive()
        error = self._on_rank_0(lambda: self._make_room(partial))
        if error is None:
            error = self._write(partial, own)
        if error is None:
            error = self._on_rank_0(lambda: self._complete(partial, state))
        if error is not None:
            self._on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))  # the disk may be full
        self.last = Saved(state["step"], error)
        self._unreported = state["step"] if error is None else None
        if first:
            self._tell(final, error, time.perf_counter() - began)

    def _on_rank_0(self, action: Callable[[], None]) -> str | None:
        """Act on rank 0; on all ranks what went wrong there, or None."""
        box: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                box[0] = _in_one_line(error)
        if self.group.size() > 1:
            dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        return box[0]

    def _make_room(self, partial: Path) -> None:
        """Make the folder. Raises OSError where the disk has no room for the tensors.

        Asked beforehand, as a disk that is full for a moment would fail whatever else the run writes.
        """
        assert self._division is not None
        make_room(partial)
        free, total = shutil.disk_usage(partial).free, self._division.total_bytes
        if free < total + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, f"{total:,} bytes of tensors, and {free:,} are free on the disk of {self.home}")

    def _write(self, partial: Path, own: Mapping[str, Tensor]) -> str | None:
        """Write this rank's part. Returns what went wrong on any rank, the same on all."""
        assert self._division is not None
        told = told_in_the_log(partial, self._division.total_bytes) if dist.get_rank() == 0 else contextlib.nullcontext()
        try:
            with told:
                write_tensors(partial, own, self.group)
        except OSError as error:
            return _in_one_line(error)
        return None

    def _complete(self, partial: Path, state: dict[str, Any]) -> None:
        """Make the folder a checkpoint and delete old ones."""
        publish(partial, state)
        try:
            rotate(self.home, self.config.keep, self.config.keep_every)
        except OSError as error:
            LOGGER.warning(f"old checkpoints cannot be deleted: {_in_one_line(error)}")

    def _tell(self, final: Path, error: str | None, seconds: float) -> None:
        assert self._division is not None
        total = self._division.total_bytes
        if error is None:
            LOGGER.info(f"{final} is complete: {total:,} bytes of tensors in {seconds:.2f} s, {total / seconds / 1e6:,.0f} MB a second")
            return
        complete = complete_checkpoints(self.home)
        newest = f"the newest is {complete[-1].name}" if complete else "there is none yet"
        LOGGER.warning(f"{final.name} was not written: {error}; the run goes on and tries again at the next one, {newest}")


def _in_one_line(error: OSError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
