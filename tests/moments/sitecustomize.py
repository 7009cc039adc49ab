"""Python imports this file at its start when its folder is on PYTHONPATH: at MOMENT of a training something happens to it, once.

MOMENT is one of forward, backward, optimizer, save, evaluation, sampling, preparation: the first one of this start, with the real trainer.
ACT is a signal's name, which goes to the command (`SIGTERM 3`: three times to it and to all its ranks, `SIGTERM again`: once more, when the
first is known), or `kill`, which happens to the rank itself. It happens in RANK=WHERE. MARK is a file that says that it has happened.
"""

import os
import signal
import sys
import time
from pathlib import Path

MOMENT, MARK, WHERE = (os.environ.get(name, "") for name in ("MOMENT", "MARK", "WHERE"))
ACT, _, HOW = os.environ.get("ACT", "").partition(" ")
RANK = os.environ.get("RANK")
LONG_SECONDS = 400
trainers = []


def act():
    if os.path.exists(MARK):
        return
    Path(MARK).touch()
    if ACT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    command = os.getpid() if RANK is None else os.getppid()
    for _ in range(3 if HOW == "3" else 1):
        for process in [command, *(children(command) if HOW == "3" else [])]:
            os.kill(process, getattr(signal, ACT))
    wait_for_signal()
    if HOW == "again":
        time.sleep(0.5)
        os.kill(command, getattr(signal, ACT))
        time.sleep(LONG_SECONDS)


def wait_for_signal():
    """Until this rank knows of the signal, so that the step in which it comes is always the same."""
    while trainers and not trainers[0].asked():
        time.sleep(0.01)


def children(process):
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in found.read_text().split()]


def before(owner, name, do=act, when=lambda *arguments: True):
    """Do something before the function is called."""
    real = getattr(owner, name)

    def wrapped(*arguments, **named):
        if when(*arguments):
            do()
        return real(*arguments, **named)

    setattr(owner, name, wrapped)


def prepare():
    act()
    time.sleep(LONG_SECONDS)


def plant():
    if MOMENT == "preparation":
        import tptrain.data

        before(tptrain.data, "prepare", do=prepare)
        return
    from tptrain.checkpoint.writer import TileWriter
    from tptrain.trainer import Trainer

    before(Trainer, "step", when=lambda trainer: trainers.append(trainer), do=None)
    if MOMENT == "forward":
        before(Trainer, "_run_stage", when=lambda trainer, stage, *_: stage.training)
    if MOMENT == "backward":
        real = Trainer._run_stage

        def run_stage(*arguments):
            output = real(*arguments)
            if output.requires_grad:
                output.register_hook(lambda gradient: act())
            return output

        Trainer._run_stage = run_stage
    if MOMENT == "optimizer":  # in its step, not in the one that makes room for what is loaded
        before(Trainer, "update", when=lambda trainer, totals: trainer.optimizer.register_step_pre_hook(lambda *_: act()) is None)
    if MOMENT == "save":
        before(TileWriter, "write_data")
        before(Trainer, "step", do=wait_for_signal, when=lambda trainer: os.path.exists(MARK))  # it may be saved in the background
    if MOMENT == "evaluation":
        before(Trainer, "_evaluate")
    if MOMENT == "sampling":
        before(Trainer, "sample")


if MOMENT and "tptrain" in " ".join(sys.orig_argv) and str(RANK) == WHERE:
    plant()
