"""`build_store`: find the token store of one source, or make it, once, whoever else starts at the same time.

    found      meta.json with the fingerprint, and files of the sizes and times that it notes: milliseconds, no lock
    damaged    `repair` names the files and makes them again
    absent     a hidden folder beside the store's place is filled, put on disk, and renamed last

So a builder that dies leaves a hidden folder, which nobody opens and the next builder removes. A lock makes the second of two
builders wait for the first and use what that one made; it is the kernel's, and ends with the process that holds it.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from tptrain.data.checksums import FileNote, SummedFile, write_summed
from tptrain.data.fingerprint import hash_of
from tptrain.data.lock import locked
from tptrain.data.memorize import KEY, random_tokens
from tptrain.data.meta import FORMAT, SPLITS, Meta, Shard, SplitMeta, dtype_of, write_meta
from tptrain.data.progress import BuildProgress
from tptrain.data.repair import Found, find, repair
from tptrain.data.shards import Plan, Work, lengths_path, plan, shard_name
from tptrain.data.sources import Source
from tptrain.data.space import Space
from tptrain.data.splits import hold_out
from tptrain.data.tokenise import tokenise
from tptrain.data.tokenizers import Tokenizer
from tptrain.data_config import DataConfig, SourceConfig
from tptrain.files import near, sync_folder

Report = Callable[[str], None]


def build_store(
    part: SourceConfig, source: Source | None, tokenizer: Tokenizer | None, data: DataConfig, val_fraction: float, report: Report
) -> Path:
    """Find or build the store of one source, and return its absolute folder.

    part: the source's own keys. source, tokenizer: None for memorize, whose ids stand for no text. report: called with a line
    at a time on what is done. Raises ConfigError for text that cannot be used and a data.store_dir that cannot hold a store.
    """
    fingerprint = _fingerprint(part, source, tokenizer, data, val_fraction)
    folder = Path(data.store_dir).expanduser().absolute() / f"{part.source}-{fingerprint[:16]}"
    builder = _Builder(part, source, tokenizer, data, val_fraction, report, folder, fingerprint)
    if not builder.is_there():
        builder.make()
    elif builder.leftovers() or builder.lock.exists():
        builder.clear()
    return folder


def _fingerprint(part: SourceConfig, source: Source | None, tokenizer: Tokenizer | None, data: DataConfig, val_fraction: float) -> str:
    """Hash of all that the ids follow from, in hex digits; no file is read."""
    if source is None or tokenizer is None:
        parts: list[object] = ["memorize", KEY, _memorize_tokens(part, data), part.vocab_size]
    else:
        parts = [part.source, source.fingerprint(), part.text_column, tokenizer.name, tokenizer.fingerprint(), val_fraction]
    return hash_of(FORMAT, *parts)


class _Builder:
    """One store's making."""

    def __init__(
        self, part: SourceConfig, source: Source | None, tokenizer: Tokenizer | None, data: DataConfig, val_fraction: float,
        report: Report, folder: Path, fingerprint: str,
    ) -> None:  # fmt: skip
        self.part, self.source, self.tokenizer, self.data, self.val_fraction = part, source, tokenizer, data, val_fraction
        self.report, self.folder, self.fingerprint = report, folder, fingerprint
        self.found: Found | None = None
        """The store that is there; under the lock nobody else changes it."""
        self.building = folder.parent / f".building-{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.lock = folder.with_name(f".{folder.name}.lock")
        self.made = self.building / "store"
        """What is renamed at the end; beside it is what only the building needs."""

    def is_there(self) -> bool:
        """Whether the store is there, whole; says so."""
        self.found = find(self.folder, self.fingerprint)
        if self.found is None or self.found.damages:
            return False
        self.report(f"{self.part.source}: {short(self.found.meta.tokens)} tokens in {near(self.folder)}")
        return True

    def make(self) -> None:
        """Build or repair it, or wait for the process that does."""
        with Space(self.data.store_dir, self.folder.parent) as space:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.lock, lambda: self.report(f"waiting for another process that builds {self.folder}")) as alone:
                if alone:
                    self._remove_leftovers()
                if self.is_there():
                    return  # another builder was first
                try:
                    self.made.mkdir(parents=True)
                    self._make(space)
                finally:
                    shutil.rmtree(self.building, ignore_errors=True)

    def leftovers(self) -> list[Path]:
        """Hidden folders of builders that died, or of one that is at work."""
        return list(self.folder.parent.glob(f".building-{glob.escape(self.folder.name)}-*"))

    def clear(self) -> None:
        """Remove what a builder left that died when it had all but finished."""
        with suppress(OSError), locked(self.lock, lambda: None) as alone:  # of a folder that others own
            if alone:
                self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for folder in self.leftovers():
            shutil.rmtree(folder, ignore_errors=True)

    def _make(self, space: Space) -> None:
        started = time.perf_counter()
        for damage in self.found.damages if self.found else ():
            self.report(f"{damage}: making it anew")
        if self.found is None and self.folder.exists():
            self.report(f"{self.folder}/meta.json is missing or damaged: making all of the store anew")
        if self.source is None or self.tokenizer is None:
            meta = self._memorize()
        else:
            with space.loading(self.building / "cache"):
                documents = self.source.load(self.building / "cache")
            work = Work(documents, self.tokenizer, hold_out(len(documents), documents.names, self.val_fraction), self.made)
            if self.found and repair(self.found, replace(work, folder=self.building / "repair"), self.data.num_proc, self.report, space):
                return
            self.report(f"tokenising {self.source.label}: {len(documents)} document{'s' * (len(documents) != 1)}")
            meta = self._tokenise(work, plan(documents), space)
        shutil.rmtree(self.building / "cache", ignore_errors=True)
        write_meta(self.made, meta)
        self._install()
        seconds = time.perf_counter() - started
        self.report(f"{short(meta.tokens)} tokens in {seconds:.1f} s -> {near(self.folder)}")

    def _tokenise(self, work: Work, planned: Plan, space: Space) -> Meta:
        with BuildProgress(self.part.source, planned.total_bytes) as progress:
            space.progress = progress
            shards = tokenise(work, planned.ranges, self.data.num_proc, progress)
        splits = {}
        for split in SPLITS:
            of_split = tuple(written[split] for written in shards if split in written)
            splits[split] = SplitMeta(_write_offsets(self.made, split, of_split), of_split)
        ours = set(self.made.iterdir())
        work.tokenizer.save(self.made)
        others = tuple(write_summed(path, path.read_bytes()) for path in sorted(set(self.made.iterdir()) - ours))
        return Meta(self.fingerprint, self.part.source, work.tokenizer.name, work.tokenizer.vocab_size, work.tokenizer.end_of_document,
                    splits, others)  # fmt: skip

    def _memorize(self) -> Meta:
        """The same ids in both splits, as one document each."""
        ids = random_tokens(_memorize_tokens(self.part, self.data), self.part.vocab_size).astype(dtype_of(self.part.vocab_size))
        self.report(f"drawing memorize: {self.part.num_sequences} sequences")
        splits = {}
        for split in SPLITS:
            note = write_summed(self.made / shard_name(split, 0), ids.tobytes())
            offsets = write_summed(self.made / f"{split}.offsets", np.array([0, len(ids)], dtype="<i8").tobytes())
            splits[split] = SplitMeta(offsets, (Shard(note, len(ids), 1, 0, 1),))
        return Meta(self.fingerprint, self.part.source, None, self.part.vocab_size, None, splits)

    def _install(self) -> None:
        """Rename the finished folder into place; what is there is damaged."""
        sync_folder(self.made)
        try:
            os.rename(self.made, self.folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            os.rename(self.folder, self.building / "damaged")
            os.rename(self.made, self.folder)
        sync_folder(self.folder.parent)


def _write_offsets(folder: Path, split: str, shards: Sequence[Shard]) -> FileNote:
    """Where the documents of all shards start, from the lengths that the shards' writers left; removes those."""
    tokens = 0
    with SummedFile(folder / f"{split}.offsets") as file:
        file.write(bytes(8))
        for shard in shards:
            path = lengths_path(folder / shard.file.name)
            ends = tokens + np.cumsum(np.fromfile(path, dtype="<i8"))
            file.write(ends.astype("<i8").tobytes())
            tokens = int(ends[-1])
            path.unlink()
        return file.finish()


def _memorize_tokens(part: SourceConfig, data: DataConfig) -> int:
    """Ids for num_sequences windows of seq_len + 1, each of which shares one id with the next."""
    return part.num_sequences * data.seq_len + 1


def short(count: int) -> str:
    """A count in three digits: 12.1M.

    >>> short(12_119_000), short(3_200), short(812)
    ('12.1M', '3.2K', '812')
    """
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
