import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tptrain.config import DataConfig, TokenizerConfig
from tptrain.data import ByteTokenizer, load_tokenizer


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
    with pytest.raises(ValueError, match="'morse'"):
        load_tokenizer(DataConfig("text", seq_len=8, tokenizer=TokenizerConfig("morse")))
