"""Python imports this file at its start when its folder is on PYTHONPATH: something happens at a moment of a training, once.

PLANS is `MOMENT ACT RANK MARK`, several, one after another, separated by commas.

    MOMENT   forward, backward, optimizer, save, evaluation, sampling, preparation: the first of this process, with the real trainer;
             forward@N: of the step after step N
    ACT      a signal's name: the command that started the ranks gets it; with xALL all its ranks do too, and three times; with xTWO
             it comes once more when it has been heard; with xOWN only this rank gets it. Or SIGKILL, which ends this rank.
    RANK     where it happens, - in the command
    MARK     a file that says that it has happened; where it is there, the next plan is followed
"""

import os
import signal
import sys
import time
from pathlib import Path

RANK = os.environ.get("RANK", "-")
LONG_SECONDS = 400
trainers = []


def act(name, how):
    alone = RANK == "-"
    if how == "OWN" or name == "SIGKILL" or (alone and how != "ALL"):
        os.kill(os.getpid(), getattr(signal, name))
        wait_for_signal()
        return
    command = os.getpid() if alone else os.getppid()
    for _ in range(3 if how == "ALL" else 1):
        for process in [command, *(children(command) if how == "ALL" else [])]:
            os.kill(process, getattr(signal, name))
    wait_for_signal()
    if how == "TWO":
        time.sleep(0.5)
        os.kill(command, getattr(signal, name))
        time.sleep(LONG_SECONDS)


def wait_for_signal():
    """Until this rank knows of the signal, so that the step in which it comes is always the same."""
    while trainers and not trainers[0].asked():
        time.sleep(0.01)


def children(process):
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in found.read_text().split()]


def before(owner, name, do, when=lambda *arguments: True):
    """Do something before the function is called."""
    real = getattr(owner, name)

    def wrapped(*arguments, **named):
        if when(*arguments):
            do()
        return real(*arguments, **named)

    setattr(owner, name, wrapped)


def plant(moment, strike):
    moment, _, step = moment.partition("@")
    if moment == "preparation":
        import tptrain.data

        before(tptrain.data, "prepare", lambda: (strike(), time.sleep(LONG_SECONDS)))
        return
    from tptrain.checkpoint.writer import TileWriter
    from tptrain.trainer import Trainer

    before(Trainer, "step", None, when=lambda trainer: trainers.append(trainer))
    if moment == "forward":
        before(
            Trainer,
            "_run_stage",
            strike,
            when=lambda trainer, stage, *_: stage.training and str(trainer.steps_done) == (step or str(trainer.steps_done)),
        )
    if moment == "backward":
        real = Trainer._run_stage

        def run_stage(*arguments):
            output = real(*arguments)
            if output.requires_grad:
                output.register_hook(lambda gradient: strike())
            return output

        Trainer._run_stage = run_stage
    if moment == "optimizer":  # in its step, not in the one that makes room for what is loaded
        before(Trainer, "update", None, when=lambda trainer, *_: trainer.optimizer.register_step_pre_hook(lambda *_: strike()) is None)
    if moment == "save":
        import tptrain.train

        saving = []
        before(tptrain.train, "save_checkpoint", lambda: saving.append(True))
        before(TileWriter, "write_data", strike)  # in the background
        before(Trainer, "step", wait_for_signal, when=lambda trainer: saving)
    if moment == "evaluation":
        before(Trainer, "_evaluate", strike)
    if moment == "sampling":
        before(Trainer, "sample", strike)


def once(mark, name, how):
    def strike():
        if not os.path.exists(mark):
            Path(mark).touch()
            act(name, how)

    return strike


def follow(plans):
    for plan in plans:
        moment, name, where, mark = plan.split()
        if not os.path.exists(mark):
            if where == RANK:
                name, _, how = name.partition("x")
                plant(moment, once(mark, name, how))
            return


if "tptrain" in " ".join(sys.orig_argv) and os.environ.get("PLANS"):
    follow(os.environ["PLANS"].split(","))
