"""What the sources share: names of files in a cache, rows as a stream, files of rows, and quiet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tptrain.config_error import as_text
from tptrain.data.fingerprint import hash_of
from tptrain.data.sources.files import Files

if TYPE_CHECKING:
    import datasets


def cache_file(cache_dir: Path, fingerprint: str) -> Path:
    """The arrow file of a source's documents."""
    return Path(cache_dir) / f"documents-{fingerprint[:16]}.arrow"


def by_rows(rows: Callable[..., Iterator[dict[str, str]]], column: str, files: Sequence[str], **arguments: Any) -> datasets.IterableDataset:
    """A stream of `rows(files=..., column=..., **arguments)`, with one shard a file: a reader of some shards gets their files only."""
    import datasets

    features = datasets.Features({column: datasets.Value("large_string")})
    return datasets.IterableDataset.from_generator(rows, features, gen_kwargs={"files": list(files), "column": column, **arguments})


@dataclass(frozen=True)
class RowFiles:
    """Files whose rows are documents."""

    files: Files
    asked: Any
    """The path as it was asked for."""
    column: str
    prefix: str
    kind: ClassVar[str]

    @property
    def label(self) -> str:
        """For reports."""
        return f"{self.kind} {as_text(self.asked)}"

    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and times, and of the column's name."""
        return hash_of(self.kind, self.column, *self.files.stamps())


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and no log lines of `datasets` meanwhile: what goes wrong is told by an error."""
    import datasets

    bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
