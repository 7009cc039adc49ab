"""A byte-level BPE that is learned on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCAB_SIZE = 8192


@dataclass(frozen=True)
class Bpe:
    """A `tokenizers.Tokenizer` as tptrain's own wrapping has it."""

    core: Any
    end_of_document: int
    name: str = "bpe"
    vocab_size: int = VOCAB_SIZE

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text."""
        return [np.array(one.ids, dtype=np.int64) for one in self.core.encode_batch_fast(texts, add_special_tokens=False)]

    def fingerprint(self) -> str:
        """It is used once."""
        return "bpe"

    def save(self, folder: Path) -> None:
        """As a store has it."""
        self.core.save(str(folder / "tokenizer.json"))


def learn(texts: list[str]) -> Bpe:
    """A byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(texts, trainer)
    return Bpe(core, core.token_to_id("<|end|>"))
