from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tptrain.config import DataConfig
from tptrain.data import ByteTokenizer, load_tokenizer
from tptrain.data_config import MixturePart


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_encode_is_utf8_and_decode_undoes_it(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert ids.tolist() == list(text.encode("utf-8"))
    assert ByteTokenizer().decode(ids) == text


@given(st.binary())
@settings(max_examples=50, deadline=None)
def test_decode_replaces_what_is_not_utf8(data: bytes) -> None:
    assert ByteTokenizer().decode(np.frombuffer(data, np.uint8)) == data.decode("utf-8", errors="replace")


def test_decode_leaves_out_ids_that_are_no_byte() -> None:
    assert ByteTokenizer().decode([72, 256, 105, 300, 511]) == "Hi"


def test_every_id_fits_the_vocabulary() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    ids = tokenizer.encode(everything)
    assert ids.max() == 0xF4  # the largest first byte of a UTF-8 character
    assert ids.max() < tokenizer.end_of_document < tokenizer.vocab_size


def test_load_tokenizer() -> None:
    assert isinstance(load_tokenizer(DataConfig("python_docs", seq_len=8)), ByteTokenizer)
    assert isinstance(load_tokenizer(DataConfig("text", seq_len=8)), ByteTokenizer)
    assert load_tokenizer(DataConfig("memorize", seq_len=8)) is None
    parts = {"a": MixturePart("memorize"), "b": MixturePart("text", path="x")}
    assert isinstance(load_tokenizer(DataConfig("mixture", seq_len=8, mixture=parts)), ByteTokenizer)
    assert load_tokenizer(DataConfig("mixture", seq_len=8, mixture={"a": parts["a"]})) is None


def test_the_byte_tokenizer_in_batches_and_on_disk(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    texts = ["n\u00e9", "", "\ufeffa\r\n"]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [list(text.encode()) for text in texts]
    tokenizer.save(tmp_path)
    assert not list(tmp_path.iterdir())
    assert tokenizer.fingerprint() == ByteTokenizer().fingerprint()
