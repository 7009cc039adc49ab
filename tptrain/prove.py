"""`tptrain check`: one process and then each layout take the same few steps, and a table says where they differ.

    RUN_DIR/check.json            what was measured
    RUN_DIR/check/one_process/    the one process's job: config.yaml, logs
    RUN_DIR/check/tensors/        what it leaves for the layouts
    RUN_DIR/check/tp2_pp2/        a layout's job

`check/` is gone at the end, unless a rank failed: then the logs stay.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import rich.console
from rich.text import Text

from tptrain import interrupt, launch
from tptrain.checkpoint.hugging_face.folder import check_folder
from tptrain.config import Config, ConfigError, ParallelConfig, refuse_unprovable
from tptrain.data import prepare
from tptrain.failures import JobFailed
from tptrain.files import write_atomically
from tptrain.job import Job
from tptrain.launch_config import refuse_several_nodes
from tptrain.verdict import LIMITS, TENSORS, Verdict, judge, table_of_all, table_of_one


def check(config: Config, run_dir: Path) -> None:
    """Compare the layout of `config`, or every layout, with one process.

    config: typed, not yet resolved. Raises ConfigError before anything runs; JobFailed, once the table is shown, where a layout
    differs or did not run.
    """
    refuse_several_nodes(config.launch, "check")
    config = launch.settle(config, None)
    refuse_unprovable(config)
    if config.train.init_from is not None:
        check_folder(config.train.init_from, config.model)
    layouts, left_out = ([config], []) if config.check.layouts == "own" else every_layout(config)
    with interrupt.signals_stop():
        _Check(config, run_dir.absolute()).run(layouts, left_out)


def every_layout(config: Config) -> tuple[list[Config], list[str]]:
    """A resolved config for each layout of 2 to check.processes processes, smallest first, and the names of those that are refused.

    With tp, each layout comes without and with sequence parallelism.
    """
    numbers = range(1, config.check.processes + 1)
    sizes = [(tp, pp, dp) for tp in numbers for pp in numbers for dp in numbers if 2 <= tp * pp * dp <= config.check.processes]
    layouts, refused = [], []
    for tp, pp, dp in sorted(sizes, key=lambda size: (size[0] * size[1] * size[2], [-part for part in size])):
        for sequence_parallel in (False, True)[: 1 + (tp > 1)]:
            parallel = replace(config.parallel, tp=tp, pp=pp, dp=dp, sequence_parallel=sequence_parallel)
            try:
                layouts.append(launch.settle(replace(config, parallel=parallel), None))
            except ConfigError:
                refused.append(layout_name(parallel))
    return layouts, refused


def one_process(config: Config) -> Config:
    """The serial twin of a resolved config: the same global batch, nothing split, nothing made twice."""
    parallel = replace(
        config.parallel, tp=1, pp=1, dp=1, sequence_parallel=False, recompute="none", schedule="1f1b", stages_per_rank=1, partition="even"
    )
    return launch.settle(replace(config, parallel=parallel), None)


def layout_name(parallel: ParallelConfig) -> str:
    """`tp2_pp2`, as the shipped layouts are named; `_sp` for sequence parallelism, and a schedule that is not 1f1b.

    >>> layout_name(ParallelConfig(2, 1, 4, True, 1, 1, "1f1b", 1, "none"))
    'tp2_dp4_sp'
    >>> layout_name(ParallelConfig(1, 2, 1, False, 1, 1, "interleaved", 3, "none"))
    'pp2_interleaved3'
    >>> layout_name(ParallelConfig(1, 2, 1, False, 1, 1, "gpipe", 1, "none"))
    'pp2_gpipe'
    """
    sizes = (("tp", parallel.tp), ("pp", parallel.pp), ("dp", int(parallel.dp)))
    parts = [f"{axis}{size}" for axis, size in sizes if size > 1] or ["single"]
    schedule = "file" if parallel.schedule_is_file else parallel.schedule
    if schedule != "1f1b":
        numbered = schedule in ("gpipe", "interleaved") and parallel.stages_per_rank != 1
        parts.append(f"{schedule}{parallel.stages_per_rank}" if numbered else schedule)
    return "_".join([*parts, *["sp"] * parallel.sequence_parallel])


class _Check:
    """One check: its folders and its terminal."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir, self.folder = config, run_dir, run_dir / "check"
        terminal = rich.console.Console()
        self.terminal = terminal if terminal.is_terminal else rich.console.Console(width=140)  # a pipe has no width of its own

    def run(self, layouts: list[Config], left_out: list[str]) -> None:
        """Run one process and the layouts, and show what came of it. Raises JobFailed where one is not equal."""
        config, keep_logs = self.config, True
        self.store_dir = prepare(config, print)
        shutil.rmtree(self.folder, ignore_errors=True)
        batch = f"{config.batch_size:,} sequences x {config.data.seq_len:,} tokens"
        steps = f"{config.check.steps} step{'s' * (config.check.steps > 1)}"
        self.say(f"check: {config.model.name}, {steps} of {batch}, {config.optimizer.name}")
        try:
            twin = self.job("check-twin", one_process(config), "one_process", "one process")
            results = [self.compare(layout, twin) for layout in layouts]
            keep_logs = any(verdict.error for verdict, _ in results)
        except KeyboardInterrupt:
            keep_logs = False
            raise
        finally:
            shutil.rmtree(self.folder / TENSORS if keep_logs else self.folder, ignore_errors=True)
        self.keep(twin, results)
        self.show([verdict for verdict, _ in results], left_out)

    def compare(self, layout: Config, twin: dict[str, Any]) -> tuple[Verdict, dict[str, Any]]:
        """Run a layout; the verdict, and what was measured. With check.layouts=all a failure is a verdict too."""
        name, processes = layout_name(layout.parallel), layout.processes
        try:
            measured = self.job("check-layout", layout, name, f"{name}, {processes} process{'es' * (processes > 1)}")
        except JobFailed as error:
            if self.config.check.layouts == "own":
                raise
            self.say("failed")
            return Verdict(name, processes, error=str(error)), {}
        return judge(name, processes, twin, measured), measured

    def job(self, work: str, config: Config, name: str, label: str) -> dict[str, Any]:
        """Run the steps, and return what rank 0 does."""
        began = time.perf_counter()
        self.say(f"{label} ... ", end="")
        # On a GPU the one process must not sit in this one, which would keep memory that the layouts need.
        job = Job(work, config, self.folder / name, self.store_dir)
        measured: dict[str, Any] = launch.run(job, apart=config.hardware.device == "cuda")
        self.say(f"loss {', '.join(f'{loss:.5f}' for loss in measured['loss'])}  ({time.perf_counter() - began:.1f} s)")
        return measured

    def keep(self, twin: dict[str, Any], results: list[tuple[Verdict, dict[str, Any]]]) -> None:
        """Write `check.json`."""
        layouts = [
            {"layout": verdict.layout, "processes": verdict.processes, "equal": verdict.equal, "error": verdict.error or None,
             "first_difference": verdict.failing[0].describe() if verdict.failing else None, **measured}
            for verdict, measured in results
        ]  # fmt: skip
        content = {"limits": LIMITS, "one_process": twin, "layouts": layouts}
        write_atomically(self.run_dir / "check.json", json.dumps(content, indent=1).encode())

    def show(self, verdicts: list[Verdict], left_out: list[str]) -> None:
        """Print the table, or the table of all layouts and one for each that differs. Raises JobFailed where one is not equal."""
        if self.config.check.layouts == "own" and self.config.processes == 1:
            self.say("the layout is one process: two runs of it are compared")
        if self.config.check.layouts == "all":
            self.say("", table_of_all(verdicts))
        for verdict in verdicts:
            if verdict.error:
                self.say(f"\n{verdict.layout} failed: {verdict.error}; its logs: {self.folder / verdict.layout / 'logs'}")
            elif self.config.check.layouts == "own" or not verdict.equal:
                self.say(f"\n{verdict.layout}", table_of_one(verdict))
        if left_out:
            self.say(f"\nnot run, as this model, batch or machine cannot be split so: {', '.join(left_out)}")
        self.say(f"\nall numbers: {self.run_dir / 'check.json'}")
        unequal = [verdict.layout for verdict in verdicts if not verdict.equal]
        if unequal:
            raise JobFailed(f"not equal to one process: {', '.join(unequal)}")

    def say(self, text: str, *more: Any, end: str = "\n") -> None:
        """Print a text as it is, and tables."""
        self.terminal.print(Text(text), *more, end=end, soft_wrap=not more, highlight=False)
        self.terminal.file.flush()
