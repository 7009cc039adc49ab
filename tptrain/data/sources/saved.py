"""A folder made by `save_to_disk` of Hugging Face `datasets`: one data set, or several splits. Mapped where it lies; nothing is copied."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tptrain.config_error import refuse
from tptrain.data.documents import Documents, RowNumber, check_column
from tptrain.data.fingerprint import hash_of
from tptrain.data.sources.files import Files, is_saved, walk
from tptrain.data_config import SourceConfig

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class SavedSource:
    """One saved data set."""

    folder: Path
    """Where its arrow files are."""
    asked: str
    """The folder as it was asked for."""
    column: str
    prefix: str

    @property
    def label(self) -> str:
        """For reports."""
        return f"saved {self.asked}"

    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and times, and of the column's name."""
        return hash_of("saved", self.column, *Files(self.folder, tuple(walk(self.folder, ("",)))).stamps())

    def load(self, cache_dir: Path) -> Documents:
        """All rows; cache_dir is not used. Raises ConfigError for a folder that is not whole, or without the column."""
        import datasets

        try:
            dataset = datasets.load_from_disk(str(self.folder))
        except Exception as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            rule = f"cannot be read as save_to_disk left it ({line})"
            raise refuse(f"{self.prefix}.path", self.asked, rule, "save it again") from error
        check_column(self.prefix, self.column, dataset.features.arrow_schema, f"{self.folder}, row 1")
        columns = tuple(dataset.column_names)
        dataset = dataset.with_format(None).select_columns([self.column])
        return Documents(dataset, self.column, None, RowNumber(str(self.folder)), columns, self.prefix)

    def stream(self) -> datasets.IterableDataset:
        """Row after row, in up to 64 shards, a power of two, so that as many readers can share them out evenly."""
        dataset = self.load(Path()).dataset
        return dataset.to_iterable_dataset(num_shards=1 << min(6, max(1, len(dataset)).bit_length() - 1))


def open_saved(part: SourceConfig, prefix: str, split: str | None) -> SavedSource:
    """The folder part.path. Raises ConfigError where it was not made by save_to_disk, or has no such split."""
    key = f"{prefix}.path"
    if not isinstance(part.path, str):
        raise refuse(key, part.path, "is not one folder", f"use {key}=FOLDER, made by save_to_disk")
    folder = Path(part.path).expanduser()
    if not is_saved(folder):
        what = f"does not exist (from {Path.cwd()})" if not folder.exists() else "was not made by save_to_disk"
        raise refuse(key, part.path, what, f"use {key}=FOLDER, made by save_to_disk of Hugging Face datasets")
    wanted, split_key = split or part.split, f"{prefix}.val_split" if split else f"{prefix}.split"
    if not (folder / "dataset_dict.json").is_file():
        if wanted != "train":
            raise refuse(split_key, wanted, f"names a split, but {part.path} holds one data set without splits", "leave it away")
        return SavedSource(folder, part.path, part.text_column, prefix)
    splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
    if wanted not in splits:
        raise refuse(split_key, wanted, f"is no split of {part.path}", f"use {' or '.join(splits)}")
    return SavedSource(folder / wanted, part.path, part.text_column, prefix)
