"""The verb `plot`: from a run folder to pictures of it, and a line for each that cannot be drawn.

Needs neither ranks nor torch. No other verb imports this module or what draws: importing matplotlib takes a while.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from yaml import YAMLError, safe_load

from tptrain.config import refuse
from tptrain.files import write_atomically
from tptrain.monitor import draw_records, draw_timeline
from tptrain.monitor.draw_style import STYLE, png
from tptrain.monitor.metrics import Record, read_metrics
from tptrain.monitor.trace import Trace, find_traces, read_trace
from tptrain.pipeline.actions import ScheduleError
from tptrain.plot_config import PlotConfig, refuse_bad_values

Picture = tuple[str, Figure | str]
"""A file name, and the picture or a line that says why there is none and how to get it."""


def plot(config: PlotConfig) -> None:
    """Write what can be drawn, print the paths, and say what is missing. Raises ConfigError where nothing can be drawn."""
    refuse_bad_values(config)
    with rc_context(STYLE):
        pictures = [*pictures_of_records(read_metrics(config.run_dir), is_pipeline(config.run_dir)), picture_of_trace(config)]
        drawn = {config.folder / name: picture for name, picture in pictures if isinstance(picture, Figure)}
        if not drawn:
            remedy = "use a run folder with a metrics.jsonl or with traces, which train.trace_steps=[5] makes"
            raise refuse("run", config.run, "has nothing that can be drawn yet", remedy)
        for path, figure in drawn.items():
            _write(path, figure, config)
            print(path)
    for name, picture in pictures:
        if isinstance(picture, str):
            sys.stderr.write(f"tptrain: {name} is missing, as {picture}\n")


def pictures_of_records(records: list[Record], pipeline: bool) -> Iterator[Picture]:
    """The pictures that metrics.jsonl makes. pipeline: whether the bubble is worth a picture."""
    for name, draw, keys in (
        ("loss.png", draw_records.loss, ("loss", "val_loss")),
        ("throughput.png", partial(draw_records.throughput, with_bubble=pipeline), ("tokens_per_second",)),
        ("memory.png", draw_records.memory, ("peak_memory_bytes",)),
    ):
        if any(record.get(key) is not None for record in records for key in keys):
            yield name, draw(records)
        else:
            yield name, f"metrics.jsonl has no {' or '.join(keys)}: train at least train.log_every steps"


def is_pipeline(run_dir: Path) -> bool:
    """Whether the run's layers are split over several pipeline ranks; what config.yaml does not say may be."""
    try:
        return bool(safe_load((run_dir / "config.yaml").read_bytes())["parallel"]["pp"] != 1)
    except (OSError, YAMLError, TypeError, KeyError):
        return True


def picture_of_trace(config: PlotConfig) -> Picture:
    """The timeline of the step asked for. Raises ConfigError where others were traced, but not that one."""
    name, traces = "timeline.png", find_traces(config.run_dir)
    if not traces:
        return name, f"no step was traced: train with train.trace_steps=[{config.step or 5}]"
    if config.step is not None and config.step not in traces:
        known = ", ".join(map(str, list(traces)[-5:]))
        raise refuse("step", config.step, "was not traced", f"use step={known}, or null for the last one")
    path = traces[config.step or max(traces)]
    try:
        trace = read_trace(path)
    except ValueError as error:
        return name, f"{error}: use step=STEP with another, or train with train.trace_steps=[...] again"
    if not any(trace.pipeline()):
        return name, f"{path} has no computations: use step=STEP with another, or train with train.trace_steps=[...] again"
    return name, _timeline(trace)


def _timeline(trace: Trace) -> Figure:
    """A trace above its simulation; alone where its computations cannot be simulated."""
    measured = trace.pipeline()
    try:
        simulated = draw_timeline.simulation_of(measured)
    except ScheduleError:
        simulated = None
    schedule = Path(str(trace.facts.get("schedule", "?"))).stem
    sizes = f"p = {len(measured)}, m = {draw_timeline.micro_batches(measured)}"
    return draw_timeline.timelines(measured, simulated, f"{schedule}, {sizes}, step {trace.step}")


def _write(path: Path, figure: Figure, config: PlotConfig) -> None:
    data = png(figure)
    try:
        write_atomically(path, data)
    except OSError as error:
        rule = f"cannot be written to ({error.strerror})"
        raise refuse("to", config.folder, rule, "use to=FOLDER with one that you may write to") from error
