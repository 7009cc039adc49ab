"""What the token stores of a run hold, as one short text: the same on two machines only where the ids are the same (to within crc32)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tptrain.data.fingerprint import hash_of
from tptrain.data.hf_tokenizer import FILE
from tptrain.data.meta import StoreError, read_meta
from tptrain.data.stores import find_stores


def digest(folder: Path, source: str) -> str:
    """Hash of what `prepare` gave for data.source=source. Names, places and times do not enter; the shards' own checksums do.

    Of a stream it is the tokenizer and what is evaluated on. Raises StoreError where a store is not there or its meta.json is damaged.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder} is no folder")
    stores = find_stores(folder, source)
    named = {f"train/{name}": path for name, path in stores.train.items()}
    named |= {f"val/{name}": path for name, path in stores.val_sets.items()}
    if stores.val_split is not None:
        named["val"] = stores.val_split
    parts: list[object] = [
        [name, [[file.bytes, file.sums_crc32] for file in read_meta(path).files]] for name, path in sorted(named.items())
    ]
    if (folder / FILE).exists():
        parts.append(hashlib.sha256((folder / FILE).read_bytes()).hexdigest())
    return hash_of(*parts)
