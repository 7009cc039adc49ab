"""What an evaluation is to do, or one line that says why it cannot be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tptrain import launch
from tptrain.answer import find_checkpoint, read_run
from tptrain.config import Config, DataConfig, refuse
from tptrain.data import load_tokenizer
from tptrain.data.dataset import is_held_out
from tptrain.data.tokenizers import Tokenizer
from tptrain.data_config import SourceConfig
from tptrain.eval_config import EvalConfig, EvalParallelConfig, refuse_bad_values
from tptrain.generate_config import GenerateCheckpointConfig
from tptrain.multiple_choice.pairs import Encoding, Pairs
from tptrain.multiple_choice.questions import Question, read_questions


@dataclass(frozen=True)
class Exam:
    """One file of questions."""

    file: str
    questions: list[Question]
    pairs: Pairs


@dataclass(frozen=True)
class Settled:
    """An evaluation that can be done."""

    config: EvalConfig
    """As the ranks need it: paths found, device chosen."""
    trained: Config
    """The run's config, with the data, the layout and the device of the evaluation."""
    checkpoint: Path
    tokenizer: Tokenizer | None
    """The run's; None where its ids stand for no text."""
    exams: list[Exam]


def settle(config: EvalConfig) -> Settled:
    """Find everything that the evaluation needs. config: typed. Raises ConfigError."""
    run_dir = Path(config.run)
    trained = read_run(run_dir)
    refuse_bad_values(config)
    checkpoint = find_checkpoint(config.checkpoint.load, run_dir, trained)
    tokenizer = load_tokenizer(trained.data, run_dir)
    data = None if config.data is None else evaluated_data(config, config.data, trained, tokenizer)
    settled = launch.settle(in_layout(trained, config, data or trained.data), None)
    exams = read_exams(config, trained, tokenizer)
    config = replace(
        config,
        run=str(run_dir.absolute()),
        data=data,
        checkpoint=GenerateCheckpointConfig(str(checkpoint)),
        parallel=replace(config.parallel, micro_batch_size=settled.parallel.micro_batch_size),
        hardware=settled.hardware,
    )
    return Settled(config, settled, checkpoint, tokenizer, exams)


def evaluated_data(config: EvalConfig, data: DataConfig, trained: Config, tokenizer: Tokenizer | None) -> DataConfig:
    """The data with the run's tokenizer, so changed that its validation sets are what is to be evaluated. Raises ConfigError."""
    _check_vocabulary(data, trained, tokenizer)
    data = replace(data, tokenizer=trained.data.tokenizer)
    if config.whole:
        return whole(data)
    if not (is_held_out(data) or data.val_split is not None or data.val_sets or (data.streaming and data.val_documents)):
        rule = f"holds nothing out of data.source={data.source} to evaluate on"
        raise refuse("data.val_fraction", data.val_fraction, rule, "use whole=true for all of it, or data=OPTION for other text")
    return data


def whole(data: DataConfig) -> DataConfig:
    """Data whose validation set is all its text, or its val_split. Raises ConfigError for a mixture and for a stream."""
    if data.source == "mixture":
        raise refuse("whole", True, "is for one source, and data.source=mixture", "use whole=false, or its sources as data.val_sets")
    if data.streaming:
        raise refuse(
            "data.streaming", True, "has no end to evaluate up to", "use data.streaming=false, or whole=false with data.val_documents"
        )
    if data.source == "memorize":
        return data
    kept = {field.name: getattr(data, field.name) for field in fields(SourceConfig)}
    source = SourceConfig(**{**kept, "split": data.val_split or data.split})
    return replace(data, val_fraction=0.0, val_split=None, split=source.split, val_sets={data.source: source, **data.val_sets})


def _check_vocabulary(data: DataConfig, trained: Config, tokenizer: Tokenizer | None) -> None:
    """Whether the data's ids are those that the model has learned."""
    sources = [*data.mixture.values(), *data.val_sets.values()] + [data] * (data.source != "mixture")
    for part in sources:
        if (part.source == "memorize") != (tokenizer is None):
            drawn = "draws ids that stand for no text" if tokenizer is not None else "is text, and the run's ids stand for none"
            rule = f"{drawn}; the run learned data.source={trained.data.source}"
            raise refuse("data.source", part.source, rule, "use data of the kind that the run learned")


def in_layout(trained: Config, config: EvalConfig, data: DataConfig) -> Config:
    """The run's config with the data, in the layout and on the device asked for, whose checks say whether that can be."""
    asked, layers = config.parallel, trained.model.num_layers
    if asked.pp > layers:
        raise refuse("parallel.pp", asked.pp, f"needs a layer a stage, but the run's model has {layers}", f"use {layers} or less")
    if asked.dp < 1:
        raise refuse("parallel.dp", asked.dp, "is below 1", "use 1 or more")
    parallel = replace(
        trained.parallel, tp=asked.tp, pp=asked.pp, dp=asked.dp, sequence_parallel=False, micro_batches=1,
        micro_batch_size=_rows(asked, trained), schedule="gpipe", stages_per_rank=1, partition="even",
    )  # fmt: skip
    train = replace(trained.train, global_batch_size=None, eval_steps=config.eval_steps)
    return replace(trained, data=data, parallel=parallel, train=train, hardware=config.hardware, launch=config.launch)


def _rows(asked: EvalParallelConfig, trained: Config) -> int:
    return trained.parallel.micro_batch_size if asked.micro_batch_size is None else asked.micro_batch_size


def read_exams(config: EvalConfig, trained: Config, tokenizer: Tokenizer | None) -> list[Exam]:
    """The files of questions, as ids. Raises ConfigError for a run that knows no text, and for a line that cannot be used."""
    if config.files and tokenizer is None:
        rule = f"learned data.source={trained.data.source}, whose tokens stand for no text"
        raise refuse("run", config.run, rule, "use a run that learned text, or choices=null")
    return [_read_exam(file, config, trained, tokenizer) for file in config.files if tokenizer is not None]


def _read_exam(file: str, config: EvalConfig, trained: Config, tokenizer: Tokenizer) -> Exam:
    questions: Sequence[Question] = read_questions(file)
    begins = not trained.data.document_mask
    encoding = Encoding(tokenizer, trained.model.max_seq_len, config.delimiter, config.cut_context, begins)
    return Exam(file, list(questions), encoding.pairs(file, questions))
