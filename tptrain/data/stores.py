"""Which token stores a run reads: found by `prepare`, kept in one folder, found there again by each rank.

A run with one source needs no more than its store, which is then that folder. Else it is a small one beside the stores:

    set-91c5.../
        index.json        {"train": {"wiki": "../hub-ab12...", "code": "../jsonl-cd34..."}, "val_split": null, "val_sets": {...}}
        tokenizer.json    where the tokenizer has one
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tptrain.data.store import StoreError
from tptrain.files import write_atomically

INDEX_FILE = "index.json"


@dataclass(frozen=True)
class Stores:
    """Folders of token stores by what they are for."""

    train: Mapping[str, Path]
    """By the name of the source: one, or those of a mixture. Each store's `val` split is held out of it. None under streaming."""
    val_split: Path | None = None
    """The store, of which `train` is read, that takes the place of what is held out."""
    val_sets: Mapping[str, Path] = field(default_factory=dict)
    """Further stores to evaluate on, by name, of which `train` is read."""

    @property
    def only(self) -> Path | None:
        """The store, where there is just one of one source."""
        return next(iter(self.train.values())) if len(self.train) == 1 and self.val_split is None and not self.val_sets else None

    def text(self, folder: Path) -> str:
        """What stands in `folder`'s index.json: paths from there, so that the folder of all stores can be moved."""
        place = {name: os.path.relpath(path, folder) for name, path in self.train.items()}
        sets = {name: os.path.relpath(path, folder) for name, path in self.val_sets.items()}
        split = None if self.val_split is None else os.path.relpath(self.val_split, folder)
        return json.dumps({"train": place, "val_split": split, "val_sets": sets}, indent=1)

    def save(self, folder: Path) -> None:
        """Write `folder`'s index.json: whole or not at all."""
        write_atomically(folder / INDEX_FILE, self.text(folder).encode())


def find_stores(folder: Path, source: str) -> Stores:
    """What `folder` names, or the store that it is, of data.source=source. Raises StoreError for a damaged index."""
    path = folder / INDEX_FILE
    if not path.exists():
        return Stores({source: folder})
    try:
        index = json.loads(path.read_text("utf-8"))
        split = index["val_split"]
        train, val_sets = ({name: folder / place for name, place in index[key].items()} for key in ("train", "val_sets"))
        return Stores(train, None if split is None else folder / split, val_sets)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is no index of token stores: {error}") from error
