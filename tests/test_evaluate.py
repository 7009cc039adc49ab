"""`tptrain eval` against transformers' own logits of the same model, against the run's metrics, under every layout; what it refuses."""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint.hugging_face.models import LENGTH, VOCAB, on_command_line, their_model
from tests.command import command, finish, start
from tests.ranks import run_ranks
from tests.support import SMALL
from tptrain import cli, launch
from tptrain.config import ConfigError
from tptrain.data import TokenStore
from tptrain.job import Job
from tptrain.multiple_choice.pairs import pairs_path
from tptrain.ranks import WORKS
from tptrain.row_losses import RowLosses

END = 256
DOCUMENTS = [f"def f{i}(x):\n    return {i} * x\n"[: 5 + 3 * (i % 11)] for i in range(150)]
QUESTIONS: list[dict[str, Any]] = [
    {"context": "def f1(", "choices": ["x):", "y) =", "z"], "label": 0},
    {"context": "", "choices": ["def", "return"], "label": 1, "note": "other keys mean nothing"},
    {"context": "  ret ", "choices": ["urn", "x", "éé"], "label": 2},
    {"context": "x * ", "choices": ["1", "22", "333", "4444444"], "label": 3},
]
MASKED_QUESTIONS = [question for question in QUESTIONS if question["context"]]
DATA = ["data=jsonl", "data.path=documents.jsonl", f"data.seq_len={LENGTH}", "data.val_fraction=0.3", "data.store_dir=stores"]
EVAL_STEPS = 3
TINY = ["optimizer.lr=0", "train.max_steps=1", f"train.eval_steps={EVAL_STEPS}", "train.sample_tokens=0", "train.trace_steps=[]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of both families whose weights are transformers' own, as the learning rate is 0; and copies that compute otherwise."""
    folder = tmp_path_factory.mktemp("runs")
    write_lines(folder / "documents.jsonl", [{"text": text} for text in DOCUMENTS])
    write_lines(folder / "questions.jsonl", QUESTIONS)
    write_lines(folder / "masked.jsonl", MASKED_QUESTIONS)
    plain = [argument for argument in SMALL if not argument.startswith(("data=", "data.", "model.", "train.eval"))]
    trainings = []
    for family in ("llama", "gpt2"):
        their_model(family, family == "gpt2").save_pretrained(folder / f"{family}-theirs")
        begins = [*on_command_line(family, family == "gpt2"), f"train.init_from={family}-theirs"]
        trainings.append(start(folder, *plain, *DATA, *TINY, *begins, f"hydra.run.dir={family}"))
    for outcome in map(finish, trainings):
        assert outcome.code == 0, outcome.err
    copy_run(folder, "gpt2", "gpt2-masked", "document_mask: false", "document_mask: true")
    copy_run(folder, "llama", "llama-bf16", "precision: fp32", "precision: bf16")
    return folder


@functools.cache
def theirs(runs: Path, family: str) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(runs / f"{family}-theirs").eval()


def copy_run(folder: Path, run: str, name: str, old: str, new: str) -> None:
    """A run with the same checkpoints and another config."""
    (folder / name).mkdir()
    (folder / name / "checkpoints").symlink_to(folder / run / "checkpoints")
    text = (folder / run / "config.yaml").read_text()
    assert text.count(old) == 1
    (folder / name / "config.yaml").write_text(text.replace(old, new))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- what transformers' logits say -------------------------------------------------------------------------


@torch.no_grad()
def token_log_probabilities(model: Any, rows: list[list[int]]) -> np.ndarray:
    """Of each id after its row's first, given those before it, by plain torch in fp64: [rows, length - 1]. Rows of one length."""
    ids = torch.tensor(rows)
    return model(ids[:, :-1]).logits.double().log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1).numpy()


def expected_choices(runs: Path, family: str, questions: list[dict[str, Any]]) -> list[list[float]]:
    """Each pair alone; ids are bytes."""
    model = theirs(runs, family)
    found = []
    for question in questions:
        context = question["context"].encode()
        found.append([])
        for choice in question["choices"]:
            ids = [*(context or [END]), *choice.encode()]
            blanks = len(context) - len(context.rstrip())  # are foretold with the choice
            found[-1].append(float(token_log_probabilities(model, [ids])[0, -len(choice.encode()) - blanks :].sum()))
    return found


def expected_loss(runs: Path, family: str, windows: list[list[int]], apart: bool = False) -> tuple[float, int]:
    """Mean loss and number of targets. apart: each document of a window by itself."""
    model = theirs(runs, family)
    rows = [piece for window in windows for piece in (split_behind_ends(window) if apart else [window]) if len(piece) > 1]
    total, count = 0.0, 0
    for length in {len(row) for row in rows}:
        found = token_log_probabilities(model, [row for row in rows if len(row) == length])
        total, count = total - float(found.sum()), count + found.size
    return total / count, count


def split_behind_ends(ids: list[int]) -> list[list[int]]:
    pieces: list[list[int]] = [[]]
    for number in ids:
        pieces[-1].append(number)
        if number == END:
            pieces.append([])
    return pieces


def windows(tokens: np.ndarray) -> list[list[int]]:
    """All samples that lie in tokens."""
    return [tokens[first : first + LENGTH + 1].tolist() for first in range(0, len(tokens) - LENGTH, LENGTH)]


def held_out(runs: Path) -> np.ndarray:
    (store,) = [TokenStore.open(path) for path in (runs / "stores").glob("jsonl-*") if TokenStore.open(path).val.num_tokens]
    return store.val.tokens[:]


# ---- the verb inside this process, its ranks beside it -----------------------------------------------------


def do_job(rank: int, job: Job) -> Any:
    """As a rank does that was started for it."""
    return WORKS[job.work].run(Job.load(job.work, job.run_dir, job.store_dir, WORKS[job.work].config))


@pytest.fixture
def evaluate(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`tptrain eval to=...`: what it wrote, by the name of its files without the hash."""
    monkeypatch.chdir(runs)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["tptrain"])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(job: Job) -> Any:
        launch.write_job(job)
        return run_ranks(job.config.processes, do_job, job)[0]

    monkeypatch.setattr(launch, "run", run)

    def call(*arguments: str, to: Path | None = None) -> dict[str, Any]:
        to = to or tmp_path / f"results-{len(list(tmp_path.iterdir()))}"
        assert cli._run(["eval", "hardware=cpu", f"to={to}", *arguments]) == 0
        files = {path.name: path.read_text() for path in (to / "step-00000001").iterdir()}
        found = {name.rpartition("-")[0]: json.loads(text) for name, text in files.items() if name.endswith(".json")}
        answers = [text for name, text in files.items() if name.endswith(".jsonl")]
        return {**found, "answers": [json.loads(line) for line in answers[0].splitlines()] if answers else None}

    return call


# ---- values ------------------------------------------------------------------------------------------------


def test_the_command_writes_what_transformers_computes(runs: Path) -> None:
    outcome = command(
        runs, "eval", "run=llama", "hardware=cpu", f"eval_steps={EVAL_STEPS}", "data=own", "choices=questions.jsonl", "parallel.pp=2"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.err.startswith("tptrain: evaluated in ")
    files = {path.name.rpartition("-")[0] + path.suffix: path for path in (runs / "llama/eval/step-00000001").iterdir()}
    assert files.keys() == {"jsonl.json", "questions.json", "questions.jsonl"}
    assert all(str(files[name]) in outcome.out for name in ("jsonl.json", "questions.json"))

    losses = json.loads(files["jsonl.json"].read_text())
    logged = [json.loads(line) for line in (runs / "llama/metrics.jsonl").read_text().splitlines()]
    logged = next(record for record in logged if "val_loss" in record)
    assert math.isclose(losses["val_loss"], logged["val_loss"], rel_tol=1e-6), "the same samples as in training"
    assert math.isclose(losses["val_perplexity"], logged["val_perplexity"], rel_tol=1e-5)
    assert losses["tokens"] == EVAL_STEPS * 8 * LENGTH
    assert f"{losses['val_loss']:.4f}" in outcome.out

    expected = expected_choices(runs, "llama", QUESTIONS)
    answers = [json.loads(line) for line in files["questions.jsonl"].read_text().splitlines()]
    for answer, scores, question in zip(answers, expected, QUESTIONS, strict=True):
        np.testing.assert_allclose(answer["log_likelihoods"], scores, rtol=0, atol=1e-4)
        assert answer["label"] == question["label"]
    by_length = {"accuracy": lambda text: 1, "accuracy_per_character": len, "accuracy_per_byte": lambda text: len(text.encode())}
    record = json.loads(files["questions.json"].read_text())
    for name, length in by_length.items():
        right = [
            max(range(len(scores)), key=lambda i: scores[i] / length(question["choices"][i])) == question["label"]
            for scores, question in zip(expected, QUESTIONS, strict=True)
        ]
        assert record[name] == sum(right) / len(QUESTIONS), name
    assert record["chance"] == (1 / 3 + 1 / 2 + 1 / 3 + 1 / 4) / 4


LAYOUTS = {
    "llama": ["parallel.tp=2 parallel.pp=2", "parallel.dp=4", "parallel.tp=4 parallel.micro_batch_size=3"],
    "gpt2-masked": ["parallel.pp=4", "parallel.tp=2 parallel.dp=2", "parallel.pp=2 parallel.dp=2 parallel.micro_batch_size=5"],
    "llama-bf16": ["parallel.pp=2 parallel.tp=2", "parallel.pp=2 parallel.dp=2"],
}


def test_every_layout_gives_what_transformers_computes(runs: Path, evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all of the held-out text, in rows that no layout divides evenly, and pairs of unequal length. One start serves all."""
    jobs: list[Job] = []

    def later(job: Job) -> Any:
        kept = Job(job.work, job.config, runs / f"job-{len(jobs)}", job.store_dir)
        launch.write_job(kept)
        pairs_path(job.run_dir, 0).rename(pairs_path(kept.run_dir, 0))
        jobs.append(kept)
        raise launch.Stopped("later")

    cases = [(run, layout) for run, layouts in LAYOUTS.items() for layout in layouts]
    with monkeypatch.context() as patch:
        patch.setattr(launch, "run", later)
        for run, layout in cases:
            with pytest.raises(launch.Stopped):
                evaluate(f"run={run}", "data=own", f"choices={file_of(run)}", *layout.split())
    measured, *others = run_ranks(4, do_jobs, jobs)
    assert all(other == measured for other in others), "ranks agree"

    rows = windows(held_out(runs))
    assert len(rows) % 4, "an uneven split"
    found_under = dict(zip(cases, measured, strict=True))
    for run, layouts in LAYOUTS.items():
        family, masked = run.split("-")[0], run.endswith("masked")
        tolerance = 2e-2 if run.endswith("bf16") else 2e-6
        loss, count = expected_loss(runs, family, rows, apart=masked)
        scores = [score for row in expected_choices(runs, family, MASKED_QUESTIONS if masked else QUESTIONS) for score in row]
        for layout in layouts:
            found = found_under[run, layout]
            total, tokens = found["sets"]["val_loss"]
            assert tokens == count, (run, layout)
            assert math.isclose(total / tokens, loss, rel_tol=tolerance), (run, layout)
            np.testing.assert_allclose(found["choices"][0], scores, rtol=10 * tolerance, err_msg=f"{run} {layout}")


def file_of(run: str) -> str:
    return "masked.jsonl" if run.endswith("masked") else "questions.jsonl"


def do_jobs(rank: int, jobs: list[Job]) -> list[dict[str, Any]]:
    found = [do_job(rank, job) for job in jobs]
    for one in found:
        del one["seconds"]
    return found


def test_other_data_is_read_whole_and_by_the_runs_tokenizer(runs: Path, evaluate, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("def g(x):\n    return x\n" * 9)
    (tmp_path / "b.txt").write_text("while True:\n    pass\n" * 7)
    other = ["data=text", f"data.path={tmp_path / 'a.txt'}", f"data.store_dir={tmp_path / 'stores'}"]
    both = evaluate("run=gpt2", *other, f"+data.val_sets={{b: {{source: text, path: {tmp_path / 'b.txt'}}}}}")["text"]
    for key, file in (("val_loss/text", "a.txt"), ("val_loss/b", "b.txt")):
        ids = [*(tmp_path / file).read_bytes(), END]
        loss, count = expected_loss(runs, "gpt2", windows(np.array(ids)))
        assert both["sets"][key]["tokens"] == count
        assert math.isclose(both["sets"][key]["val_loss"], loss, rel_tol=2e-6)
    assert both["val_loss"] == both["sets"]["val_loss/text"]["val_loss"]
    assert both["val_perplexity"] == pytest.approx(math.exp(both["val_loss"]))
    assert (both["data"]["source"], both["data"]["seq_len"]) == ("text", LENGTH)

    tail = evaluate("run=gpt2", *other, "whole=false", "data.val_fraction=0.2", "data.seq_len=8")["text"]
    assert tail["sets"].keys() == {"val_loss"}
    assert tail["tokens"] == round(0.2 * len((tmp_path / "a.txt").read_bytes())) // 8 * 8, "the file's end"


def test_a_cut_context_is_what_the_model_sees(runs: Path, evaluate, tmp_path: Path) -> None:
    """And the delimiter belongs to what is foretold."""
    long = {"context": "a long story about x", "choices": ["and y", "it"], "label": 1}
    write_lines(tmp_path / "long.jsonl", [long])
    found = evaluate("run=llama", f"choices={tmp_path / 'long.jsonl'}", "cut_context=true", "delimiter= ")
    model = theirs(runs, "llama")
    for choice, score in zip(long["choices"], found["answers"][0]["log_likelihoods"], strict=True):
        ids = list(f"{long['context']} {choice}".encode())[-LENGTH - 1 :]
        assert score == pytest.approx(token_log_probabilities(model, [ids])[0, -len(choice) - 1 :].sum(), abs=1e-4)
    assert found["long"]["cut_contexts"] == 2


def test_results_of_other_questions_stay(evaluate, tmp_path: Path) -> None:
    """And those of other samples; the same ones again take their own place."""
    for delimiter, steps in (("_", 1), ("-", 2), ("_", 1)):
        more = ("data=own", f"eval_steps={steps}", "choices=questions.jsonl", f"delimiter={delimiter}")
        evaluate("run=llama", *more, to=tmp_path / "kept")
    names = [path.name for path in (tmp_path / "kept/step-00000001").glob("*.json")]
    assert sorted(name.rpartition("-")[0] for name in names) == ["jsonl"] * 2 + ["questions"] * 2


@pytest.mark.parametrize(
    ("rows", "pp", "dp", "size"), [(1, 1, 1, 4), (30, 1, 2, 4), (97, 2, 3, 2), (64, 2, 1, 8), (65, 4, 1, 4), (5, 2, 4, 1)]
)
def test_every_row_has_one_rank_and_the_filling_is_small(rows: int, pp: int, dp: int, size: int) -> None:
    dealt, computed = [], []
    for rank in range(dp):
        losses = RowLosses.__new__(RowLosses)
        losses.mesh = type("Mesh", (), {"dp_size": dp, "dp_rank": rank})  # type: ignore[assignment]
        losses.micro_batch_size, losses.micro_batches = size, 1 if pp == 1 else 4 * pp
        own = list(losses.shares(rows))
        dealt += [row for _, first, count in own for row in range(first, first + count) if row < rows]
        computed.append([count for _, _, count in own])
    assert sorted(dealt) == list(range(rows))
    assert all(counts == computed[0] for counts in computed), "all ranks take part in every batch"
    assert dp * sum(computed[0]) - rows < dp * size


# ---- refusals ----------------------------------------------------------------------------------------------

LINE = '{"context": "a", "choices": ["b", "c"], "label": 0}'


@pytest.fixture
def refused(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The line that the command says before any rank starts."""
    monkeypatch.chdir(runs)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["tptrain"])
    monkeypatch.setattr(launch, "run", lambda job: pytest.fail("ranks were started"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str) -> str:
        try:
            code = cli._run(["eval", "hardware=cpu", f"to={tmp_path / 'to'}", *arguments])
        except ConfigError as error:
            return str(error)
        except SystemExit as leaving:
            code = leaving.code
        assert code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said.removeprefix("tptrain: ").rstrip("\n")

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "run=??? has no value: use run=VALUE"),
        ("run=nope data.path=x", "run=nope is no folder: use a run folder"),
        ("run=llama checkpoint=step-00000009", "checkpoint=step-00000009 is no complete checkpoint: use latest, step-00000001,"),
        ("run=llama parallel.tp=3", "parallel.tp=3 does not divide model.num_heads=4: use 1, 2 or 4"),
        ("run=llama parallel.pp=5", "parallel.pp=5 needs a layer a stage, but the run's model has 4: use 4 or less"),
        ("run=llama parallel.dp=0", "parallel.dp=0 is below 1: use 1 or more"),
        ("run=llama parallel.micro_batch_size=0", "parallel.micro_batch_size=0 is below 1: use 1 or more"),
        ("run=llama eval_steps=0", "eval_steps=0 is below 1: use 1 or more, or null"),
        ("run=llama data=none", "data=null and choices=null leave nothing to evaluate: use data=own"),
        ("run=llama data.seq_len=17", "data.seq_len=17 is over model.max_seq_len=16: use"),
        ("run=llama data.tokenizer.name=gpt2", "data.tokenizer.name=gpt2 asks for a vocabulary, and the model knows only its run's: leave"),
        ("run=llama data=memorize", "data.source=memorize draws ids that stand for no text; the run learned data.source=jsonl: use"),
        ("run=llama data=text data.path=nope", "data.path=nope "),
        ("run=llama data.val_fraction=0", "data.val_fraction=0.0 holds nothing out of data.source=jsonl to evaluate on: use whole=true"),
        ("run=llama data=text data.path=x data.streaming=true", "data.streaming=true has no end to evaluate up to: use"),
        ("run=llama data=mixture +data.mixture={a:{source:python_docs}}", "whole=true is for one source, and data.source=mixture: use"),
        ("run=llama data.sqe_len=8", "data.sqe_len=8 is an unknown key: use data.seq_len"),
        ("run=llama choices=nope.jsonl", "choices=nope.jsonl cannot be read (No such file or directory): use"),
        ("run=llama choices=[]", "choices=[] names no file: use"),
        ("run=llama to=questions.jsonl", "to=questions.jsonl is a file: use to=FOLDER"),
        ("run=llama -m eval_steps=1,2", "-m starts one job after another"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_in_one_line(refused, arguments: str, message: str) -> None:
    said = refused(*arguments.split())
    assert said.startswith(message), said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON ("),
        ("[1]", "has no object: write {"),
        ('{"context": "a", "label": 0}', "has no choices: write {"),
        ('{"context": 1, "choices": ["b", "c"], "label": 0}', "has a context that is no text: write {"),
        ('{"context": "a", "choices": ["b", 2], "label": 0}', "has choices that are no list of texts: write {"),
        ('{"context": "a", "choices": ["b"], "label": 0}', "has 1 choice: give two or more"),
        ('{"context": "a", "choices": ["b", ""], "label": 0}', "has an empty choice, number 1: give"),
        ('{"context": "a", "choices": ["b", "c"], "label": 2}', "has label 2 for 2 choices: use 0 to 1, 0 for the first choice"),
        ('{"context": "a", "choices": ["b", "c"], "label": -1}', "has label -1 for 2 choices: use 0 to 1"),
        ('{"context": "a", "choices": ["b", "c"], "label": "0"}', 'has label "0" for 2 choices: use 0 to 1'),
        ('{"context": "a", "choices": ["b", "c"], "label": true}', "has label true for 2 choices: use 0 to 1"),
        ('{"context": "\\ud800", "choices": ["b", "c"], "label": 0}', "is no UTF-8 text (surrogates not allowed): use"),
        ("\udcff", "is no UTF-8 text: write it as UTF-8"),
        (LINE.replace('"a"', '"' + "a" * 16 + '"').replace('"c"', '"cc"'),
         "has 16 tokens of context and 2 of choice 1, and model.max_seq_len=16 leaves room for 17: use a shorter context, or"),
        (LINE.replace('"c"', '"' + "c" * 17 + '"'),
         "has 1 tokens of context and 17 of choice 1, and model.max_seq_len=16 leaves room for 17: use a shorter choice"),
    ],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_a_bad_line_is_named(refused, tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(f"{LINE}\n\n{line}\n{LINE}\n".encode(errors="surrogateescape"))
    cuts = ["cut_context=true"] * ("c" * 17 in line)
    assert refused("run=llama", f"choices={file}", *cuts).startswith(f"choices={file} line 3 {message}")


def test_refused_for_what_the_model_has_learned(refused, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    assert refused("run=llama", f"choices={tmp_path / 'empty.jsonl'}").endswith("empty.jsonl has no questions: use a file with one a line")
    said = refused("run=gpt2-masked", "choices=questions.jsonl")
    assert said.startswith(
        "choices=questions.jsonl line 2 has an empty context, and with data.document_mask=true the model has not learned"
    )
    copy_run(runs, "gpt2", "gpt2-ids", "source: jsonl", "source: memorize")
    assert refused("run=gpt2-ids", "choices=questions.jsonl").startswith(
        "run=gpt2-ids learned data.source=memorize, whose tokens stand for no"
    )
    said = refused("run=gpt2-ids", "data=text", "data.path=documents.jsonl")
    assert said.startswith("data.source=text is text, and the run's ids stand for none; the run learned data.source=memorize: use")
    copy_run(runs, "gpt2", "gpt2-other", "num_layers: 4", "num_layers: 5")
    assert "is of another model: its model.num_layers is 4" in refused("run=gpt2-other")
    assert VOCAB % 2, "a vocabulary that tp does not divide"
