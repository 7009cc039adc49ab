"""`prepare`: from a config to the folder of a token store, once, before any rank starts.

In this order, so that the quick refusals come first: does the data exist, does its vocabulary fit the model, is there a
finished store (milliseconds), can one be made, is the text UTF-8; only then `datasets` is imported and ids are written.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tptrain.config import Config, DataConfig, refuse
from tptrain.data.memorize import KEY, random_tokens
from tptrain.data.sources import Source, open_source
from tptrain.data.splits import held_out, split_tail
from tptrain.data.store import FORMAT, StoreWriter, TokenStore, is_store
from tptrain.data.tokenizers import ByteTokenizer, load_tokenizer


def prepare(config: Config, report: Callable[[str], None] = print) -> Path:
    """Check what `config.data` asks for, find or build its token store, and return the store's absolute folder.

    report: called with a line at a time on what is done.
    Raises ConfigError for data that is missing, unreadable, not UTF-8 text, too short for one sequence or beyond the
    model's vocabulary, and for a data.store_dir that cannot hold a store.
    """
    data = config.data
    source = None if data.source == "memorize" else open_source(data)
    tokenizer = load_tokenizer(data)
    _check_vocabulary(config, tokenizer)
    fingerprint = _fingerprint(data, source, tokenizer)
    folder = Path(data.store_dir).expanduser().absolute() / f"{data.source}-{fingerprint[:16]}"
    if is_store(folder, fingerprint):
        store = TokenStore.open(folder)
        report(f"{data.source}: {_short(store.train.num_tokens + store.val.num_tokens)} tokens in {folder}")
    else:
        store = _build(data, source, tokenizer, folder, fingerprint, report)
    _check_length(config, store)
    return folder


def _fingerprint(data: DataConfig, source: Source | None, tokenizer: ByteTokenizer | None) -> str:
    """Hash of all that the ids follow from, in hex digits; no file is read."""
    if source is None or tokenizer is None:
        parts: list[object] = ["memorize", KEY, _memorize_tokens(data), data.vocab_size]
    else:
        parts = [source.fingerprint(), tokenizer.name, tokenizer.vocab_size, data.val_fraction]
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()


def _build(
    data: DataConfig, source: Source | None, tokenizer: ByteTokenizer | None, folder: Path, fingerprint: str, report: Callable[[str], None]
) -> TokenStore:
    """Write the store that is not there yet."""
    started = time.perf_counter()
    try:
        writer = StoreWriter(
            folder, fingerprint, data.source,
            tokenizer=tokenizer.name if tokenizer else None,
            vocab_size=tokenizer.vocab_size if tokenizer else data.vocab_size,
            end_of_document=tokenizer.end_of_document if tokenizer else None,
        )  # fmt: skip
    except OSError as error:
        raise refuse("data.store_dir", data.store_dir, f"cannot hold a token store ({error.strerror})",
                     "use data.store_dir=FOLDER with one that you can write to") from error  # fmt: skip
    with writer:
        if source is None or tokenizer is None:
            report(f"drawing memorize: {data.num_sequences} sequences")
            ids = random_tokens(_memorize_tokens(data), data.vocab_size)
            writer.append("train", ids)
            writer.append("val", ids)
        else:
            _tokenise(data, source, tokenizer, writer, report)
        store = writer.finish()
    seconds = time.perf_counter() - started
    report(f"{_short(store.train.num_tokens + store.val.num_tokens)} tokens in {seconds:.1f} s -> {folder}")
    return store


def _tokenise(data: DataConfig, source: Source, tokenizer: ByteTokenizer, writer: StoreWriter, report: Callable[[str], None]) -> None:
    """Append each document, followed by the end-of-document id, to its split.

    With a single document and a val_fraction above 0, its head is a document of train and its tail one of val.
    """
    end = np.array([tokenizer.end_of_document])
    with TemporaryDirectory(dir=writer.building) as cache_dir:
        documents = source.load(Path(cache_dir))
        names = documents.names or [str(row) for row in range(len(documents))]
        report(f"tokenising {data.source}: {len(names)} document{'s' * (len(names) != 1)}")
        validation = held_out(names, data.val_fraction)
        for index, name in enumerate(names):
            (text,) = documents.texts(index, index + 1)
            parts = {"val" if name in validation else "train": text}
            if len(names) == 1 and data.val_fraction > 0:
                parts["train"], parts["val"] = split_tail(text, data.val_fraction)
            for split, part in parts.items():
                writer.append(split, np.concatenate((tokenizer.encode(part), end)))


def _memorize_tokens(data: DataConfig) -> int:
    """Ids for num_sequences windows of seq_len + 1, each of which shares one id with the next."""
    return data.num_sequences * data.seq_len + 1


def _check_vocabulary(config: Config, tokenizer: ByteTokenizer | None) -> None:
    """Whether the model has a row for each id."""
    rows, data = config.model.vocab_size, config.data
    if tokenizer is None and data.vocab_size > rows:
        raise refuse("data.vocab_size", data.vocab_size, f"is above model.vocab_size={rows}",
                     f"use data.vocab_size={rows} or less, or model.vocab_size={data.vocab_size} or more")  # fmt: skip
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise refuse("model.vocab_size", rows, f"is below the {tokenizer.name} tokenizer's {tokenizer.vocab_size} ids",
                     f"use model.vocab_size={tokenizer.vocab_size} or more")  # fmt: skip


def _check_length(config: Config, store: TokenStore) -> None:
    """Whether each split that will be read has one sequence; with eval_steps=0 the validation split is not read."""
    data, needed = config.data, config.data.seq_len + 1
    sum_text = f"a sequence needs data.seq_len + 1 = {needed}"
    if store.train.num_tokens < needed:
        found = store.train.num_tokens
        shorter = f"data.seq_len={found - 1} or less, or " if found > 1 else ""
        raise refuse("data.seq_len", data.seq_len, f"is too long for the train split: {sum_text} tokens, and it has {found}",
                     f"use {shorter}more text")  # fmt: skip
    found = store.val.num_tokens
    if config.train.eval_steps != 0 and found < needed:
        shorter = f"data.seq_len={found - 1} or less, " if found > 1 else ""
        raise refuse("data.val_fraction", data.val_fraction, f"leaves the val split {found} tokens, but {sum_text}",
                     f"use a larger data.val_fraction, {shorter}more text, or train.eval_steps=0")  # fmt: skip


def _short(count: int) -> str:
    """A count in three digits: 12.1M.

    >>> _short(12_119_000), _short(3_200), _short(812)
    ('12.1M', '3.2K', '812')
    """
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
