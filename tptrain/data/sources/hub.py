"""A data set on the Hugging Face hub, by `datasets.load_dataset`, which keeps it in Hugging Face's own cache; no code of it is run.

Whether the hub answers is tried once, for some seconds, before that call, which by itself tries for minutes. Where it does not
answer, a copy in the cache serves; where there is none, the error is one line that says how to bring the data to this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tptrain.config_error import ConfigError, refuse
from tptrain.data.documents import Documents, RowNumber, check_column
from tptrain.data.fingerprint import hash_of
from tptrain.data_config import SourceConfig

if TYPE_CHECKING:
    import datasets

_ANSWER_SECONDS = 10.0
"""How long the hub may take to answer."""


@dataclass(frozen=True)
class HubSource:
    """One split of one configuration of a data set on the hub."""

    name: str
    subset: str | None
    split: str
    revision: str | None
    column: str
    prefix: str
    split_key: str
    """The key that the split comes from."""

    @property
    def label(self) -> str:
        """For reports."""
        return " ".join(["hub", self.name, *filter(None, [self.subset]), *([self.split] if self.split != "train" else [])])

    def fingerprint(self) -> str:
        """Hash of the name, subset, split, revision and column: a data set that changes under the same revision goes unnoticed."""
        return hash_of("hub", self.name, self.subset, self.split, self.revision, self.column)

    def load(self, cache_dir: Path) -> Documents:
        """All rows, downloaded where the cache lacks them; cache_dir is not used. Raises ConfigError."""
        dataset = self._load(streaming=False)
        check_column(self.prefix, self.column, dataset.features.arrow_schema, self._where)
        columns = tuple(dataset.column_names)
        dataset = dataset.with_format(None).select_columns([self.column])
        return Documents(dataset, self.column, None, RowNumber(self.label), columns, self.prefix)

    def stream(self) -> datasets.IterableDataset:
        """Row after row, from the hub. Raises ConfigError; a column whose type is unknown beforehand is not checked."""
        stream = self._load(streaming=True)
        if stream.features is None:
            return stream
        check_column(self.prefix, self.column, stream.features.arrow_schema, self._where)
        return stream.select_columns([self.column])

    @property
    def _where(self) -> str:
        return f"{self.label}, row 1"

    def _load(self, streaming: bool) -> Any:
        import datasets

        reachable = self._reachable()
        try:
            with _cache_only(not reachable):
                found = datasets.load_dataset(self.name, self.subset, split=self.split, revision=self.revision, streaming=streaming)
        except Exception as error:
            raise self._refusal(error, reachable) from error
        if not reachable and self.revision and not streaming:
            self._check_revision(found)
        return found

    def _reachable(self) -> bool:
        """Whether the hub answers at all; what it answers is for load_dataset to see."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            HfApi().dataset_info(self.name, revision=self.revision, timeout=_ANSWER_SECONDS)
        except HfHubHTTPError:
            return True
        except Exception:  # of the HTTP library, which differs by version, or offline mode
            return False
        return True

    def _check_revision(self, dataset: datasets.Dataset) -> None:
        """Whether a copy from the cache, which datasets takes for any revision, is of the revision that was asked for."""
        folders = [Path(file["filename"]).parent.name for file in dataset.cache_files]
        wrong = [folder for folder in folders if not folder.startswith(str(self.revision))]
        if wrong:
            rule = f"cannot be looked up, since the hub cannot be reached, and this machine's cache holds {self.name} at {wrong[0]}"
            raise refuse(f"{self.prefix}.revision", self.revision, rule, f"use {self.prefix}.revision={wrong[0]}, if that will do")

    def _refusal(self, error: Exception, reachable: bool) -> ConfigError:
        """What load_dataset's error means, in one line."""
        text = " ".join(str(error).split()) or type(error).__name__
        if not reachable or isinstance(error, (ConnectionError, TimeoutError)):
            saved = "data=saved data.path=FOLDER" if self.prefix == "data" else f"{self.prefix}.source=saved {self.prefix}.path=FOLDER"
            known = f" ({text})" if "in the cache" in text else ""
            return refuse(
                f"{self.prefix}.name", self.name, f"cannot be reached on the Hugging Face hub and is not in this machine's cache{known}",
                f"save it on a machine that reaches the hub, with save_to_disk, and use {saved}; or set HF_HOME to a filled cache",
            )  # fmt: skip
        kind = type(error).__name__
        if "BuilderConfig" in text or "Config name is missing" in text:
            return refuse(f"{self.prefix}.subset", self.subset, f"is no configuration of {self.name} ({text})", "use one of those")
        if "Revision" in text and kind == "DatasetNotFoundError":
            return refuse(f"{self.prefix}.revision", self.revision, f"is no revision of {self.name}", "use a branch, a tag or a commit")
        if kind == "DatasetNotFoundError":
            remedy = "use a data set's full name, OWNER/NAME; for a private or gated one, log in with hf auth login"
            return refuse(f"{self.prefix}.name", self.name, "is not on the Hugging Face hub, or is closed to you", remedy)
        if isinstance(error, ValueError) and "split" in text.lower():
            return refuse(self.split_key, self.split, f"is no split of {self.name} ({text})", "use one of those")
        if "scripts are no longer supported" in text:
            return refuse(f"{self.prefix}.name", self.name, "needs code of its own, which is never run", "use a copy of it in parquet")
        return refuse(f"{self.prefix}.name", self.name, f"cannot be loaded ({kind}: {text[:300]})", "see that error, or use another source")


def open_hub(part: SourceConfig, prefix: str, split: str | None) -> HubSource:
    """The data set part.name; nothing is asked of the hub yet. Raises ConfigError for what cannot be a name there."""
    name, key = str(part.name), f"{prefix}.name"
    if not part.name or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise refuse(key, part.name, "is no data set's name on the hub", f"use {key}=OWNER/NAME")
    if Path(name).exists():
        rule = f"is also a file or folder here ({Path.cwd()}), which datasets would read in its place"
        raise refuse(key, name, rule, f"start from another folder, or use {prefix}.source=parquet, jsonl or saved with {prefix}.path")
    split_key = f"{prefix}.val_split" if split else f"{prefix}.split"
    return HubSource(name, part.subset, split or part.split, part.revision, part.text_column, prefix, split_key)


@contextmanager
def _cache_only(wanted: bool) -> Iterator[None]:
    """Keep datasets from asking the hub, which it does again and again, where only the cache can serve."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
