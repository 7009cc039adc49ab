"""The verb `plan`: works out one layout or searches all of them, says it, and leaves plan.json and pictures in the run folder.

stdout has what a program goes on with: of one layout its schedule as a file, of a search the overrides of the best layouts, a line each.
The rest goes to stderr, and its last line names the run folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from tptrain.config import Config, refuse, resolve
from tptrain.files import near, write_atomically
from tptrain.plan import record, show, show_search
from tptrain.plan.forecast import Forecast, forecast
from tptrain.plan.layouts import Layout, Layouts, nearest_devices
from tptrain.plan.pipeline import PipelinePlan, describe
from tptrain.plan.search import Found, search

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_WIDEST = 400
"""Columns of a table, at most."""


def plan(config: Config, run_dir: Path, given: Sequence[str]) -> None:
    """Plan a config. config: typed, not yet resolved. given: the overrides of the command line.

    Raises ConfigError for a config that cannot run, and where no layout would.
    """
    if config.hardware.devices is None:
        config = resolve(config)
        pipeline = describe(config)
        _one(_on_known_hardware(config, config.processes), pipeline, run_dir)
    else:
        devices, fixed = config.hardware.devices, fixed_keys(config, given)
        Layouts(config, devices, fixed)  # which refuses what no search can vary
        _many(_on_known_hardware(config, devices), devices, run_dir, fixed)


def _on_known_hardware(config: Config, ranks: int) -> Config:
    """With hardware=auto, the config with this machine measured."""
    if config.hardware.device != "auto":
        return config
    from tptrain import this_machine  # takes a while, and leads to all that starts ranks

    return this_machine.measured(config, ranks)


def fixed_keys(config: Config, given: Sequence[str]) -> dict[str, Any]:
    """The keys of a layout that the command line sets one by one, with their values; `auto` sets none."""
    names = {override.lstrip("+").partition("=")[0] for override in given}
    values = {key: getattr(config.parallel, key) for key in Layout._fields if f"parallel.{key}" in names}
    return {key: value for key, value in values.items() if value != "auto"}


def _one(config: Config, pipeline: PipelinePlan, run_dir: Path) -> None:
    """One layout."""
    found = forecast(config, pipeline)
    _say(show.stage_table(found.pipeline), show.memory_table(found.ranks), show.traffic_table(found))
    _tell(show.facts(found))
    sys.stderr.flush()
    sys.stdout.write(show.schedule_file(config, found.pipeline))
    sys.stdout.flush()
    _leave(config, run_dir, record.of_forecast(found) | _dry_run(config), lambda: pictures_of(found))


def _many(config: Config, devices: int, run_dir: Path, fixed: Mapping[str, Any]) -> None:
    """All layouts of so many devices."""
    found = search(config, devices, fixed)
    if not found.candidates:
        raise _refuse_devices(config, devices, fixed, found)
    if not found.best:
        raise show_search.refuse_memory(found)
    _say(show_search.best_table(found), show_search.unfitting_table(found))
    _tell(show_search.facts(found))
    sys.stderr.flush()
    print("\n".join(each.layout.overrides for each in found.best), flush=True)
    content = record.of_forecast(found.best[0].forecast) | {"search": show_search.of_search(found)}
    content |= _dry_run(found.best[0].forecast.config)
    _leave(config, run_dir, content, lambda: {**pictures_of(found.best[0].forecast), **picture_of_search(found)})


def _dry_run(config: Config) -> dict[str, Any]:
    """With plan.trace, one real step of the layout on tensors without values, shown beside the plan; for plan.json."""
    if not config.plan.trace:
        return {}
    from tptrain.dry_run.show import call_table, memory_table
    from tptrain.dry_run.show import facts as of_trace
    from tptrain.dry_run.trace import trace

    ranks = trace(config)
    _say(call_table(ranks), memory_table(ranks))
    _tell(of_trace(config, ranks))
    return {"dry_run": [rank.record() for rank in ranks]}


def pictures_of(found: Forecast) -> dict[str, Figure]:
    """A layout's pictures by file name: its memory, and its timeline where that is known."""
    from tptrain.monitor import draw_plan, draw_timeline

    config, parallel = found.config, found.config.parallel
    title = f"{config.model.name}, tp {parallel.tp} x pp {parallel.pp} x dp {parallel.dp}, {Path(parallel.schedule).stem}"
    ranks = [show.components(rank) for rank in found.ranks]
    pictures = {"plan_memory.png": draw_plan.memory(ranks, config.hardware.memory_bytes, title)}
    if not isinstance(found.time, str) and found.time.simulation is not None:
        title += f", {parallel.micro_batches} micro-batches"
        pictures["plan_timeline.png"] = draw_timeline.planned(found.time.simulation, title)
    return pictures


def picture_of_search(found: Found) -> dict[str, Figure]:
    """The best layouts side by side."""
    from tptrain.monitor import draw_plan

    steps = [(show_search.short(each.layout), show.parts_of(each.time)) for each in found.best]
    return {"plan_layouts.png": draw_plan.layouts(steps, f"{found.config.model.name} on {found.devices} devices: the best layouts")}


def _leave(config: Config, run_dir: Path, content: Mapping[str, Any], draw: Callable[[], Mapping[str, Figure]]) -> None:
    """Write plan.json and the pictures, and say where."""
    try:
        write_atomically(run_dir / record.NAME, record.as_json(content))
        names = [record.NAME]
        if config.plan.pictures:
            from matplotlib import rc_context  # takes longer than all the rest

            from tptrain.monitor.draw_style import STYLE, png

            with rc_context(STYLE):
                for name, figure in draw().items():
                    write_atomically(run_dir / "plots" / name, png(figure))
                    names.append(f"plots/{name}")
    except OSError as error:
        rule = f"cannot be written to ({error.strerror})"
        raise refuse("hydra.run.dir", run_dir, rule, "use hydra.run.dir=FOLDER with one that you may write to") from error
    _tell([("written", f"{' '.join(names)} in {near(run_dir)}")])


def _refuse_devices(config: Config, devices: int, fixed: Mapping[str, Any], found: Found) -> Exception:
    """Of a number of devices that no layout can use."""
    others = " or ".join(map(str, nearest_devices(config, devices, fixed)))
    rule = f"has no layout, as {found.refusals[0]}" if found.refusals else "has no layout"
    return refuse("hardware.devices", devices, rule.replace(": ", "; "), f"use {others or 'another number'}")


def _say(*tables: Table | None) -> None:
    """Print tables, each as wide as it is: cells cut off would say nothing."""
    for table in tables:
        if table is not None:
            terminal = Console(stderr=True, highlight=False, markup=False)
            widest = terminal.options.update(max_width=_WIDEST)
            terminal.width = max(terminal.width, Measurement.get(terminal, widest, table).maximum)
            terminal.print(table)


def _tell(lines: Sequence[tuple[str, str]]) -> None:
    terminal = Console(stderr=True, highlight=False, markup=False)
    for label, text in lines:
        terminal.print(f"{label:<{show.LABEL}}{text}", soft_wrap=True)
