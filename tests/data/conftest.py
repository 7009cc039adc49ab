"""A config with just the groups that the data room reads, and a reader of whole stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tptrain.config import Config, DataConfig
from tptrain.data import Split


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """make_config(source, seed=, model_vocab_size=, eval_steps=, **data): stores go to tmp_path/stores."""

    def make(source: str, seed: int = 1234, model_vocab_size: int = 512, eval_steps: int = 8, **data: Any) -> Config:
        values = {"seq_len": 1, "store_dir": str(tmp_path / "stores"), **data}
        groups = {"model": SimpleNamespace(vocab_size=model_vocab_size), "train": SimpleNamespace(eval_steps=eval_steps)}
        return cast(Config, SimpleNamespace(seed=seed, data=DataConfig(source=source, **values), **groups))

    return make


@pytest.fixture
def documents() -> Callable[[Split], list[list[int]]]:
    """documents(split): each document's ids, cut at the offsets."""

    def read(split: Split) -> list[list[int]]:
        tokens = split.tokens[:].tolist()
        return [tokens[start:end] for start, end in zip(split.offsets[:-1], split.offsets[1:], strict=True)]

    return read
