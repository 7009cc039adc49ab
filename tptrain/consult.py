"""The verb `doctor`: start the ranks of a layout, have them measure, show what they found, and say whether all is well.

    RUN_DIR/doctor.json     all numbers, and what was found
    RUN_DIR/doctor/         the ranks' own folder: config.yaml, logs

That folder is gone at the end, unless a rank failed: a run that is there already keeps its own files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import rich.console
from rich.text import Text

from tptrain import interrupt, launch
from tptrain.config import Config
from tptrain.doctor import show
from tptrain.doctor.judge import Diagnosis, diagnose
from tptrain.doctor.needs import needs_of
from tptrain.doctor.record import Report
from tptrain.failures import JobFailed
from tptrain.files import write_atomically
from tptrain.job import Job, Place
from tptrain.launch_config import refuse_several_nodes

_LABEL_WIDTH = 14


def doctor(config: Config, run_dir: Path, place: Place | None) -> None:
    """Examine the ranks of a config's layout. place: this process among a launcher's ranks; of these rank 0, and of
    several nodes' commands node 0's, shows what was found.

    config: typed, not yet resolved. Raises ConfigError before anything runs and where ranks have different versions; JobFailed, once
    the tables are shown, where something is slow or short.
    """
    refuse_several_nodes(config.launch, "doctor")
    config, run_dir = launch.settle(config, place), run_dir.absolute()
    job = Job("doctor", config, run_dir / "doctor", Path(config.data.store_dir).absolute())
    speaks = place.rank == 0 if place is not None else config.launch.node_rank in (None, 0)
    keep_logs = False
    terminal = rich.console.Console()
    terminal = terminal if terminal.is_terminal else rich.console.Console(width=140)  # a pipe has no width of its own
    if speaks:
        _say(terminal, _title(config))
    try:
        found = launch.take_part(job, place) if place is not None else _run(job)
    except JobFailed:
        keep_logs = True
        raise
    finally:
        if speaks and not keep_logs:
            shutil.rmtree(job.run_dir, ignore_errors=True)
    if speaks:
        report = Report.from_dict(found)
        diagnosis = diagnose(report, config.doctor, needs_of(config, run_dir))
        write_atomically(run_dir / "doctor.json", json.dumps(show.content(config, report, diagnosis), indent=1).encode())
        _show(terminal, config, run_dir, report, diagnosis)


def _run(job: Job) -> dict[str, object]:
    """What ranks of our own find."""
    with interrupt.signals_stop():
        found: dict[str, object] = launch.run(job)
        return found


def _title(config: Config) -> str:
    parallel = config.parallel
    ranks = f"{config.processes} rank{'s' * (config.processes > 1)}"
    return f"doctor: {config.model.name} under tp {parallel.tp} x pp {parallel.pp} x dp {parallel.dp}, {ranks} on {config.hardware.device}"


def _show(terminal: rich.console.Console, config: Config, run_dir: Path, report: Report, diagnosis: Diagnosis) -> None:
    """Print the tables and the verdict. Raises JobFailed where something is slow or short."""
    _say(terminal, f"{'versions':<{_LABEL_WIDTH}}{show.versions_text(report)}\n")
    terminal.print(show.machine_table(report, diagnosis), "", show.speed_table(report, diagnosis, config.doctor.slow_rank))
    if report.links:
        terminal.print("", show.link_table(report, diagnosis, config.doctor.slow_link))
    if show.left_out(report):
        _say(terminal, show.left_out(report))
    _say(terminal, "")
    for label, text in show.summary(report, diagnosis):
        _say(terminal, f"{label:<{_LABEL_WIDTH}}{text}")
    _say(terminal, f"{'all numbers':<{_LABEL_WIDTH}}{run_dir / 'doctor.json'}")
    kinds = list(dict.fromkeys(finding.kind for finding in diagnosis.findings))
    _say(terminal, f"{'verdict':<{_LABEL_WIDTH}}{', '.join(kinds) if kinds else 'all well'}")
    if kinds:
        raise JobFailed(f"tptrain doctor found: {', '.join(kinds)}")


def _say(terminal: rich.console.Console, text: str) -> None:
    """Print a text as it is."""
    terminal.print(Text(text), soft_wrap=True, highlight=False)
    terminal.file.flush()
