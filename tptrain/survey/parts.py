"""The splits that a run trains and evaluates on, each with a name and what is in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tptrain.data import Split, TokenStore
from tptrain.data.stores import Stores
from tptrain.data_config import DataConfig
from tptrain.survey.count import Counts, count


@dataclass(frozen=True)
class Part:
    """One split of a store."""

    label: str
    """`code`; `code, held out`; `split validation`; `val_sets.books`."""
    counts: Counts
    has_documents: bool
    """Not where the ids stand for no text."""
    trained: str | None
    """The name of the source where the run trains on it; None where it is evaluated on."""


def parts_of(data: DataConfig, stores: Stores) -> list[Part]:
    """Training sources first, each with what is held out of it. Raises StoreError for damage."""
    parts = []
    for name, path in stores.train.items():
        store = TokenStore.open(path)
        parts.append(_part(name, store, store.train, name))
        if parts[-1].has_documents and store.val.num_documents:  # memorize's is the same again
            parts.append(_part(f"{name}, held out", store, store.val))
    if stores.val_split is not None:
        label = f"split {data.val_split}" if data.val_split is not None else f"first {data.val_documents}, held out"
        parts.append(_evaluated(label, stores.val_split))
    return parts + [_evaluated(f"val_sets.{name}", path) for name, path in stores.val_sets.items()]


def _evaluated(label: str, path: Path) -> Part:
    """Such a store has nothing held out: all of it is its `train`."""
    store = TokenStore.open(path)
    return _part(label, store, store.train)


def _part(label: str, store: TokenStore, split: Split, trained: str | None = None) -> Part:
    return Part(label, count(split, store.vocab_size), store.tokenizer is not None, trained)
