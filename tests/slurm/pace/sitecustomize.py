"""Python imports this file at its start when its folder is on PYTHONPATH, in a SLURM task of tptrain's: something happens at step 3.

SLOW=1: until the job has been queued again once, each step from there on takes half a second more. RAISE=N: task N fails, and KILL=N: it is
killed, in a run whose folder ends in WHERE, if that is given.
"""

import os
import signal
import sys
import time

STEP = 3
task = os.environ.get("SLURM_PROCID", "")


def plant():
    import tptrain.train
    from tptrain.trainer import Trainer

    real_update, real_train = Trainer.update, tptrain.train.train
    here = False

    def train(config, run_dir, *rest):
        nonlocal here
        here = str(run_dir).endswith(os.environ.get("WHERE", ""))
        return real_train(config, run_dir, *rest)

    def update(trainer, *rest):
        if here and trainer.steps_done >= STEP:
            if os.environ.get("SLOW") and "SLURM_RESTART_COUNT" not in os.environ:
                time.sleep(0.5)
            if os.environ.get("RAISE") == task:
                raise RuntimeError("planted")
            if os.environ.get("KILL") == task:
                os.kill(os.getpid(), signal.SIGKILL)
        return real_update(trainer, *rest)

    Trainer.update, tptrain.train.train = update, train


line = " ".join(sys.orig_argv)
if "SLURM_STEP_ID" in os.environ and ("tptrain" in line or "submitit" in line):
    plant()
