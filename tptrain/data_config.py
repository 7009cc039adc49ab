"""The schema of the config group `data`, and the checks within it.

A source says where documents come from; the group's own keys say which one that is for a run with one source, and
`mixture` and `val_sets` name further ones in the same terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tptrain.config_error import refuse

SOURCES = ("python_docs", "text", "jsonl", "parquet", "saved", "hub", "memorize", "mixture")
"""Where documents can come from; `mixture` is of several others."""


@dataclass
class TokenizerConfig:
    """How text becomes token ids."""

    name: str
    """byte: one id a UTF-8 byte; train: a byte-level BPE learned from the run's own training text; else a Hugging Face tokenizer, by
    a folder, a tokenizer.json or a hub name."""
    vocab_size: int = 8192
    """For name=train: ids of the vocabulary, the end token among them."""
    revision: str | None = None
    """For a hub name: branch, tag or commit; null means the newest."""
    end_token: str | None = None
    """Token that ends a document; null means the one that the tokenizer itself names as its end of text."""


@dataclass
class SourceConfig:
    """Where documents come from."""

    source: str
    """python_docs, text, jsonl, parquet, saved (a folder made by save_to_disk), hub or memorize; for the whole group also mixture."""
    path: Any = None
    """For text, jsonl and parquet: a file, a folder, a glob, or a list of them; for saved: the folder."""
    name: str | None = None
    """For source=hub: the data set's name on the hub."""
    subset: str | None = None
    """For source=hub: which of its configurations; null means its default."""
    split: str = "train"
    """For source=hub and saved: which split is read."""
    revision: str | None = None
    """For source=hub: branch, tag or commit; null means the newest."""
    text_column: str = "text"
    """For jsonl, parquet, saved and hub: the column that holds a document's text."""
    num_sequences: int = 100
    """For source=memorize: how many random sequences."""
    vocab_size: int = 1024
    """For source=memorize: the ids they are drawn from."""


@dataclass
class MixturePart(SourceConfig):
    """One source of a mixture."""

    weight: float = 1.0
    """Share of the samples, relative to the other parts' weights."""


@dataclass
class DataConfig(SourceConfig):
    """What the model reads."""

    seq_len: int = field(kw_only=True)
    """Tokens in one training sequence."""
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(name="byte"))
    document_mask: bool = False
    """Keep the documents of a sequence apart: attention and positions start anew at each, and no loss is taken across."""
    val_fraction: float = 0.05
    """Share of the documents that is held out for evaluation."""
    val_split: str | None = None
    """For source=hub and saved: the split to evaluate on, in place of a held-out fraction."""
    val_documents: int = 0
    """With streaming: how many documents at the stream's start are held out, in place of a fraction."""
    val_sets: dict[str, SourceConfig] = field(default_factory=dict)
    """Further sources to evaluate on, by name: each one's loss is logged as val_loss/NAME."""
    mixture: dict[str, MixturePart] = field(default_factory=dict)
    """For source=mixture: its sources, by name."""
    temperature: float = 1.0
    """For source=mixture: weights are raised to 1/temperature; above 1, small parts gain."""
    streaming: bool = False
    """Read the source while training, with no token store; for what does not fit the disk."""
    stream_lanes: int = 8
    """With streaming: parts into which the stream is dealt out. A reader reads only the lanes that its samples come from; the lanes, not
    the layout, decide which text a sample holds."""
    stream_run: int = 1
    """With streaming: samples that come from one lane before the next has its turn. Global batch size / stream_lanes lets each dp rank
    read lanes of its own."""
    shuffle_buffer: int = 1000
    """With streaming: documents of a lane that are put in a mixed order at a time."""
    num_proc: Any = "auto"
    """Processes that tokenise; auto means one a core, and fewer for little text."""
    store_dir: str = "outputs/token_stores"
    """Where tokenised data is kept between runs."""


_NEEDED = {"text": "path", "jsonl": "path", "parquet": "path", "saved": "path", "hub": "name"}
"""The key without which a source is nowhere."""


def check_data(data: DataConfig) -> None:
    """Whether the group makes sense by itself. Raises ConfigError."""
    check_source(data, "data")
    for group, parts in (("mixture", data.mixture), ("val_sets", data.val_sets)):
        for name, part in parts.items():
            _check_name(group, name)
            check_source(part, f"data.{group}.{name}")
    _check_mixture(data)
    _check_validation(data)
    if data.num_proc != "auto" and not (isinstance(data.num_proc, int) and data.num_proc >= 1):
        raise refuse("data.num_proc", data.num_proc, "is neither auto nor a positive integer", "use auto, 1, 2, ...")
    if data.tokenizer.name == "train" and data.tokenizer.vocab_size < 257:
        raise refuse("data.tokenizer.vocab_size", data.tokenizer.vocab_size, "is below the 256 bytes and the end token", "use 257 or more")
    if data.document_mask and "memorize" in (data.source, *(part.source for part in (*data.mixture.values(), *data.val_sets.values()))):
        raise refuse("data.document_mask", True, "needs documents, and source=memorize has none", "use data.document_mask=false")


def check_source(part: SourceConfig, prefix: str) -> None:
    """Whether one source, whose keys begin with `prefix`, says where it is. Raises ConfigError."""
    known = SOURCES if prefix == "data" else SOURCES[:-1]
    if part.source not in known:
        raise refuse(f"{prefix}.source", part.source, "is unknown", f"use one of {', '.join(known)}")
    needed = _NEEDED.get(part.source)
    if needed is not None and not getattr(part, needed):
        what = "a data set on the hub" if needed == "name" else "files" if part.source != "saved" else "a folder"
        raise refuse(
            f"{prefix}.{needed}", getattr(part, needed), f"names no {part.source} data", f"use {prefix}.{needed}=... to name {what}"
        )
    for key, least in (("num_sequences", 1), ("vocab_size", 2)):
        if getattr(part, key) < least:
            raise refuse(f"{prefix}.{key}", getattr(part, key), f"is below {least}", f"use {least} or more")


def _check_name(group: str, name: str) -> None:
    if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise refuse(f"data.{group}", name, "is no name for a source", "use letters, digits, '_', '-' and '.'")


def _check_mixture(data: DataConfig) -> None:
    if data.source == "mixture":
        if not data.mixture:
            raise refuse("data.mixture", {}, "has no sources", "use +data.mixture='{NAME: {source: ..., weight: ...}, ...}'")
        if data.streaming:
            raise refuse("data.streaming", True, "reads one source, not a mixture", "use data.streaming=false, or one of the sources alone")
    elif data.mixture:
        rule = "is given, but data.source is not mixture"
        raise refuse("data.mixture", sorted(data.mixture), rule, "use data.source=mixture, or leave data.mixture away")
    both = sorted(data.mixture.keys() & data.val_sets.keys())
    if both:
        rule = "is also a source of the mixture, whose held-out documents have that name"
        raise refuse("data.val_sets", both[0], rule, "use another name")
    for name, part in data.mixture.items():
        if not (part.weight > 0 and math.isfinite(part.weight)):
            raise refuse(f"data.mixture.{name}.weight", part.weight, "is not above 0", "use a positive number, or leave the source away")
    if not (data.temperature > 0 and math.isfinite(data.temperature)):
        raise refuse("data.temperature", data.temperature, "is not above 0", "use a positive number; 1 leaves the weights as they are")


def _check_validation(data: DataConfig) -> None:
    for key, least in (("val_documents", 0), ("stream_lanes", 1), ("stream_run", 1), ("shuffle_buffer", 1)):
        if getattr(data, key) < least:
            raise refuse(f"data.{key}", getattr(data, key), f"is below {least}", f"use {least} or more")
    if not 0 <= data.val_fraction < 1:  # also where it is no number
        raise refuse("data.val_fraction", data.val_fraction, "is not from 0 up to, not including, 1", "use a share such as 0.05")
    if data.val_split is not None and data.source not in ("hub", "saved"):
        raise refuse(
            "data.val_split", data.val_split, f"names a split, and source={data.source} has none", "use data.val_fraction or data.val_sets"
        )
    if data.streaming and data.source == "memorize":
        raise refuse("data.streaming", True, "needs documents, and source=memorize has none", "use data.streaming=false")
    if data.streaming and data.val_fraction and data.val_split is None:
        rule = "cannot be held out of a stream, whose length is unknown"
        raise refuse(
            "data.val_fraction", data.val_fraction, rule, "use data.val_fraction=0, with data.val_documents, val_split or val_sets"
        )
    if data.val_documents and data.val_split is not None:
        raise refuse("data.val_documents", data.val_documents, "and data.val_split are both given", "use one of the two")
    trained: list[SourceConfig] = [*data.mixture.values()] or [data]
    evaluated = [name for name, part in data.val_sets.items() if part.source != "memorize"]
    if evaluated and all(part.source == "memorize" for part in trained):
        rule = f"is text, and source={data.source} trains on random ids, which no tokenizer stands behind"
        raise refuse(f"data.val_sets.{evaluated[0]}", data.val_sets[evaluated[0]].source, rule, "leave it away, or train on text")
    if data.val_documents and not data.streaming:
        raise refuse("data.val_documents", data.val_documents, "holds out of a stream, and data.streaming=false", "use data.val_fraction")
