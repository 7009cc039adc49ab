"""A byte-level BPE that is learned on the spot."""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 8192
END_TOKEN = "<|endoftext|>"


def learn(texts: list[str]) -> Any:
    """A `tokenizers.Tokenizer` of VOCAB_SIZE ids, END_TOKEN among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[END_TOKEN], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(texts, trainer)
    return core
