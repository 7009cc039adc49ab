"""Is a finished store still what was written, and if not, which shards are to be made again?

Sizes and times of the files are compared at every start. Where one is another, or a reader left the mark, every checksum is.
A shard is made again from its range of documents, and takes the damaged one's place only if it is that very shard, by its
checksum. The times that meta.json notes and the mark change last, so that a repair that dies is begun again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tptrain.data.checksums import Damage, FileNote, check_file, sums_path, unchanged
from tptrain.data.meta import Meta, StoreError, read_meta, write_meta
from tptrain.data.progress import BuildProgress
from tptrain.data.shards import Range, Work
from tptrain.data.space import Space
from tptrain.data.tokenise import tokenise
from tptrain.data.tokens import MARK
from tptrain.files import sync_folder


@dataclass(frozen=True)
class Found:
    """A store that is there, whole or not."""

    folder: Path
    meta: Meta
    damages: list[Damage]
    """One for each file that is damaged."""


def find(folder: Path, fingerprint: str) -> Found | None:
    """The store in `folder`; None where there is no meta.json with this fingerprint. Milliseconds, if no file was touched."""
    try:
        meta = read_meta(folder)
    except StoreError:
        return None
    if meta.fingerprint != fingerprint:
        return None
    marked = (folder / MARK).exists()
    if not marked and all(unchanged(folder, note) for note in meta.files):
        return Found(folder, meta, [])
    meta = meta.with_notes(lambda note: _with_time(folder, note))  # of before the check
    damages = damages_of(folder, meta)
    if not damages:
        with suppress(OSError):  # of a folder that others own
            _settle(folder, meta)
    return Found(folder, meta, damages)


def damages_of(folder: Path, meta: Meta) -> list[Damage]:
    """Read every file of a store and compare: one Damage for each that is damaged."""
    damages = []
    for note in meta.files:
        try:
            check_file(folder, note)
        except Damage as damage:
            damages.append(damage)
    return damages


def repair(found: Found, work: Work, num_proc: Any, report: Callable[[str], None], space: Space) -> bool:
    """Make the damaged shards again; False where all must be built anew, as another file is damaged or the text has changed.

    work: with a folder that is not there yet, on the same file system as the store.
    """
    names = {damage.path.name.removesuffix(".sums") for damage in found.damages}
    every = sorted({(shard.first, shard.last) for shard in found.meta.shards})
    if not names <= {shard.file.name for shard in found.meta.shards} or every[-1][1] != len(work.documents):
        return False
    damaged = {(shard.first, shard.last) for shard in found.meta.shards if shard.file.name in names}
    ranges = [Range(number, *ends) for number, ends in enumerate(every) if ends in damaged]
    work.folder.mkdir()
    with BuildProgress(found.meta.source, sum(part.text_bytes(work.documents) for part in ranges)) as progress:
        space.progress = progress
        written = tokenise(work, ranges, num_proc, progress)
    made = {shard.file.name: shard for shards in written for shard in shards.values()}
    for old in found.meta.shards:
        new = made.get(old.file.name, old)
        if not old.file.same_content(new.file) or (old.file.name not in made and (old.first, old.last) in damaged):
            report(f"{found.folder}: the source has changed, so all of it is built anew")
            return False
    _replace(found, work.folder, {name: shard.file for name, shard in made.items()})
    report(f"{len(names)} shard{'s' * (len(names) != 1)} made anew in {found.folder}")
    return True


def _replace(found: Found, folder: Path, made: dict[str, FileNote]) -> None:
    """Put the files that were made in `folder` in the place of the store's own."""
    for name in made:
        for path in (folder / name, sums_path(folder / name)):
            os.replace(path, found.folder / path.name)
    sync_folder(found.folder)
    _settle(found.folder, found.meta.with_notes(lambda note: made.get(note.name, note)))


def _with_time(folder: Path, note: FileNote) -> FileNote:
    try:
        return replace(note, mtime_ns=(folder / note.name).stat().st_mtime_ns)
    except OSError:
        return note  # a missing file is a damage that the check finds


def _settle(folder: Path, meta: Meta) -> None:
    """Note the times of files that are right, and take the mark away."""
    write_meta(folder, meta)
    (folder / MARK).unlink(missing_ok=True)
    sync_folder(folder)
