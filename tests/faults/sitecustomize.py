"""Python imports this file at its start when its folder is on PYTHONPATH: `tptrain.train` becomes a stand-in in every rank.

FAULT=version:RANK and FAULT=busy:RANK are of another kind, for `tptrain doctor`: that rank has another torch by name, or from its
measurements on shares a core with a busy loop that takes nine tenths of it, however busy the machine is besides.

The stand-in sums a vector over the ranks until told otherwise by FAULT=WHAT:RANK. Its results are of no use to anyone,
its failures are: they happen in mid-run, while the other ranks wait in a collective.
"""

import logging
import os
import signal
import sys
import time
import types
import warnings

_FAIL_AT = 5


def _fail(what, wish):
    if what == "raise":
        raise RuntimeError("planted")
    if what == "refuse":
        from tptrain.config import refuse

        raise refuse("checkpoint.resume", "/nope", "has no checkpoint", "use checkpoint.resume=never")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "freeze":
        print(f"frozen: process {os.getpid()}", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "warn":
        logging.getLogger("somebody").warning("planted log line")
        warnings.warn("planted warning", stacklevel=1)
    if what == "listen":
        wish.listen()
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def train(config, run_dir, store_dir, wish):
    import torch
    import torch.distributed as dist

    from tptrain.monitor.status import write_status

    what, _, where = os.environ.get("FAULT", ":").partition(":")
    rank = dist.get_rank()
    assert store_dir.is_dir()
    print(f"rank {rank} of {dist.get_world_size()}, {torch.get_num_threads()} threads, OMP {os.environ['OMP_NUM_THREADS']}", flush=True)
    print(f"flights in {os.environ['TORCH_FR_DUMP_TEMP_FILE']}" if dist.get_world_size() > 1 else "alone")
    for step in range(config.train.max_steps):
        total = torch.ones(1000)
        dist.all_reduce(total)
        assert total[0] == dist.get_world_size()
        if rank == 0:
            write_status(run_dir, "running", step)
        if step == _FAIL_AT and where in (str(rank), "all"):
            _fail(what, wish)
        time.sleep(0.02)
    if rank == 0:
        write_status(run_dir, "done", config.train.max_steps)
    return 1.5


def _report_another_torch():
    from importlib import metadata

    version = metadata.version
    metadata.version = lambda name: "1.0.0" if name == "torch" else version(name)


class _BusyCore:
    """Looks like a finder of modules. Only the rank's main thread gets less than the busy loop, as those before have their priority."""

    def find_spec(self, name, path, target=None):
        if name == "tptrain.doctor.matmul":
            import subprocess

            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            loop = "import os\nrank = os.getppid()\nwhile os.getppid() == rank: pass"
            subprocess.Popen([sys.executable, "-I", "-S", "-c", loop])
            os.nice(10)


if os.environ.get("FAULT") == f"version:{os.environ.get('RANK')}":
    _report_another_torch()
if os.environ.get("FAULT") == f"busy:{os.environ.get('RANK')}":
    sys.meta_path.insert(0, _BusyCore())

_module = types.ModuleType("tptrain.train")
_module.train = train
sys.modules["tptrain.train"] = _module
