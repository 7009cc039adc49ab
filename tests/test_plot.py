"""`tptrain plot`: from a run folder made by hand to pictures, and what it says of those that cannot be drawn."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

from tests.command import command
from tptrain import cli
from tptrain.config import ConfigError
from tptrain.monitor.trace import RankSpans, plain_spans, write_trace
from tptrain.pipeline.actions import Kind
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.timeline import Span
from tptrain.plot import is_pipeline

PICTURES = ["loss.png", "throughput.png", "memory.png", "timeline.png"]


def write_metrics(folder: Path) -> None:
    lines = [
        {"step": step, "tokens": 64 * step, "loss": 5 / step, "tokens_per_second": 900.0, "mfu": None, "bubble_fraction": 0.25,
         "peak_memory_bytes": 2**28}
        for step in range(1, 9)
    ]  # fmt: skip
    lines.append({"step": 8, "val_loss": 1.0, "val_perplexity": 2.7})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def trace(folder: Path, step: int, ranks: int = 2) -> None:
    """A step in which a rank computes one thing a millisecond, two for a backward, with no pause."""
    made = []
    for rank, actions in enumerate(SCHEDULES["1f1b"](ranks, 1, 4)):
        spans, now = [], rank * 1e-3
        for action in actions:
            end = now + (1e-3 if action.kind is Kind.FORWARD else 2e-3)
            spans.append(Span(action, now, end))
            now = end
        made.append(RankSpans(rank, rank, 0, 0, plain_spans(spans)))
    write_trace(folder, step, made, {"layout": {"tp": 1, "pp": ranks, "dp": 1}, "schedule": "1f1b", "micro_batches": 4})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with all that can be drawn."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("parallel:\n  pp: 2\n")
    write_metrics(folder)
    trace(folder, 5)
    return folder


@pytest.fixture
def plot(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command inside this process, in the folder above the run's: its exit code, stdout and stderr."""
    monkeypatch.chdir(run_dir.parent)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["tptrain"])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def plot(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli._run(["plot", *arguments])
        except ConfigError as error:
            code = 2
            sys.stderr.write(f"tptrain: {error}\n")
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return plot


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header (PNG specification, 5.2 and 11.2.2)."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_all_pictures_are_drawn_and_named(run_dir: Path) -> None:
    """By the command as people type it."""
    outcome = command(run_dir.parent, "plot", "run=run")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [f"run/plots/{name}" for name in PICTURES]
    for name in PICTURES:
        width, height = size(run_dir / "plots" / name)
        assert 1000 <= width <= 4000, name
        assert 400 <= height <= 4000, name
        assert (run_dir / "plots" / name).stat().st_size < 2**20, name
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "metrics.jsonl", "plots", "traces"]
    assert len(list((run_dir / "plots").iterdir())) == 4, "nothing else is left"


def test_another_folder(run_dir: Path, plot) -> None:
    code, out, _ = plot("run=run", "to=pictures of (a=1)")
    assert code == 0
    assert out.splitlines() == [f"pictures of (a=1)/{name}" for name in PICTURES]
    assert all(size(run_dir.parent / line) for line in out.splitlines())
    assert not (run_dir / "plots").exists()


def test_the_last_trace_is_drawn_unless_another_is_asked_for(run_dir: Path, plot, monkeypatch: pytest.MonkeyPatch) -> None:
    trace(run_dir, 40, ranks=3)
    titles = []
    from tptrain.monitor import draw_timeline

    draw = draw_timeline.timelines

    def note(measured, simulated, title: str):
        titles.append((title, len(measured), len(simulated.timeline)))
        return draw(measured, simulated, title)

    monkeypatch.setattr(draw_timeline, "timelines", note)
    assert plot("run=run")[0] == 0
    assert plot("run=run", "step=5")[0] == 0
    assert titles == [("1f1b, p = 3, m = 4, step 40", 3, 3), ("1f1b, p = 2, m = 4, step 5", 2, 2)]
    code, _, err = plot("run=run", "step=6")
    assert (code, err) == (2, "tptrain: step=6 was not traced: use step=5, 40, or null for the last one\n")


def test_without_a_trace_the_rest_is_drawn_and_one_line_says_how_to_get_one(run_dir: Path, plot) -> None:
    for path in (run_dir / "traces").iterdir():
        path.unlink()
    code, out, err = plot("run=run")
    assert code == 0
    assert out.splitlines() == [f"run/plots/{name}" for name in PICTURES[:3]]
    assert err == "tptrain: timeline.png is missing, as no step was traced: train with train.trace_steps=[5]\n"
    assert "train.trace_steps=[7]\n" in plot("run=run", "step=7")[2]


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "loss": null, "tokens_per_second": null, "peak_memory_bytes": null}\n'])
def test_without_metrics_the_timeline_is_drawn(run_dir: Path, plot, text: str | None) -> None:
    (run_dir / "metrics.jsonl").unlink()
    if text is not None:
        (run_dir / "metrics.jsonl").write_text(text)
    code, out, err = plot("run=run")
    assert (code, out) == (0, "run/plots/timeline.png\n")
    lines = err.splitlines()
    assert [line.split(" is missing, as metrics.jsonl has no ")[0] for line in lines] == [f"tptrain: {name}" for name in PICTURES[:3]]
    assert all(line.endswith(": train at least train.log_every steps") for line in lines)


def test_a_run_that_has_just_begun_can_be_drawn(run_dir: Path, plot) -> None:
    """One record, and a torn second one."""
    text = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text(text[0] + text[1][:20])
    assert plot("run=run")[0] == 0


BROKEN = {
    "torn": '{"traceEvents": [',
    "empty": '{"traceEvents": [], "tptrain": {"step": 5, "ranks": []}}',
    "no computation": '{"traceEvents": [], "tptrain": {"step": 5, "ranks": [{"rank": 0, "pp": 0, "dp": 0, "tp": 0}]}}',
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_trace_that_cannot_be_read_costs_one_picture(run_dir: Path, plot, what: str) -> None:
    (run_dir / "traces" / "step-00000005.json").write_text(BROKEN[what])
    code, out, err = plot("run=run")
    assert code == 0
    assert len(out.splitlines()) == 3
    assert err.startswith("tptrain: timeline.png is missing, as run/traces/step-00000005.json ")
    assert err.endswith("train with train.trace_steps=[...] again\n")
    assert err.count("\n") == 1


def test_an_order_that_cannot_be_simulated_is_drawn_as_measured(run_dir: Path, plot) -> None:
    path = run_dir / "traces" / "step-00000005.json"
    content = json.loads(path.read_text())
    content["traceEvents"] = [event for event in content["traceEvents"] if event["name"] != "0F3"]
    path.write_text(json.dumps(content))
    code, out, err = plot("run=run")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 4


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run=??? has no value: use run=VALUE"),
        (["run=nope"], "run=nope is no folder: use a run folder"),
        (["run=run/metrics.jsonl"], "run=run/metrics.jsonl is no folder: use a run folder"),
        (["run=."], "run=. has nothing that can be drawn yet: use a run folder with a metrics.jsonl or with traces"),
        (["run=run", "to=run/config.yaml"], "to=run/config.yaml is no folder: use to=FOLDER"),
        (["run=run", "to=run/config.yaml/in"], "to=run/config.yaml/in cannot be written to (Not a directory): use to=FOLDER"),
        (["run=run", "step=0"], "step=0 is below 1: use the number of a traced step"),
        (["run=run", "step=last"], "step=last is not an integer"),
        (["run=run", "stop=3"], "stop=3 is an unknown key: use step"),
        (["-m", "run=run"], "-m starts one job after another"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run_dir: Path, plot, arguments: list[str], message: str) -> None:
    code, out, err = plot(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"tptrain: {message}")
    assert err.count("\n") == 1
    assert not (run_dir / "plots").exists()


def test_a_launcher_s_process_draws_nothing(plot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = plot("run=run")
    assert code == 2
    assert "run it without torchrun" in err


def test_help_is_its_own(plot) -> None:
    code, out, _ = plot("--help")
    assert not code
    for text in ("tptrain plot run=outputs/my_run", "train.trace_steps=[5]", "step: null", "Exit codes"):
        assert text in out
    assert "optimizer" not in out


def test_whether_there_is_a_pipeline(tmp_path: Path) -> None:
    for text, answer in (("parallel: {pp: 1}", False), ("parallel: {pp: 4}", True), ("parallel: 3", True), ("a: [", True), ("", True)):
        (tmp_path / "config.yaml").write_text(text)
        assert is_pipeline(tmp_path) is answer, text
    assert is_pipeline(tmp_path / "nowhere")


def test_it_needs_no_torch(run_dir: Path, tmp_path: Path) -> None:
    """Which takes longer to import than all pictures to draw."""
    (tmp_path / "stub" / "torch").mkdir(parents=True)
    (tmp_path / "stub" / "torch" / "__init__.py").write_text("raise ImportError('not here')")
    outcome = command(run_dir.parent, "plot", "run=run", PYTHONPATH=f"{tmp_path / 'stub'}:{Path(cli.__file__).parents[1]}")
    assert outcome.code == 0, outcome.err
