"""`tptrain eval`, from its config to its tables. The job lives in a temporary folder; the run folder gets results, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

from tptrain import interrupt, launch
from tptrain.answer import job_folder
from tptrain.config import refuse
from tptrain.data import prepare
from tptrain.eval_config import EvalConfig
from tptrain.examine import results
from tptrain.examine.settle import Settled, settle
from tptrain.job import Job
from tptrain.multiple_choice.accuracy import runs_together
from tptrain.multiple_choice.pairs import pairs_path


def examine(config: EvalConfig) -> None:
    """Measure, write the results and print them. config: typed.

    Raises ConfigError before a rank starts, JobFailed when a failure has been shown, Stopped on a signal.
    """
    settled = settle(config)
    folder = results.folder_of(settled)
    _make(folder, config)
    _warn(settled)
    with interrupt.signals_stop(), job_folder("eval") as job_dir:
        data = settled.config.data
        store_dir = job_dir if data is None else prepare(settled.trained, print, settled.tokenizer, training=False)
        for number, exam in enumerate(settled.exams):
            exam.pairs.save(pairs_path(job_dir, number))
        measured = launch.run(Job("eval", settled.config, job_dir, store_dir))
    found = [] if data is None else [results.result_of_data(settled, store_dir, measured)]
    for exam, log_likelihoods in zip(settled.exams, measured["choices"], strict=True):
        found.append(results.result_of_exam(settled, exam, log_likelihoods))
    results.show([(result, results.write(folder, result)) for result in found])
    sys.stderr.write(f"tptrain: evaluated in {measured['seconds']:,.1f} s, by {settled.checkpoint}\n")


def _make(folder: Path, config: EvalConfig) -> None:
    """Make the folder of the results now, rather than find out later that it cannot be. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be made ({error.strerror})"
        raise refuse("to", config.to or config.folder, rule, "use to=FOLDER with one that you may write to") from error


def _warn(settled: Settled) -> None:
    """Say what in the questions may not be meant."""
    for exam in settled.exams:
        together = runs_together(exam.questions, settled.config.delimiter)
        if together is not None:
            word = f"{together.context[-12:].split()[-1]}{together.choices[0][:12].split()[0]}"
            sys.stderr.write(
                f"tptrain: {exam.file}, line {together.line}: context and choice run together ({word}); delimiter=' ' parts them\n"
            )
        if exam.pairs.cut:
            sys.stderr.write(f"tptrain: {exam.file}: {exam.pairs.cut} of {len(exam.pairs)} contexts are cut on their left\n")
