"""Python imports this file at its start when its folder is on PYTHONPATH: at MOMENT of a training something happens to it, once.

MOMENT is one of forward, backward, optimizer, save, evaluation, sampling, preparation, loading; with the real trainer, in rank 0 and its
fourth step. ACT is a signal's name, which goes to the command and, with EVERYBODY=1, to all its ranks, three times; or kill and raise,
which happen to RANK itself. MARK is a file that says that it happened; where its folder is missing, it happens each time.
"""

import os
import signal
import sys
import time
from pathlib import Path

MOMENT, ACT, MARK = (os.environ.get(name, "") for name in ("MOMENT", "ACT", "MARK"))
STEP, PATIENCE_SECONDS = 3, 60
RANK = os.environ.get("RANK")
IS_COMMAND = RANK is None


def act():
    if os.path.exists(MARK):
        return
    if os.path.isdir(os.path.dirname(MARK)):
        Path(MARK).touch()
    if ACT == "raise":
        raise RuntimeError("planted")
    if ACT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    command = os.getpid() if IS_COMMAND else os.getppid()
    for _ in range(3 if os.environ.get("EVERYBODY") else 1):
        for process in [command, *(children(command) if os.environ.get("EVERYBODY") else [])]:
            os.kill(process, getattr(signal, ACT))


def children(process):
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in found.read_text().split()]


def before(owner, name, when=lambda *arguments: True, then=lambda: None):
    """Act before the function is called, if it is the moment."""
    real = getattr(owner, name)

    def wrapped(*arguments, **named):
        if when(*arguments):
            act()
            then()
        return real(*arguments, **named)

    setattr(owner, name, wrapped)


def plant():
    if MOMENT == "preparation":
        import tptrain.data

        before(tptrain.data, "prepare", then=lambda: time.sleep(PATIENCE_SECONDS))
        return
    import tptrain.train
    from tptrain.trainer import Trainer

    at_step = lambda trainer, *rest: trainer.steps_done == STEP  # noqa: E731
    if MOMENT == "forward":
        before(Trainer, "_run_stage", at_step)
    if MOMENT == "backward":
        real = Trainer._run_stage

        def run_stage(trainer, *arguments):
            output = real(trainer, *arguments)
            if output.requires_grad and trainer.steps_done == STEP:
                output.register_hook(lambda gradient: act())
            return output

        Trainer._run_stage = run_stage
    if MOMENT == "optimizer":
        hook = lambda trainer, totals: trainer.optimizer.register_step_pre_hook(lambda *_: act())  # noqa: E731
        before(Trainer, "update", lambda *arguments: at_step(*arguments) and hook(*arguments) is None)
    if MOMENT == "save":
        before(tptrain.train, "save_checkpoint", lambda trainer, *_: trainer.steps_done >= STEP)
    if MOMENT == "evaluation":
        before(Trainer, "_evaluate", lambda trainer, *_: trainer.steps_done >= STEP)
    if MOMENT == "sampling":
        before(Trainer, "sample")
    if MOMENT == "loading":
        before(tptrain.train, "resume", then=lambda: time.sleep(PATIENCE_SECONDS))


if MOMENT and "tptrain" in " ".join(sys.orig_argv):
    alone = os.environ.get("ALONE") == "1"
    where = os.environ.get("WHERE", "0")
    in_command = alone or MOMENT == "preparation"
    if (IS_COMMAND and in_command) or (where == RANK and not in_command):
        plant()
