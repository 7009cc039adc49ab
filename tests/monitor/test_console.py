import io
import logging
import math
import re
import sys

import pytest
import rich.console

from tptrain.monitor.console import Console

FACTS = {
    "parameters": 859_392,
    "parameters_per_rank": [232_000, 232_000, 215_000, 215_000],
    "device": "cpu, 4 processes",
    "data": "python_docs, 11.2M tokens",
    "run_dir": "/runs/[red]x[/red]/[/]",
    "ranks": [[[0, 1]], [[2, 3]]],
}
HOSTILE = "[red]x[/red] [/] [bold :smile: {task} https://a.b/c 'q' 12"


def record(step: int, loss: float | None = 2.3456) -> dict:
    return {
        "step": step,
        "tokens": step * 8192,
        "loss": loss,
        "grad_norm": 0.9134,
        "lr": 9.8e-4,
        "step_time": 0.09375,
        "tokens_per_second": 12_345.0,
        "mfu": None,
        "bubble_fraction": 0.114,
        "peak_memory_bytes": 1,
    }


def make(config, width=80, first_step=0, total=600, **options):
    file = io.StringIO()
    terminal = rich.console.Console(file=file, width=width, **options)
    return Console(config, total, first_step, terminal), file


def show_all(console):
    console.banner(FACTS)
    console.say(HOSTILE)
    for step in range(10, 61, 10):
        console.step(record(step))
    console.evaluation({"step": 60, "val_loss": 2.28, "val_perplexity": 9.7767})
    console.sample(f"one {HOSTILE}\n  two \x1b[2J\x07 \ud800")
    console.summary(step=60, loss=2.3, val_loss=2.28, tokens_per_second=12_345, wall_seconds=61.7, run_dir=FACTS["run_dir"])
    console.close()


def test_without_a_terminal_each_record_is_one_line(config):
    console, file = make(config)
    console.step(record(120))
    assert file.getvalue() == "step   120/600  loss 2.3456  grad 0.91  lr 9.8e-04  12.3k tok/s  bubble  11 %  ETA 0:45\n"
    console.step({**record(130), "bubble_fraction": None})
    assert "  12.3k tok/s  bubble   - %  ETA " in file.getvalue()


def test_one_stage_has_no_bubble(config):
    config.parallel.pp = 1
    console, file = make(config)
    console.step(record(120))
    assert file.getvalue() == "step   120/600  loss 2.3456  grad 0.91  lr 9.8e-04  12.3k tok/s  ETA 0:45\n"


def test_the_lines_are_aligned_whatever_the_numbers(config):
    console, file = make(config, width=40)
    for step, loss in ((10, 10.8234), (20, 2.3456), (30, 123.4), (590, 0.00001), (600, math.nan), (600, None)):
        console.step({**record(step, loss), "tokens_per_second": 10.0 ** (step / 100), "bubble_fraction": step / 600})
    console.step({"step": 600, "loss": None, "grad_norm": None, "lr": None, "step_time": None, "tokens_per_second": None})
    lines = file.getvalue().splitlines()
    assert len(lines) == 7
    for word in ("/600", "loss", "grad", "lr", "tok/s", "bubble", "%", "ETA"):
        assert len({line.index(word) for line in lines}) == 1, word


def test_an_evaluation_is_one_line(config):
    console, file = make(config)
    console.evaluation({"step": 200, "val_loss": 2.2812, "val_perplexity": 9.7884})
    assert file.getvalue() == "eval   200/600  loss 2.2812  perplexity 9.7884\n"


def test_an_evaluation_names_its_sets(config):
    console, file = make(config)
    console.evaluation({"step": 200, "val_loss": 2.2812, "val_perplexity": 9.7884, "val_loss/wiki": 2.1034, "val_loss/code": None})
    assert file.getvalue() == "eval   200/600  loss 2.2812  perplexity 9.7884  wiki 2.1034  code -\n"


@pytest.mark.parametrize("width", [60, 20])
@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "force_interactive": True}], ids=["plain", "terminal"])
def test_text_from_outside_is_shown_as_it_is(config, width, options):
    console, file = make(config, width=width, **options)
    show_all(console)
    shown = " ".join(file.getvalue().split())  # a narrow terminal gets shorter lines
    assert shown.count(HOSTILE) == 2
    assert shown.count(FACTS["run_dir"]) == 2
    assert "\\x1b[2J\\x07 \\ud800" in shown
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize("interactive", [True, False])
def test_a_narrow_terminal_breaks_no_word(config, interactive):
    """What goes on below stands under its beginning; in a file each line is whole."""
    path = "/a/path/that/is/longer/than/any/terminal/is/wide/and/has/to/be/copied"
    console, file = make(config, width=60, force_terminal=interactive, force_interactive=interactive)
    console._closed = True  # no live line
    long = "many words " * 12
    console.banner({**FACTS, "data": f"{long.strip()}, {path}", "run_dir": path})
    console.evaluation({"step": 60, "val_loss": 2.0, "val_perplexity": 7.389, "val_loss/first": 1.0, "val_loss/second": 3.0})
    console.sample(f"it {long}")
    console.summary(step=60, reads=f"{long}{path}")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).splitlines()
    wide = [line.strip() for line in lines if len(line) > 60]
    if not interactive:
        assert f"data        {long.strip()}, {path}" in lines
        assert len(wide) == 6, "model, data, run folder, evaluation, sample, what was read"
        return
    assert [line.removeprefix("run folder").strip() for line in wide] == [path] * 3
    assert "model       gpt_tiny: 4 layers, 128 wide, 8 heads," in lines
    assert "            vocabulary 257" in lines
    assert " " * 16 + "second 3.0000" in lines
    assert all(line[12:].startswith("many") or not line.startswith(" " * 12 + "many") for line in lines)
    assert lines[lines.index("The model writes:") + 2].startswith("  many")


def test_a_narrow_encoding_is_no_reason_to_die(config):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(config, 600, 0, rich.console.Console(file=file, force_terminal=True, force_interactive=True, width=60))
    show_all(console)
    console.sample("naïve ☃")
    file.flush()
    assert b"na\\xefve \\u2603" in raw.getvalue()


def test_the_banner_says_what_runs(config):
    console, file = make(config, width=60, first_step=200)
    console.banner(FACTS)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    for line in (
        "parameters  859k, 215k to 232k a rank",
        "layout      tp 2 x pp 2 x dp 1 = 4 processes",
        "            each layer over 2 ranks, layers over 2 stages",
        "            stage 0  [0 1]",
        "            stage 1  [2 3]",
        "schedule    1f1b, 8 micro-batches of 4 a step",
        "step        32 sequences x 256 = 8,192 tokens",
        "steps       600, continues after 200",
        "precision   fp32",
        "device      cpu, 4 processes",
        "data        python_docs, 11.2M tokens",
        "run folder  /runs/[red]x[/red]/[/]",
    ):
        assert line in lines


def test_the_banner_says_what_each_stage_has(config):
    config.parallel.schedule, config.parallel.stages_per_rank = "zb_v", 2
    console, file = make(config, width=100)
    stages = [(0, 0, 1, 1_210_000), (1, 1, 3, 400_000), (1, 3, 4, 200_000), (0, 4, 5, 240_000)]
    console.banner({"stages": stages, "bubble_fraction": 0.1114})
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    start = lines.index("            each layer over 2 ranks, layers over 4 stages on 2 ranks")
    assert lines[start + 1 : start + 8] == [
        "            stages 0 3  [..]",
        "            stages 1 2  [..]",
        "stages      0: layer 0, 1.21M parameters",
        "            1: layers 1-2, 400k parameters",
        "            2: layer 3, 200k parameters",
        "            3: layer 4, 240k parameters",
        "schedule    zb_v, 8 micro-batches of 4 a step, bubble 11.1 % by FLOPs",
    ]
    config.parallel.pp = config.parallel.stages_per_rank = 1
    console, file = make(config)
    console.banner({"stages": stages[:1], "bubble_fraction": 0.0})
    assert "stages" not in file.getvalue()
    assert "bubble" not in file.getvalue()


def test_the_grid_of_two_copies(config):
    config.parallel.dp = 2
    console, file = make(config, width=60)
    console.banner({"ranks": [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]})
    grid = "            copy 0   copy 1", "stage 0  [0 1]    [2 3]", "stage 1  [4 5]    [6 7]"
    assert [line.strip() for line in grid] == [line.strip() for line in file.getvalue().splitlines() if "copy " in line or "stage " in line]


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (8, 16, 64), (1, 1, 1000), (2, 1, 4)])
def test_the_grid_of_any_layout_fits_in_60_columns(config, sizes, numbered):
    tp, pp, dp = config.parallel.tp, config.parallel.pp, config.parallel.dp = sizes
    ranks = [[[(stage * dp + copy) * tp + rank for rank in range(tp)] for copy in range(dp)] for stage in range(pp)]
    console, file = make(config, width=60)
    console.banner({"tokens seen": 3, **({"ranks": ranks} if numbered else {})})
    grid = [line for line in file.getvalue().splitlines() if "stage " in line or "copy " in line]
    assert all(len(line) <= 60 for line in grid)
    assert bool(grid) == (sizes != (1, 1, 1))
    assert "tokens seen 3" in file.getvalue()


def test_a_terminal_shows_live_progress_and_gets_its_cursor_back(config):
    console, file = make(config, width=60, first_step=100, force_terminal=True, force_interactive=True)
    outer = sys.stdout
    console.banner(FACTS)
    console.step(record(120))
    console.say("a line above")
    console.summary(step=120)
    console.close()
    console.close()
    shown = file.getvalue()
    assert "\x1b[?25l" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "step 100/600" in plain
    assert re.search(r"step 120/600 .+ loss 2.3456  12.3k tok/s  ETA 0:45", plain)
    assert "grad" not in plain
    assert sys.stdout is outer
    console.step(record(130))
    assert "step   130/600  loss" in file.getvalue()


def test_the_log_gets_each_line_once_and_the_terminal_no_second_one(config, capsys, tmp_path):
    root = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(root)
    handler = logging.FileHandler(tmp_path / "rank-0.log", encoding="utf-8")
    logging.getLogger("tptrain").addHandler(handler)
    try:
        console = Console(config, 600, 0)
        show_all(console)
    finally:
        logging.getLogger().removeHandler(root)
        handler.close()
    shown = capsys.readouterr()
    log = (tmp_path / "rank-0.log").read_text()
    assert shown.err == ""
    assert [line.rstrip() for line in shown.out.splitlines() if line.strip()] == [line for line in log.splitlines() if line.strip()]
    assert log.count("step    10/600  loss") == 1


def test_a_terminal_s_log_has_the_plain_lines(config, tmp_path):
    handler = logging.FileHandler(tmp_path / "rank-0.log", encoding="utf-8")
    logging.getLogger("tptrain").addHandler(handler)
    show_all(make(config, width=60, force_terminal=True, force_interactive=True)[0])
    handler.close()
    log = (tmp_path / "rank-0.log").read_text()
    assert "step    10/600  loss 2.3456  grad 0.91" in log
    assert "\x1b" not in log


def test_warnings_reach_stderr_once(config, capsys):
    console = Console(config, 600, 0)
    Console(config, 600, 0).close()
    logging.getLogger("tptrain").warning("careful: %s", HOSTILE)
    console.close()
    assert capsys.readouterr().err == f"warning: careful: {HOSTILE}\n"
