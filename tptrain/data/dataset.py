"""What a run trains and evaluates on: the rows of a token store or of several, by sample number.

Validation sets go by the key of their loss in metrics.jsonl:

    val_loss          what is held out of the run's one source, or its val_split
    val_loss/NAME     what is held out of a mixture's source, and each of data.val_sets

`val_loss` is there in every run: of a mixture it is the sources' mean by their shares of the samples, and where nothing is
held out it is the loss of the first of data.val_sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tptrain.config import Config
from tptrain.data.mixture import Mixture, shares_of
from tptrain.data.rows import Rows
from tptrain.data.sampler import Sampler
from tptrain.data.sources import open_source
from tptrain.data.store import Split, TokenStore
from tptrain.data.stores import Stores, find_stores
from tptrain.data.stream import StreamRows
from tptrain.data.tokenizers import load_tokenizer
from tptrain.data.tokens import Tokens
from tptrain.data_config import DataConfig

_EVALUATION_SEED = 0
"""The same for all runs: the held-out samples in a mixed order, so that a few batches already stand for all documents."""
VAL_LOSS = "val_loss"


@dataclass(frozen=True)
class Data:
    """All that a trainer reads."""

    train: Rows
    validation: Mapping[str, Rows]
    """By the key of their loss; none where train.eval_steps is 0."""
    weights: Mapping[str, float]
    """Of which of those losses `val_loss` is the mean, by weights that sum to 1."""
    train_tokens: Mapping[str, int]
    """Tokens of each source by name: a run that continues must find as many. None for a stream."""
    end_of_document: int | None = None
    """The id that ends each document; None where the ids stand for no text."""
    text: str = ""
    """What it is, in a line of the banner."""

    @classmethod
    def of_tokens(cls, config: Config, train: np.ndarray, val: np.ndarray | None = None, end_of_document: int | None = None) -> Data:
        """Of ids [n] that lie in memory: some to train on, and one validation set, of the same ids where it is None."""
        validation = {VAL_LOSS: _validation_rows(config, train if val is None else val)} if config.train.eval_steps != 0 else {}
        rows = Sampler(train, config.data.seq_len, config.seed)
        return cls(rows, validation, dict.fromkeys(validation, 1.0), {config.data.source: len(train)}, end_of_document)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` samples of the run go through each source; none for a stream."""
        if isinstance(self.train, Mixture):
            taken, parts = self.train.taken(samples), self.train.parts
        else:
            taken, parts = dict.fromkeys(self.train_tokens, samples), dict.fromkeys(self.train_tokens, self.train)
        return {name: taken[name] / part.samples_per_epoch for name, part in parts.items() if part.samples_per_epoch}

    def reads(self, samples: int) -> str:
        """The same in words: `wiki 70.0 % 1.3 epochs, code 30.0 % 0.2 epochs`; `1.3 epochs` of a lone source."""
        epochs = self.epochs(samples)
        if isinstance(self.train, Mixture):
            return ", ".join(f"{name} {100 * share:.1f} % {_times(epochs[name])}" for name, share in self.train.shares.items())
        return ", ".join(map(_times, epochs.values()))

    def mean(self, losses: Mapping[str, float]) -> dict[str, float]:
        """`val_loss` first, then the losses of `validation`."""
        return {VAL_LOSS: sum(weight * losses[key] for key, weight in self.weights.items()), **losses}


def open_data(config: Config, folder: Path) -> Data:
    """The data whose stores `prepare` has found or built. Raises StoreError where one of them is gone or damaged."""
    stores = find_stores(folder, config.data.source)
    if config.data.streaming:
        return _open_stream(config, stores, folder)
    train = {name: TokenStore.open(path) for name, path in stores.train.items()}
    validation, weights, held_out = _validation(config, stores, train)
    counts = {name: store.train.num_tokens for name, store in train.items()}
    ends = {store.end_of_document for store in train.values()} - {None}
    read = f"{config.data.source}: {sum(counts.values()):,} tokens"
    return Data(_training(config, train), validation, weights, counts, next(iter(ends), None), f"{read}, {held_out}" if held_out else read)


@dataclass(frozen=True)
class Validation:
    """All that an evaluation reads."""

    rows: Mapping[str, Rows]
    """By the key of their loss."""
    weights: Mapping[str, float]
    """Of which of those losses `val_loss` is the mean, by weights that sum to 1."""
    end_of_document: int | None
    """The id that ends each document; None where the ids stand for no text."""


def open_validation(config: Config, folder: Path) -> Validation:
    """The validation sets alone, of stores that `prepare` has found or built. Raises StoreError where one is gone or damaged."""
    stores = find_stores(folder, config.data.source)
    train = {name: TokenStore.open(path) for name, path in stores.train.items()}
    rows, weights, _ = _validation(config, stores, train)
    paths = [*stores.train.values(), *stores.val_sets.values(), *([] if stores.val_split is None else [stores.val_split])]
    ends = {TokenStore.open(path).end_of_document for path in paths} - {None}
    return Validation(rows, weights, next(iter(ends), None))


def _open_stream(config: Config, stores: Stores, folder: Path) -> Data:
    data = config.data
    source, tokenizer = open_source(data), load_tokenizer(data, folder)
    assert tokenizer is not None, "a stream has documents"
    validation, weights, held_out = _validation(config, stores, {})
    read = f"streaming {source.label}, {data.stream_lanes} lanes, {data.shuffle_buffer:,} documents of each mixed at a time"
    rows = StreamRows(source, tokenizer, data, config.seed)
    return Data(rows, validation, weights, {}, tokenizer.end_of_document, f"{read}, {held_out}" if held_out else read)


def _training(config: Config, stores: Mapping[str, TokenStore]) -> Rows:
    data = config.data
    if data.source != "mixture":
        (store,) = stores.values()
        return Sampler(store.train.tokens, data.seq_len, config.seed)
    parts = {name: Sampler(store.train.tokens, data.seq_len, f"{config.seed}/{name}") for name, store in stores.items()}
    return Mixture(parts, {name: part.weight for name, part in data.mixture.items()}, data.temperature)


def _validation(config: Config, stores: Stores, train: Mapping[str, TokenStore]) -> tuple[dict[str, Rows], dict[str, float], str]:
    """The validation sets, the weights of their losses in `val_loss`, and what they are in words."""
    if config.train.eval_steps == 0:
        held_out = sum(store.val.num_tokens for store in train.values())
        return {}, {}, f"{held_out:,} held out" if train else ""
    data = config.data
    splits: dict[str, Split] = {}
    if stores.val_split is not None:
        splits[VAL_LOSS] = TokenStore.open(stores.val_split).train
    elif is_held_out(data):
        of_mixture = data.source == "mixture"
        splits = {f"{VAL_LOSS}/{name}" if of_mixture else VAL_LOSS: store.val for name, store in train.items()}
    held_out = sum(split.num_tokens for split in splits.values())
    words = [f"{held_out:,} held out" if data.val_split is None else f"{held_out:,} in split {data.val_split}"] if splits else []
    weights = dict.fromkeys(splits, 1.0)
    if len(splits) > 1:
        shares = shares_of({name: part.weight for name, part in data.mixture.items()}, data.temperature)
        weights = {f"{VAL_LOSS}/{name}": share for name, share in shares.items()}
    for name, path in stores.val_sets.items():
        split = TokenStore.open(path).train
        splits[f"{VAL_LOSS}/{name}"] = split
        weights = weights or {f"{VAL_LOSS}/{name}": 1.0}
        words.append(f"{split.num_tokens:,} in {name}")
    return {key: _validation_rows(config, split.tokens) for key, split in splits.items()}, weights, ", ".join(words)


def is_held_out(data: DataConfig) -> bool:
    """Whether part of the training source is held out for evaluation. Memorize evaluates on what it learns."""
    return data.val_split is None and not data.streaming and (data.val_fraction > 0 or data.source == "memorize")


def _validation_rows(config: Config, tokens: np.ndarray | Tokens) -> Sampler:
    return Sampler(tokens, config.data.seq_len, _EVALUATION_SEED)


def _times(epochs: float) -> str:
    """`1.31 epochs`, `0.0021 epochs`."""
    return f"{epochs:.3g} epochs" if epochs < 100 else f"{epochs:,.0f} epochs"
