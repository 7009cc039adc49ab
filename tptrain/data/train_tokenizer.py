"""A byte-level BPE, as of GPT-2, learned from a run's own training text.

    outputs/token_stores/
        tokenizer-5f0c.../tokenizer.json, tokenizer_config.json      found again by what it was learned from

The same text gives the same tokenizer, on any machine and number of cores. Documents that are held out for evaluation may
be among what it is learned from: it counts how often pieces of words occur, and keeps nothing of their order.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tptrain.config_error import refuse
from tptrain.data.documents import Documents
from tptrain.data.fingerprint import hash_of
from tptrain.data.head import texts_of
from tptrain.data.hf_tokenizer import FILE, HFTokenizer
from tptrain.data.lock import locked
from tptrain.data.sources import Source
from tptrain.data.tokenizers import Tokenizer, load_tokenizer
from tptrain.data_config import DataConfig

_FORMAT = 1
"""Raised whenever the way in which a tokenizer is learned changes; part of the fingerprint."""
_END_TOKEN = "<|endoftext|>"
_LIMIT_CHARACTERS = 1 << 29
"""Text that is read at most, over all sources, each of which has an equal share."""
_PIECE_CHARACTERS = 1 << 16
"""Text that is handed to the library at a time: its memory for a text is many times the text's."""
_BLOCK_DOCUMENTS = 64
_WORD_BYTES = 128
"""Where words are cut while learning, which takes time by the square of their length; text without blanks is one word."""
_LEAST_COUNT = 2
"""How often a pair must occur to become a token."""
_REPORT_SECONDS = 10.0


def obtain_tokenizer(data: DataConfig, sources: Sequence[Source], report: Callable[[str], None]) -> Tokenizer | None:
    """As `load_tokenizer`, but where data.tokenizer.name=train, the tokenizer is found in data.store_dir, or learned and kept there.

    sources: of the training text. Up to 512 M characters of it are read, an equal share of each source, from documents that are
    spread evenly over it; of a stream, from its beginning.
    report: called with a line at a time on what is done.
    Raises ConfigError, also for a data.store_dir that cannot be written.
    """
    if data.tokenizer.name != "train" or not sources:
        return load_tokenizer(data)
    folder = Path(data.store_dir).expanduser().absolute() / f"tokenizer-{_fingerprint(data, sources)[:16]}"
    if (folder / FILE).is_file():
        return _found(data, folder, report)
    try:
        return _learn(data, sources, folder, report)
    except OSError as error:
        raise refuse("data.store_dir", data.store_dir, f"cannot hold a tokenizer ({error.strerror or error})",
                     "use data.store_dir=FOLDER with one that you can write to") from error  # fmt: skip


def _found(data: DataConfig, folder: Path, report: Callable[[str], None]) -> Tokenizer | None:
    tokenizer = load_tokenizer(data, folder)
    if tokenizer is not None:
        report(f"tokenizer: {tokenizer.vocab_size} ids in {folder}")
    return tokenizer


def _learn(data: DataConfig, sources: Sequence[Source], folder: Path, report: Callable[[str], None]) -> Tokenizer | None:
    """Learn it and keep it in `folder`, or wait for the process that does. Raises OSError where it cannot be written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".documents-{folder.name}-"
    with locked(folder.with_name(f".{folder.name}.lock"), lambda: report(f"waiting for another process that learns {folder}")) as alone:
        for left in folder.parent.glob(f"{prefix}*") if alone else ():  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        if (folder / FILE).is_file():
            return _found(data, folder, report)
        with TemporaryDirectory(dir=folder.parent, prefix=prefix) as cache_dir:
            trained = _train(data, _texts(sources, Path(cache_dir), data.streaming), report, ", ".join(source.label for source in sources))
        trained.save(folder)
    report(f"tokenizer: kept in {folder}")
    return trained


def _fingerprint(data: DataConfig, sources: Sequence[Source]) -> str:
    """Hash of all that the tokenizer follows from, in hex digits."""
    asked = data.tokenizer
    numbers = [_FORMAT, _LIMIT_CHARACTERS, _PIECE_CHARACTERS, _BLOCK_DOCUMENTS, _WORD_BYTES, _LEAST_COUNT]
    parts = [*numbers, asked.vocab_size, asked.end_token or _END_TOKEN, data.streaming, [source.fingerprint() for source in sources]]
    return hash_of(*parts)


def _train(data: DataConfig, texts: Iterator[str], report: Callable[[str], None], label: str) -> HFTokenizer:
    """Learn it."""
    from tokenizers import Tokenizer as Rules
    from tokenizers import decoders, models, pre_tokenizers, trainers

    wanted, end_token = data.tokenizer.vocab_size, data.tokenizer.end_token or _END_TOKEN
    rules = Rules(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(_WORD_BYTES)])
    rules.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=wanted, min_frequency=_LEAST_COUNT, show_progress=False, special_tokens=[end_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    report(f"learning a tokenizer of {wanted} ids from {label}")
    began = told = time.perf_counter()
    read = 0

    def counted() -> Iterator[str]:
        nonlocal read, told
        for text in texts:
            read += len(text)
            yield text
            if time.perf_counter() - told >= _REPORT_SECONDS:
                told = time.perf_counter()
                report(f"tokenizer: {read / 1e6:.1f} M characters read")

    rules.train_from_iterator(counted(), trainer)
    rules.pre_tokenizer = words
    tokenizer = HFTokenizer("trained", rules, end_token)
    fewer = f"; the text has too little variety for the {wanted} of data.tokenizer.vocab_size" if tokenizer.vocab_size < wanted else ""
    seconds = time.perf_counter() - began
    report(f"tokenizer: {tokenizer.vocab_size} ids from {read / 1e6:.1f} M characters in {seconds:.1f} s{fewer}")
    return tokenizer


def _texts(sources: Sequence[Source], cache_dir: Path, streaming: bool) -> Iterator[str]:
    """The text to learn from, in pieces."""
    limit = _LIMIT_CHARACTERS // len(sources)
    for index, source in enumerate(sources):
        texts = texts_of(source) if streaming else _spread(source.load(cache_dir / str(index)))
        yield from _pieces(texts, limit)


def _pieces(texts: Iterator[str], limit: int) -> Iterator[str]:
    """The first `limit` characters, cut small."""
    for text in texts:
        text = text[:limit]
        limit -= len(text)
        for start in range(0, len(text), _PIECE_CHARACTERS):
            yield text[start : start + _PIECE_CHARACTERS]
        if limit == 0:
            return


def _spread(documents: Documents) -> Iterator[str]:
    """All documents, block by block, in an order whose every beginning is spread evenly over them."""
    blocks = -(-len(documents) // _BLOCK_DOCUMENTS)
    for block in _reversed_bits(blocks):
        yield from documents.texts(block * _BLOCK_DOCUMENTS, min((block + 1) * _BLOCK_DOCUMENTS, len(documents)))


def _reversed_bits(count: int) -> Iterator[int]:
    """0 .. count - 1 in the order of their binary digits read backwards (van der Corput's sequence).

    >>> list(_reversed_bits(6))
    [0, 4, 2, 1, 5, 3]
    """
    bits = max(0, count - 1).bit_length()
    for number in range(1 << bits):
        place = int(format(number, f"0{bits}b")[::-1], 2) if bits else 0
        if place < count:
            yield place
