"""The tokenizer of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tptrain.data.sources import Source
from tptrain.data.tokenizers import ByteTokenizer, load_tokenizer
from tptrain.data_config import DataConfig


def obtain_tokenizer(data: DataConfig, sources: Sequence[Source], report: Callable[[str], None]) -> ByteTokenizer | None:
    """The tokenizer that `data` names; None for memorize."""
    return load_tokenizer(data)
