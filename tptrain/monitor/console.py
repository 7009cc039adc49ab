"""What rank 0 shows: a banner, the progress, the model's own words, a summary.

On a terminal one live line stays at the bottom; elsewhere each record is one aligned line:

    step   120/600  loss 2.3456  grad 0.91  lr 9.8e-04  12.3k tok/s  ETA 0:45
    eval   200/600  loss 2.2812  perplexity 9.79  wiki 2.1034  code 2.6961

Under a pipeline `bubble  11 %` follows the speed: the ranks' time without work.

Each line also goes to the logger "tptrain", whose handler the launcher sets. Text from outside (the model's, paths,
errors) is never read as rich markup and cannot steer the terminal.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import rich.console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from tptrain.config import Config
from tptrain.files import near
from tptrain.monitor.banner import LABEL_WIDTH, banner_rows
from tptrain.monitor.log import prepare_logger
from tptrain.monitor.metrics import Record
from tptrain.monitor.text import compact, duration, fitted, fixed, harmless

_SET = "val_loss/"
"""Before the name of a validation set, in a record."""


class Console:
    """The terminal of one run, from `first_step` (0, or where it resumes) to `total_steps`.

    terminal: rich's console; None means one on stdout.
    """

    def __init__(self, config: Config, total_steps: int, first_step: int, terminal: rich.console.Console | None = None) -> None:
        self.config = config
        self.total_steps = total_steps
        self.first_step = first_step
        self._terminal = terminal or rich.console.Console()
        self._logger = prepare_logger()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._closed = False

    def banner(self, facts: dict[str, Any]) -> None:
        """Show what is about to run. `tptrain.monitor.banner.banner_rows` says which facts."""
        for label, value in banner_rows(self.config, self.total_steps, self.first_step, facts, self._terminal.width):
            self._row(label, value)
        self._line("")
        self._start_progress()

    def step(self, record: Record) -> None:
        """Show a training record."""
        step, step_time = record["step"], record.get("step_time")
        eta = duration(None if step_time is None else (self.total_steps - step) * step_time)
        loss, speed = fixed(record.get("loss"), 6), compact(record.get("tokens_per_second"))
        lr = record.get("lr")
        line = (
            f"{self._place('step', step)}  loss {loss}  grad {fixed(record.get('grad_norm'), 4)}"
            f"  lr {'-' if lr is None else f'{lr:.1e}':>7}  {speed:>5} tok/s{self._bubble(record)}  ETA {eta}"
        )
        self._start_progress()
        if self._progress is None:
            self._line(line)
        else:
            self._logger.info("%s", line)
            self._progress.update(self._task, completed=step, numbers=f"loss {loss.strip()}  {speed} tok/s  ETA {eta}")

    def evaluation(self, record: Record) -> None:
        """Show an evaluation record."""
        loss, perplexity = fixed(record.get("val_loss"), 6), fixed(record.get("val_perplexity"), 6).strip()
        sets = "".join(f"  {key.removeprefix(_SET)} {fixed(record[key], 6).strip()}" for key in record if key.startswith(_SET))
        place = self._place("eval", record["step"])
        self._line(f"{place}  loss {loss}  perplexity {perplexity}{sets}", style="cyan", indent=len(place) + 2)

    def say(self, text: str) -> None:
        """Show a text, above the live line."""
        self._line(text)

    def sample(self, text: str, heading: str = "The model writes:") -> None:
        """Show text that the model wrote, letter by letter as it is."""
        self._line("")
        self._line(heading, style="bold")
        for line in harmless(text).split("\n"):
            self._line(f"  {line}", indent=2)
        self._line("")

    def summary(
        self,
        *,
        state: str = "done",
        step: int | None = None,
        loss: float | None = None,
        val_loss: float | None = None,
        tokens_per_second: float | None = None,
        wall_seconds: float | None = None,
        reads: str = "",
        run_dir: Path | str | None = None,
    ) -> None:
        """Close the live line and show how the run ended; what is None is left out."""
        self.close()
        place = f" at step {step}/{self.total_steps}" if step is not None else ""
        time = f" after {duration(wall_seconds)}" if wall_seconds is not None else ""
        self._row(state, f"{place}{time}".strip())
        numbers = [("loss", loss), ("val loss", val_loss)]
        shown = [f"{name} {fixed(value, 6).strip()}" for name, value in numbers if value is not None]
        shown += [f"{compact(tokens_per_second)} tok/s"] if tokens_per_second is not None else []
        if shown:
            self._row("", "  ".join(shown))
        if reads:
            self._row("has read", reads)
        if run_dir is not None:
            self._row("run folder", near(run_dir))

    def close(self) -> None:
        """Give the terminal back; a second call does nothing. Lines can still be shown."""
        self._closed = True
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()

    # ---- the live line and plain lines -----------------------------------------------------------------------

    def _start_progress(self) -> None:
        if self._progress is not None or self._closed or not self._terminal.is_interactive:
            return
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self._terminal,
            refresh_per_second=2,
            expand=True,
            # A stderr that goes to a file stays there.
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=self.total_steps, completed=self.first_step, numbers="loss -")
        self._progress.start()

    def _bubble(self, record: Record) -> str:
        if self.config.parallel.pp == 1:
            return ""
        fraction = record.get("bubble_fraction")
        return f"  bubble {'-' if fraction is None else f'{100 * fraction:.0f}':>3} %"

    def _place(self, word: str, step: int) -> str:
        return f"{word} {step:>{max(5, len(str(self.total_steps)))}}/{self.total_steps}"

    def _row(self, label: str, value: str) -> None:
        self._line(f"{label:<{LABEL_WIDTH}}{value}", bold=len(label), indent=LABEL_WIDTH)

    def _line(self, line: str, style: str = "", bold: int = 0, indent: int = 0) -> None:
        """Print and log a line; its first `bold` characters stand out. Text objects know no markup.

        indent: where a reader's terminal is too narrow, what goes on below begins in this column.
        """
        shown = harmless(line, self._terminal.encoding)
        text = Text(fitted(shown, self._terminal.width, indent) if self._terminal.is_interactive else shown, style=style)
        if bold:
            text.stylize("bold", 0, bold)
        self._terminal.print(text, soft_wrap=True, highlight=False)
        if line:
            self._logger.info("%s", harmless(line).rstrip())
