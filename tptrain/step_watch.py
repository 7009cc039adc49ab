"""What the loop makes of each step's facts, the same on all ranks: stop, warn of a step that was left out, or end a run that diverges.

On a GPU the facts of a step are looked at one step later, so that the device is never waited for.
"""

from __future__ import annotations

import time
from collections import deque

from tptrain.checkpoint.folder import complete_checkpoints
from tptrain.checkpoint.saver import Saver
from tptrain.report import Report
from tptrain.stop import Wish
from tptrain.trainer import StepResult, Trainer


class StepWatch:
    """Looks at every step of one run."""

    def __init__(self, trainer: Trainer, report: Report, saver: Saver, wish: Wish) -> None:
        """Begins to listen to `wish`."""
        self._trainer, self._report, self._saver, self._wish = trainer, report, saver, wish
        train = trainer.config.train
        self._most = train.max_skipped_steps
        self._minutes = train.max_minutes
        self._end = None if train.max_minutes is None else time.monotonic() + 60 * train.max_minutes
        self._lag = 1 if trainer.mesh.device.type == "cuda" else 0
        self._unseen: deque[tuple[int, StepResult]] = deque()
        self._in_a_row = 0
        self.stop = False
        """Whether all ranks stop now: one was asked to, and the newest step was taken, so that it can be saved."""
        trainer.asked = self._asked
        wish.listen()

    @property
    def skipped(self) -> int:
        """Steps left out since the first step of training."""
        return self._trainer.skipped_steps

    @property
    def in_doubt(self) -> bool:
        """Whether the newest step was left out: the weights may be the reason, and no checkpoint is made of them."""
        return self._in_a_row > 0

    def look(self, step: int, result: StepResult, now: bool) -> None:
        """Look at what is known by now. now: at this step too, though the device be waited for; always so at the last step.

        Raises FloatingPointError, on all ranks alike, after more than train.max_skipped_steps in a row, and where the last step is
        left out: the run would end with weights that are in doubt.
        """
        last = step == self._trainer.config.train.max_steps
        self._unseen.append((step, result))
        while self._unseen and (now or last or self.stop or len(self._unseen) > self._lag):
            self._look_at(*self._unseen.popleft())
        if last and self.in_doubt:
            raise FloatingPointError(f"step {step} is the last, and its loss or gradient is no number or a spike: {self._why()}")

    def farewell(self) -> str:
        """Why and where the run stops."""
        limit = f"train.max_minutes={self._minutes:g}" if self._end is not None and time.monotonic() >= self._end else "another rank"
        newest = complete_checkpoints(self._saver.home)
        kept = f"saved as {newest[-1].name}" if newest else "nothing is saved"
        return f"stopped by {self._wish.reason or limit} after step {self._trainer.steps_done}, {kept}"

    def _asked(self) -> bool:
        return self._wish.reason is not None or (self._end is not None and time.monotonic() >= self._end)

    def _look_at(self, step: int, result: StepResult) -> None:
        stop, skipped, spike = result.facts()
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        self.stop = (self.stop or stop) and not skipped  # a rank that was asked is asked for good, and says so at each step
        self._trainer.skipped_steps += skipped
        if not (skipped or spike):
            return
        what = f"the loss is {result.loss:.6g} and the gradient norm {result.grad_norm:.6g}" + ", a spike" * spike
        done = f"; the step is left out ({self._in_a_row} in a row, {self.skipped} of all)" * skipped
        self._report.warn(f"step {step}: {what}{done}")
        if self._in_a_row > self._most:
            raise FloatingPointError(f"step {step}: {what}: training has diverged: {self._why()}")

    def _why(self) -> str:
        self._saver.wait()  # all ranks are here
        row, newest = self._in_a_row, complete_checkpoints(self._saver.home)
        kept = f"the last good checkpoint is {newest[-1]}" if newest else "there is no checkpoint yet"
        return f"{row} step{'s' * (row > 1)} in a row left out, train.max_skipped_steps={self._most}; {kept}"
