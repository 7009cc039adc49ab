"""How long `tptrain plan` takes to find the best layouts of 1024 devices, the whole command on one core:
`python -m benchmarks.plan_search`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

RUNS = 5
COMMAND = ["plan", "model=gpt_175b", "hardware=h100", "hardware.devices=1024", "train.global_batch_size=1536"]


def seconds(*more: str) -> float:
    """Of one start of the command, its end included."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        arguments = [*COMMAND, f"hydra.run.dir={folder}", *more]
        subprocess.run([sys.executable, "-m", "tptrain", *arguments], check=True, capture_output=True)
        return time.perf_counter() - begin


def main() -> None:
    """Print the median of several starts, in fp32 as the command stands and in bf16."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for more in ((), ("train.precision=bf16",), ("train.precision=bf16", "plan.pictures=false")):
        taken = sorted(seconds(*more) for _ in range(RUNS))
        print(f"{' '.join(more) or 'fp32':<44} median {taken[RUNS // 2]:.2f} s, from {taken[0]:.2f} to {taken[-1]:.2f} s")


if __name__ == "__main__":
    main()
