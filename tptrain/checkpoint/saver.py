"""Saves a run's training states, in the background if asked, and keeps the run going where that fails.

The loop waits while each rank copies the part that it writes into memory of its own (async), or until all is on disk (sync).
The rest is the same for both, in the background on a thread and a process group of its own:

    all     each rank writes its file, sums it, and puts it on disk
    rank 0  hears of every file, adds tensors.json, state.json and manifest.json, and renames the folder; or clears it away
    all     hear how it ended
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tptrain.checkpoint.chunks import TENSORS_FILE, Chunk, index_of, live_values, own_chunk, tensors_file, writers
from tptrain.checkpoint.folder import checkpoint_folder, complete_checkpoints, partial_folder, publish, rotate
from tptrain.checkpoint.manifest import FileNote, note_of
from tptrain.checkpoint.sharded import training_tensors
from tptrain.checkpoint.writer import Staging, as_bytes, write_file
from tptrain.config import CheckpointConfig
from tptrain.files import sync_folder, write_atomically

_PROGRESS_SECONDS = 10.0
_SPARE_BYTES = 16 << 20
"""Of the disk, left for the index, the state and the run's other files."""
LOGGER = logging.getLogger("tptrain")


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
        """group: all ranks, over gloo, and used by nobody else (`mesh.background_group`)."""
        self.run_dir, self.config, self.group = run_dir, config, group
        self.last: Saved | None = None
        """How the last save ended that has ended."""
        self._dealt: list[list[Chunk]] = []
        self._own: list[Chunk] = []
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._raised: BaseException | None = None

    def save(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Save a state as the checkpoint of step state["step"]. Where an earlier save is still under way, wait for it first.

        parameters: those that this rank has, by their names in the whole model, and their optimizer. state: what else a resume needs, as
        JSON; rank 0's is taken. Where writing fails, it is said in the log and the run goes on. The values may change after the call.
        """
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - began
        tensors = training_tensors(parameters, optimizer)
        values = live_values(self._to_write(tensors), tensors)
        if not self.config.async_save:
            self._work(state, lambda: map(as_bytes, values))
            self.wait()
            return
        staged = self._staging.copy(values)
        held = time.perf_counter() - began
        LOGGER.info(f"step {state['step']}: saves {staged.numel():,} bytes of this rank in the background; the loop was held "
                    f"{held:.2f} s, {waited:.2f} s of it by the save before")  # fmt: skip
        self._thread = threading.Thread(target=self._work, args=(state, lambda: [staged]), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save that is under way, if any. Raises what broke it other than a failed write: another rank's end."""
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

    def _to_write(self, tensors: Mapping[str, Tensor]) -> list[Chunk]:
        """The chunks that this rank writes. They are dealt out at the first save, and stay."""
        own = [own_chunk(key, tensor) for key, tensor in tensors.items()]
        if not self._dealt:
            held: list[list[Chunk]] = [[] for _ in range(self.group.size())]
            dist.all_gather_object(held, own, group=self.group)
            self._dealt, self._own = writers(held), own
        assert own == self._own, "a run saves the same tensors every time"
        return self._dealt[dist.get_rank()]

    # ---- writing ---------------------------------------------------------------------------------------------

    def _work(self, state: dict[str, Any], pieces: Callable[[], Any]) -> None:
        """Write a checkpoint together with the other ranks. Keeps what it raises for `wait`."""
        try:
            self._write(state, pieces)
        except BaseException as error:
            self._raised = error

    def _write(self, state: dict[str, Any], pieces: Callable[[], Any]) -> None:
        began, step, rank = time.perf_counter(), state["step"], dist.get_rank()
        final = checkpoint_folder(self.run_dir, step)
        partial = partial_folder(final)
        error = self._on_rank_0(lambda: _make_room(partial, self._total))
        if error is None:
            own: tuple[FileNote | None, str | None] = (None, None)
            path = partial / tensors_file(rank)
            if self._dealt[rank]:
                total = sum(chunk.bytes for chunk in self._dealt[rank])
                own = _attempt(lambda: write_file(path, pieces(), _Progress(final.name, total)), rank)
            found = [own] * self.group.size()
            dist.gather_object(own, found if rank == 0 else None, dst=0, group=self.group)
            error = self._on_rank_0(lambda: self._complete(partial, state, found))
        self.last = Saved(step, error)
        if rank == 0:
            self._tell(final, error, time.perf_counter() - began)

    def _on_rank_0(self, action: Callable[[], str | None]) -> str | None:
        """Act on rank 0; what went wrong there, on all ranks, or None."""
        box: list[str | None] = [None]
        if dist.get_rank() == 0:
            value, error = _attempt(action, 0)
            box[0] = error or value
        dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        return box[0]

    def _complete(self, partial: Path, state: dict[str, Any], found: Sequence[tuple[FileNote | None, str | None]]) -> str | None:
        """Make the folder a checkpoint and delete old ones; or delete it, for the disk may be full. Returns what went wrong."""
        errors = [error for _, error in found if error is not None]
        try:
            if errors:
                return errors[0]
            files = {tensors_file(rank): note for rank, (note, _) in enumerate(found) if note is not None}
            write_atomically(partial / TENSORS_FILE, (json.dumps(index_of(self._dealt)) + "\n").encode())
            publish(partial, state, {**files, TENSORS_FILE: note_of(partial / TENSORS_FILE)})
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            rotate(self.run_dir, self.config.keep, self.config.keep_every)
        except OSError as error:
            LOGGER.warning(f"old checkpoints cannot be deleted: {error}")
        return None

    @property
    def _total(self) -> int:
        """Bytes of all tensors, over all ranks."""
        return sum(chunk.bytes for chunks in self._dealt for chunk in chunks)

    def _tell(self, final: Path, error: str | None, seconds: float) -> None:
        if error is None:
            speed = self._total / seconds / 1e6
            LOGGER.info(f"{final} is complete: {self._total:,} bytes of tensors in {seconds:.2f} s, {speed:,.0f} MB a second")
        else:
            complete = complete_checkpoints(self.run_dir)
            newest = f"the newest is {complete[-1].name}" if complete else "there is none yet"
            LOGGER.warning(f"{final.name} was not written: {error}; the run goes on and tries again at the next one, {newest}")


class _Progress:
    """Says in the log now and then how far this rank has come with a long save."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.told = name, total, time.monotonic()

    def __call__(self, written: int) -> None:
        now = time.monotonic()
        if now - self.told >= _PROGRESS_SECONDS:
            self.told = now
            LOGGER.info(f"{self.name}: this rank has written {written:,} of {self.total:,} bytes, {100 * written / self.total:.0f} %")


def _attempt(action: Callable[[], Any], rank: int) -> tuple[Any, str | None]:
    """The action's value and None, or None and what went wrong, in one line. The traceback is in the log."""
    try:
        return action(), None
    except Exception as error:
        LOGGER.info(traceback.format_exc())
        lines = str(error).splitlines() or [""]
        return None, f"rank {rank}: {type(error).__name__}: {lines[0]}"


def _make_room(folder: Path, total: int) -> str | None:
    """Make the folder, without what a killed run left in it; or say that the disk has no room for so many bytes.

    Asked beforehand, as a disk that is full for a moment would fail whatever else the run writes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sync_folder(folder.parent)
    free = shutil.disk_usage(folder).free
    if free >= total + _SPARE_BYTES:
        return None
    folder.rmdir()
    return f"{total:,} bytes of tensors, and {free:,} are free on the disk of {folder.parent}"
