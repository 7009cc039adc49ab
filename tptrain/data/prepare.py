"""`prepare`: from a config to the token stores of a run, once, before any rank starts.

In this order, so that the quick refusals come first: is every source there, does the vocabulary fit the model; then the
tokenizer, which may have to be trained; then the store of each source, found in milliseconds or built; then its length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tptrain.config import Config
from tptrain.config_error import refuse
from tptrain.data.build import build_store
from tptrain.data.dataset import is_held_out
from tptrain.data.fingerprint import hash_of
from tptrain.data.head import Head
from tptrain.data.mixture import PERIOD, shares_of, slots_of
from tptrain.data.sources import Source, open_source
from tptrain.data.space import Space
from tptrain.data.store import Split, TokenStore
from tptrain.data.stores import Stores
from tptrain.data.tokenizers import Tokenizer
from tptrain.data.train_tokenizer import obtain_tokenizer
from tptrain.data_config import DataConfig, SourceConfig


@dataclass(frozen=True)
class _Part:
    """One source that the run reads."""

    name: str
    keys: str
    """Where it stands in the config: `data`, `data.mixture.wiki`, `data.val_sets.books`."""
    config: SourceConfig
    source: Source | None
    """None for memorize."""

    @staticmethod
    def open(name: str, keys: str, config: SourceConfig, split: str | None = None) -> _Part:
        """Raises ConfigError where the source is not there."""
        return _Part(name, keys, config, None if config.source == "memorize" else open_source(config, keys, split))


def prepare(config: Config, report: Callable[[str], None] = print, tokenizer: Tokenizer | None = None, training: bool = True) -> Path:
    """Check what `config.data` asks for, find or build its token stores, and return the absolute folder that `open_data` takes.

    report: called with a line at a time on what is done. tokenizer: one that is there already, in place of the one that the config names.
    training: False where only the validation sets are wanted; the folder is then for `open_validation`.
    Raises ConfigError for data that is missing, unreadable, not UTF-8 text, too short for one sequence or beyond the
    model's vocabulary, and for a data.store_dir that cannot hold a store.
    """
    data = config.data
    train, val_split, val_sets = _open_parts(config)
    if data.streaming and training:
        _check_stream(config, train[0], [*val_split, *val_sets])
        report(f"streaming {train[0].source.label if train[0].source else ''}: read while training, with no token store")
    _check_shares(data)
    _check_ids(config, [*train, *val_split, *val_sets])
    if tokenizer is None:
        tokenizer = obtain_tokenizer(data, [part.source for part in train if part.source is not None], report)
    _check_vocabulary(config, tokenizer)
    in_stores = not data.streaming and (training or is_held_out(data))

    def build(part: _Part, val_fraction: float) -> Path:
        return build_store(part.config, part.source, None if part.source is None else tokenizer, data, val_fraction, report)

    stores = Stores(
        {part.name: build(part, data.val_fraction if is_held_out(data) else 0.0) for part in (train if in_stores else ())},
        next((build(part, 0.0) for part in val_split), None),
        {part.name: build(part, 0.0) for part in val_sets},
    )
    _check_lengths(config, stores, training)
    return stores.only or _keep(stores, data, tokenizer)


def _open_parts(config: Config) -> tuple[list[_Part], list[_Part], list[_Part]]:
    """What is trained on, the split that is evaluated on, if any, and the further validation sets."""
    data = config.data
    if data.source == "mixture":
        train = [_Part.open(name, f"data.mixture.{name}", part) for name, part in data.mixture.items()]
    else:
        train = [_Part.open(data.source, "data", data)]
    if config.train.eval_steps == 0:
        return train, [], []
    val_split = [_Part.open(data.source, "data", data, data.val_split)] if data.val_split is not None else []
    if data.streaming and data.val_documents and train[0].source is not None:
        val_split = [replace(train[0], source=Head(train[0].source, data.val_documents))]
    return train, val_split, [_Part.open(name, f"data.val_sets.{name}", part) for name, part in data.val_sets.items()]


def _keep(stores: Stores, data: DataConfig, tokenizer: Tokenizer | None) -> Path:
    """Write the folder that names the stores. Raises ConfigError for a data.store_dir that cannot hold it."""
    parent = Path(data.store_dir).expanduser().absolute()
    of_tokenizer = tokenizer.fingerprint() if tokenizer is not None and data.streaming else ""  # else the stores' names tell
    folder = parent / f"set-{hash_of(stores.text(parent / 'set'), of_tokenizer)[:16]}"
    with Space(data.store_dir, parent):
        if tokenizer is not None:
            tokenizer.save(folder)
        stores.save(folder)
    return folder


# ---- refusals ------------------------------------------------------------------------------------------------


def _check_stream(config: Config, train: _Part, validation: list[_Part]) -> None:
    """Whether the stream gives a text, and whether there is something to evaluate on, which needs an end."""
    if train.source is not None:
        next(Head(train.source, 1).texts(), None)
    if config.train.eval_steps != 0 and not validation:
        steps = config.train.eval_steps
        rule = "has nothing to evaluate on, since a stream holds nothing out by itself"
        raise refuse("train.eval_steps", steps, rule, "use 0, or data.val_documents=500, data.val_split or data.val_sets")


def _check_shares(data: DataConfig) -> None:
    """Whether each source of a mixture gives at least one sample in a period."""
    if data.source != "mixture":
        return
    shares = shares_of({name: part.weight for name, part in data.mixture.items()}, data.temperature)
    for name, slots in zip(shares, slots_of(list(shares.values())), strict=True):
        if not slots:
            rule = f"is a share of {shares[name]:.1e}, less than one sample in {PERIOD:,}"
            raise refuse(f"data.mixture.{name}.weight", data.mixture[name].weight, rule, "use a larger weight, or leave the source away")


def _check_ids(config: Config, parts: list[_Part]) -> None:
    """Whether the model has a row for each id that is drawn, and for each of a vocabulary that is to be learned."""
    rows = config.model.vocab_size
    for part in parts:
        drawn = part.config.vocab_size
        if part.source is None and drawn > rows:
            raise refuse(f"{part.keys}.vocab_size", drawn, f"is above model.vocab_size={rows}",
                         f"use {part.keys}.vocab_size={rows} or less, or model.vocab_size={drawn} or more")  # fmt: skip
    wanted = config.data.tokenizer.vocab_size
    if config.data.tokenizer.name == "train" and wanted > rows and any(part.source is not None for part in parts):
        raise refuse("model.vocab_size", rows, f"is below data.tokenizer.vocab_size={wanted}",
                     f"use model.vocab_size={wanted} or more, or data.tokenizer.vocab_size={rows} or less")  # fmt: skip


def _check_vocabulary(config: Config, tokenizer: Tokenizer | None) -> None:
    """Whether the model has a row for each of the tokenizer's ids."""
    rows = config.model.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise refuse("model.vocab_size", rows, f"is below the {tokenizer.name} tokenizer's {tokenizer.vocab_size} ids",
                     f"use model.vocab_size={tokenizer.vocab_size} or more")  # fmt: skip


def _check_lengths(config: Config, stores: Stores, training: bool) -> None:
    """Whether each split that is read has one sequence; with eval_steps=0 no validation split is, and without training no other."""
    data, last = config.data, "more text, or train.eval_steps=0" if training else "or more text"
    for name, path in stores.train.items():
        store = TokenStore.open(path)
        of_source = f" of {name}" if data.source == "mixture" else ""
        if training:
            _check_length(data, store.train, "data.seq_len", data.seq_len, f"is too long for the train split{of_source}", "", last)
        if config.train.eval_steps != 0 and (is_held_out(data) or not (stores.val_split or stores.val_sets)):
            rule = f"leaves the val split{of_source}"
            _check_length(data, store.val, "data.val_fraction", data.val_fraction, rule, "a larger data.val_fraction, ", last)
    if stores.val_split is not None:
        split = TokenStore.open(stores.val_split).train
        if data.val_split is None:
            _check_length(data, split, "data.val_documents", data.val_documents, "have", "a larger data.val_documents, ", last)
        else:
            _check_length(data, split, "data.val_split", data.val_split, "has", "another split, ", last)
    for name, path in stores.val_sets.items():
        key, split = f"data.val_sets.{name}", TokenStore.open(path).train
        _check_length(data, split, key, data.val_sets[name].source, "has", "another source, ", last)


def _check_length(data: DataConfig, split: Split, key: str, value: object, rule: str, remedy: str, last: str) -> None:
    """Refuse a split shorter than one sequence. remedy, last: what else than a shorter sequence would do."""
    found, needed = split.num_tokens, data.seq_len + 1
    if found >= needed:
        return
    sum_text = f"a sequence needs data.seq_len + 1 = {needed}"
    shorter = f"data.seq_len={found - 1} or less, " if found > 1 else ""
    if key == "data.seq_len":
        raise refuse(key, value, f"{rule}: {sum_text} tokens, and it has {found}", f"use {shorter}{'or ' * bool(shorter)}more text")
    raise refuse(key, value, f"{rule} {found} tokens, but {sum_text}", f"use {remedy}{shorter}{last}")
