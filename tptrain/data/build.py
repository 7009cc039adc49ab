"""`build_store`: from one source to the folder of its token store.

In this order, so that the quick refusals come first: does the data exist, does its vocabulary fit the model, is there a
finished store (milliseconds), can one be made, is the text UTF-8; only then `datasets` is imported and ids are written.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tptrain.config import DataConfig, refuse
from tptrain.data.memorize import KEY, random_tokens
from tptrain.data.sources import Source
from tptrain.data.splits import held_out, split_tail
from tptrain.data.store import FORMAT, StoreWriter, TokenStore, is_store
from tptrain.data.tokenizers import ByteTokenizer
from tptrain.data_config import SourceConfig


def build_store(
    part: SourceConfig,
    source: Source | None,
    tokenizer: ByteTokenizer | None,
    data: DataConfig,
    val_fraction: float,
    report: Callable[[str], None],
) -> Path:
    """Find or build the token store of one source, and return its absolute folder.

    source, tokenizer: None for memorize. report: called with a line at a time on what is done.
    Raises ConfigError for text that is not UTF-8, and for a data.store_dir that cannot hold a store.
    """
    settings = replace(data, source=part.source, path=part.path, num_sequences=part.num_sequences, vocab_size=part.vocab_size,
                       val_fraction=val_fraction)  # fmt: skip
    fingerprint = _fingerprint(settings, source, tokenizer)
    folder = Path(data.store_dir).expanduser().absolute() / f"{part.source}-{fingerprint[:16]}"
    if is_store(folder, fingerprint):
        store = TokenStore.open(folder)
        report(f"{part.source}: {_short(store.train.num_tokens + store.val.num_tokens)} tokens in {folder}")
    else:
        _build(settings, source, tokenizer, folder, fingerprint, report)
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
            _tokenise(data, source.checked(), tokenizer, writer, report)
        store = writer.finish()
    seconds = time.perf_counter() - started
    report(f"{_short(store.train.num_tokens + store.val.num_tokens)} tokens in {seconds:.1f} s -> {folder}")
    return store


def _tokenise(data: DataConfig, source: Source, tokenizer: ByteTokenizer, writer: StoreWriter, report: Callable[[str], None]) -> None:
    """Append each document, followed by the end-of-document id, to its split.

    With a single document and a val_fraction above 0, its head is a document of train and its tail one of val.
    """
    names = source.names()
    report(f"tokenising {data.source}: {len(names)} document{'s' * (len(names) != 1)}")
    validation = held_out(names, data.val_fraction)
    end = np.array([tokenizer.end_of_document])
    with TemporaryDirectory(dir=writer.building) as cache_dir:
        for name, text in source.read(Path(cache_dir)):
            parts = {"val" if name in validation else "train": text}
            if len(names) == 1 and data.val_fraction > 0:
                parts["train"], parts["val"] = split_tail(text, data.val_fraction)
            for split, part in parts.items():
                writer.append(split, np.concatenate((tokenizer.encode(part), end)))


def _memorize_tokens(data: DataConfig) -> int:
    """Ids for num_sequences windows of seq_len + 1, each of which shares one id with the next."""
    return data.num_sequences * data.seq_len + 1


def _short(count: int) -> str:
    """A count in three digits: 12.1M.

    >>> _short(12_119_000), _short(3_200), _short(812)
    ('12.1M', '3.2K', '812')
    """
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
