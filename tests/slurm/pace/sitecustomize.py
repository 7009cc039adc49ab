"""Python imports this file at its start when its folder is on PYTHONPATH, in a SLURM task of tptrain's: something happens at step 3.

SLOW=FOLDER: until the job has been queued again once, each step from there on takes half a second more, where the run folder ends so.
RAISE=N FOLDER: task N fails there.
"""

import os
import sys
import time

STEP = 3


def plant():
    import tptrain.train
    from tptrain.trainer import Trainer

    real_update, real_train = Trainer.update, tptrain.train.train
    slow, fails = os.environ.get("SLOW"), os.environ.get("RAISE", " ").split(" ")
    folder = ""

    def train(config, run_dir, *rest):
        nonlocal folder
        folder = str(run_dir)
        return real_train(config, run_dir, *rest)

    def update(trainer, *rest):
        if trainer.steps_done >= STEP:
            if slow and folder.endswith(slow) and "SLURM_RESTART_COUNT" not in os.environ:
                time.sleep(0.5)
            if fails[0] == os.environ["SLURM_PROCID"] and folder.endswith(fails[1]):
                raise RuntimeError("planted")
        return real_update(trainer, *rest)

    Trainer.update, tptrain.train.train = update, train


line = " ".join(sys.orig_argv)
if "SLURM_STEP_ID" in os.environ and ("tptrain" in line or "submitit" in line):
    plant()
