"""The verb `generate`, before its ranks: from a run folder and prompts to a job, or one line that says why not.

The job lives in a temporary folder, since the run folder belongs to the training: it is read, and nothing is written to it.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tptrain import interrupt, launch
from tptrain.checkpoint.folder import STATE_FILE, complete_checkpoints, home_of
from tptrain.checkpoint.start import differences
from tptrain.config import Config, ConfigError, refuse
from tptrain.data.tokenizers import load_tokenizer
from tptrain.failures import JobFailed
from tptrain.generate_config import GenerateCheckpointConfig, GenerateConfig, refuse_bad_values
from tptrain.job import Job

_DEFAULT_NEW_TOKENS = 200


def generate(config: GenerateConfig) -> None:
    """Write what the run's model makes of the prompts to stdout. config: typed.

    Raises ConfigError before a rank starts, JobFailed when a failure has been shown, Stopped on a signal.
    """
    config = settle(config)
    with interrupt.signals_stop(), job_folder("generate") as folder:
        done = launch.run(Job("generate", config, folder, folder))
    speed = done["tokens"] / done["seconds"]
    sys.stderr.write(f"tptrain: {done['tokens']:,} tokens, {speed:,.0f} a second, by {config.checkpoint.load}\n")


@contextlib.contextmanager
def job_folder(work: str) -> Iterator[Path]:
    """A temporary folder for a job, gone afterwards unless the job failed: then what was said names a log in it."""
    folder, keep = Path(tempfile.mkdtemp(prefix=f"tptrain-{work}-")), False
    try:
        yield folder
    except JobFailed:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def settle(config: GenerateConfig) -> GenerateConfig:
    """The config as the ranks need it: paths found, device chosen, a number of new tokens. Raises ConfigError."""
    refuse_bad_values(config)
    run_dir = Path(config.run)
    trained = read_run(run_dir)
    settled = launch.settle(_in_layout(trained, config), None)
    checkpoint = find_checkpoint(config.checkpoint.load, run_dir, trained)
    return replace(
        config,
        run=str(run_dir.absolute()),
        checkpoint=GenerateCheckpointConfig(str(checkpoint)),
        max_new_tokens=_new_tokens(config, settled, _prompt_tokens(config, trained)),
        hardware=settled.hardware,
    )


def read_run(run_dir: Path) -> Config:
    """The config that a run folder's training had. Raises ConfigError."""
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not (run_dir / "config.yaml").is_file():
        rule = "has no config.yaml, as every run folder has" if run_dir.is_dir() else "is no folder"
        raise refuse("run", run_dir, rule, "use a run folder, such as outputs/DATE/TIME")
    try:
        config: Config = Job.load("train", run_dir, run_dir).config
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        rule = f"has a config.yaml that this tptrain cannot read ({str(error).splitlines()[0]})"
        raise refuse("run", run_dir, rule, "use the tptrain that wrote it") from error
    return config


def find_checkpoint(load: str, run_dir: Path, trained: Config) -> Path:
    """The folder of the checkpoint asked for. Raises ConfigError where there is none, it is not complete, or of another model."""
    checkpoint = _checkpoint_folder(load, run_dir, home_of(trained.checkpoint, run_dir))
    for key, asked, saved in differences(trained, checkpoint, ["model"]):
        rule = f"is of another model: its {key} is {saved}, and that of {run_dir} is {asked}"
        raise refuse("checkpoint", load, rule, "use run=FOLDER with the run that saved it")
    return checkpoint


def _checkpoint_folder(load: str, run_dir: Path, home: Path) -> Path:
    complete = complete_checkpoints(home)
    if load == "latest":
        if not complete:
            raise refuse("run", run_dir, "has no complete checkpoint", "train until it saves one, or use checkpoint=PATH")
        return complete[-1].absolute()
    for folder in (home / load, Path(load)):
        if (folder / STATE_FILE).is_file():
            return folder.absolute()
    known = ", ".join(["latest", *(path.name for path in complete[-5:])])
    raise refuse("checkpoint", load, "is no complete checkpoint", f"use {known}, or the path of a step-* folder")


def _in_layout(trained: Config, config: GenerateConfig) -> Config:
    """The run's config under the layout and on the device asked for, whose checks say whether that can be. Raises ConfigError."""
    tp, pp, layers = config.parallel.tp, config.parallel.pp, trained.model.num_layers
    if pp > layers:
        raise refuse("parallel.pp", pp, f"needs a layer a stage, but the run's model has {layers}", f"use {layers} or less")
    parallel = replace(
        trained.parallel, tp=tp, pp=pp, dp=1, sequence_parallel=False, micro_batch_size=1, micro_batches=1,
        schedule="gpipe", stages_per_rank=1, partition="even",
    )  # fmt: skip
    train = replace(trained.train, global_batch_size=None)
    return replace(trained, parallel=parallel, train=train, hardware=config.hardware, launch=config.launch)


def _prompt_tokens(config: GenerateConfig, trained: Config) -> int:
    """Tokens of the longest prompt. Raises ConfigError where the run knows no text, or a prompt is none."""
    tokenizer = load_tokenizer(trained.data, Path(config.run))
    if tokenizer is None:
        rule = f"learned data.source={trained.data.source}, whose tokens stand for no text"
        raise refuse("run", config.run, rule, "use a run that learned text")
    try:
        return max(max(1, len(tokenizer.encode(prompt))) for prompt in config.prompts)
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt is no UTF-8 text ({error.reason}): use text that is") from error


def _new_tokens(config: GenerateConfig, trained: Config, prompt_tokens: int) -> int:
    """How many tokens follow. Raises ConfigError where the model cannot see them all."""
    seen = trained.model.max_seq_len
    left = seen - prompt_tokens
    if left < 1:
        rule = f"has {prompt_tokens} tokens, and model.max_seq_len={seen} leaves no room to go on"
        raise refuse("prompt", _shortened(config.prompts), rule, f"use at most {seen - 1} tokens")
    if config.max_new_tokens is None:
        return min(_DEFAULT_NEW_TOKENS, left)
    if config.max_new_tokens > left:
        rule = f"+ prompt of {prompt_tokens} tokens is over model.max_seq_len={seen}"
        raise refuse("max_new_tokens", config.max_new_tokens, rule, f"use {left} or less, or null")
    return config.max_new_tokens


def _shortened(prompts: Sequence[str]) -> str:
    """The longest prompt as one short line.

    >>> _shortened(["a", "def f(\\n" * 9])
    'def f(\\\\ndef f(\\\\ndef f(\\\\n...'
    """
    text = max(prompts, key=len)
    return (text[:21] + "..." if len(text) > 24 else text).replace("\n", "\\n")
