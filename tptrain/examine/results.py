"""What an evaluation found, as files and as tables.

    RUN/eval/step-00000400/python_docs-1f0c33ab.json     loss and perplexity of a validation set, or of several
    RUN/eval/step-00000400/questions-77ab01d2.json       accuracies on a file of questions
    RUN/eval/step-00000400/questions-77ab01d2.jsonl      of each question the choices' log-likelihoods

The name is that of the data or of the file, and a hash of all that decides what was asked: the text and how it is cut into samples, or
the questions and how they are put. So the same evaluation again replaces its own results and no others.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tptrain.checkpoint.folder import home_of, read_state
from tptrain.data.dataset import VAL_LOSS
from tptrain.data.fingerprint import hash_of
from tptrain.examine.settle import Exam, Settled
from tptrain.files import write_atomically
from tptrain.monitor.metrics import plain
from tptrain.multiple_choice.accuracy import accuracies, grouped


@dataclass(frozen=True)
class Result:
    """What becomes of one measurement."""

    name: str
    """Of its files."""
    record: dict[str, Any]
    """The JSON file."""
    answers: list[dict[str, Any]]
    """The lines of the .jsonl file, if there are any."""


def result_of_data(settled: Settled, store_dir: Path, measured: Mapping[str, Any]) -> Result:
    """Losses and perplexities. store_dir: what `prepare` gave. measured: what the ranks gave."""
    data, weights = settled.config.data, measured["weights"]
    assert data is not None
    samples = None if settled.config.eval_steps is None else settled.config.eval_steps * read_batch_size(settled)
    losses = {key: total / tokens for key, (total, tokens) in measured["sets"].items()}
    sets = {key: _measured(losses[key], tokens) for key, (_, tokens) in measured["sets"].items()}
    if len(weights) > 1:
        sets = {key: {**one, "weight": weights.get(key, 0.0)} for key, one in sets.items()}
    mean = sum(weight * losses[key] for key, weight in weights.items())
    tokens = sum(measured["sets"][key][1] for key in weights)
    asked = {"source": data.source, "seq_len": data.seq_len, "document_mask": data.document_mask, "samples": samples}
    where = {key: getattr(data, key) for key in ("path", "name", "subset") if getattr(data, key) is not None}
    record = {**_head(settled), "data": {**asked, **where}, **_measured(mean, tokens), "sets": sets}
    return Result(f"{data.source}-{hash_of(store_dir.name, asked)[:8]}", record, [])


def result_of_exam(settled: Settled, exam: Exam, log_likelihoods: Sequence[float]) -> Result:
    """Accuracies. log_likelihoods: of each pair, in nats."""
    by_question = grouped(exam.questions, log_likelihoods)
    content = hashlib.sha256(Path(exam.file).expanduser().read_bytes()).hexdigest()
    put = {"delimiter": settled.config.delimiter, "cut_context": settled.config.cut_context}
    asked = {"file": str(Path(exam.file).expanduser().absolute()), "sha256": content, **put}
    found = {"questions": len(exam.questions), "pairs": len(exam.pairs), "cut_contexts": exam.pairs.cut}
    answers = [
        {"line": question.line, "label": question.label, "log_likelihoods": [plain(score) for score in scores]}
        for question, scores in zip(exam.questions, by_question, strict=True)
    ]
    stem = re.sub(r"[^\w.-]", "_", Path(exam.file).stem)
    record = {**_head(settled), "choices": asked, **found, **accuracies(exam.questions, by_question)}
    return Result(f"{stem}-{hash_of(content, put)[:8]}", record, answers)


def folder_of(settled: Settled) -> Path:
    """Where the results of this checkpoint go."""
    checkpoint = settled.checkpoint
    is_own = checkpoint.parent == home_of(settled.trained.checkpoint, Path(settled.config.run)).absolute()
    return settled.config.folder / (checkpoint.name if is_own else f"{checkpoint.name}-{hash_of(str(checkpoint))[:8]}")


def write(folder: Path, result: Result) -> Path:
    """Write a result; the path of its JSON file."""
    path = folder / f"{result.name}.json"
    if result.answers:
        lines = "".join(json.dumps(answer, allow_nan=False) + "\n" for answer in result.answers)
        write_atomically(path.with_suffix(".jsonl"), lines.encode())
    write_atomically(path, (json.dumps(result.record, indent=2, allow_nan=False) + "\n").encode())
    return path


def show(results: Sequence[tuple[Result, Path]]) -> None:
    """Print a table of losses and one of accuracies, each if there are any, and the files."""
    terminal = Console(highlight=False, markup=False, emoji=False)
    if not terminal.is_terminal:  # a pipe has no width of its own
        terminal = Console(highlight=False, markup=False, emoji=False, width=140)
    for table in (_losses([result for result, _ in results if "val_loss" in result.record]),
                  _accuracies([result for result, _ in results if "choices" in result.record])):  # fmt: skip
        if table.row_count:
            terminal.print(table)
    for _, path in results:
        terminal.print(f"results     {path}", soft_wrap=True)


def read_batch_size(settled: Settled) -> int:
    """Sequences of one of the run's global batches."""
    size: int = read_state(settled.checkpoint)["config"]["train"]["global_batch_size"]
    return size


def _head(settled: Settled) -> dict[str, Any]:
    layout = {axis: size for axis, size in asdict(settled.config.parallel).items() if axis in ("tp", "pp", "dp")}
    step = read_state(settled.checkpoint)["step"]
    return {"checkpoint": str(settled.checkpoint), "step": step, "precision": settled.trained.train.precision, "layout": layout}


def _measured(loss: float, tokens: float) -> dict[str, Any]:
    """A loss in the words of metrics.jsonl; what is not finite is null."""
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"val_loss": plain(loss), "val_perplexity": plain(perplexity), "tokens": int(tokens)}


def _losses(results: Sequence[Result]) -> Table:
    table = _table("validation set", "loss", "perplexity", "tokens")
    for result in results:
        sets, source = result.record["sets"], result.record["data"]["source"]
        for key, one in sets.items():
            table.add_row(source if key == VAL_LOSS else Text(key.removeprefix(f"{VAL_LOSS}/")), *_shown(one))
        if any("weight" in one for one in sets.values()):
            table.add_row("mean by share", *_shown(result.record))
    return table


def _shown(one: Mapping[str, Any]) -> tuple[str, str, str]:
    loss, perplexity = one["val_loss"], one["val_perplexity"]
    return "-" if loss is None else f"{loss:.4f}", "-" if perplexity is None else f"{perplexity:,.3f}", f"{one['tokens']:,}"


def _accuracies(results: Sequence[Result]) -> Table:
    table = _table("multiple choice", "questions", "accuracy", "per character", "per byte", "chance")
    for result in results:
        record = result.record
        shares = [f"{100 * record[key]:.2f} %" for key in ("accuracy", "accuracy_per_character", "accuracy_per_byte", "chance")]
        table.add_row(Text(Path(record["choices"]["file"]).name), f"{record['questions']:,}", *shares)
    return table


def _table(name: str, *headings: str) -> Table:
    table = Table()
    table.add_column(name)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
