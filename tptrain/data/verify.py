"""Read all of a run's stores beside their checksums, and have what is damaged made again.

A start compares sizes and times, and a training checks the blocks that it reads; this leaves nothing unread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tptrain.config import Config
from tptrain.config_error import refuse
from tptrain.data.checksums import Damage
from tptrain.data.meta import read_meta
from tptrain.data.prepare import prepare
from tptrain.data.repair import damages_of
from tptrain.data.stores import Stores, find_stores
from tptrain.data.tokens import leave_mark


def prepare_verified(config: Config, report: Callable[[str], None] = print) -> tuple[Path, Stores]:
    """`prepare`, every file of its stores compared, and `prepare` once more if one was damaged. The folder, and its stores.

    Raises what `prepare` raises, and ConfigError where a damaged store cannot be written to.
    """
    folder, stores, damages = _prepare(config, report)
    if damages:
        folder, stores, damages = _prepare(config, report)
    if damages:
        rule = f"has a damaged store that cannot be made again ({damages[0]})"
        raise refuse("data.store_dir", config.data.store_dir, rule, "use data.store_dir=FOLDER with one that you may write to")
    return folder, stores


def verify(folder: Path) -> list[Damage]:
    """Compare every file of a store: one Damage for each that is damaged. Leaves the mark by which the next builder finds them."""
    damages = damages_of(folder, read_meta(folder))
    if damages:
        leave_mark(folder, damages)
    return damages


def _prepare(config: Config, report: Callable[[str], None]) -> tuple[Path, Stores, list[Damage]]:
    folder = prepare(config, report)
    stores = find_stores(folder, config.data.source)
    folders = {*stores.train.values(), *stores.val_sets.values(), *([] if stores.val_split is None else [stores.val_split])}
    return folder, stores, [damage for path in sorted(folders) for damage in verify(path)]
