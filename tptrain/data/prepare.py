"""`prepare`: from a config to the folder of a token store, once, before any rank starts.

In this order, so that the quick refusals come first: does the data exist, does its vocabulary fit the model, is there a
finished store (milliseconds), can one be made, is the text UTF-8; only then `datasets` is imported and ids are written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tptrain.config import Config, refuse
from tptrain.data.build import build_store
from tptrain.data.sources import open_source
from tptrain.data.store import TokenStore
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
    folder = build_store(data, source, tokenizer, data, data.val_fraction, report)
    _check_length(config, TokenStore.open(folder))
    return folder


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
