"""Text piece by piece: the pieces are the whole text's, whatever the tokenizer's decoder does at its beginning."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tokenizer_kinds import KINDS, SHORT
from tptrain.config import DataConfig, TokenizerConfig
from tptrain.data import ByteTokenizer, load_tokenizer
from tptrain.data.text_stream import TextStream
from tptrain.data.tokenizers import Tokenizer

BYTES = st.lists(st.integers(0, 256), max_size=24)
CHARACTERS = st.text(st.sampled_from("aé€\U0001f98a\u0301 \n")).map(lambda text: list(text.encode()))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    found: dict[str, Tokenizer] = {"byte": ByteTokenizer()}
    for kind, (make, _) in KINDS.items():
        tokenizer = load_tokenizer(DataConfig("text", seq_len=8, tokenizer=TokenizerConfig(str(make(root / kind)))))
        assert tokenizer is not None
        found[kind] = tokenizer
    return found


def pieces_of(tokenizer: Tokenizer, ids: list[int], before: list[int]) -> list[str]:
    stream = TextStream(tokenizer, before)
    return [*(stream.push(number) for number in ids), stream.flush()]


@pytest.mark.parametrize("kind", ["byte", *KINDS])
def test_pieces_are_the_text(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """From the text's beginning, and from any id within it, if a whole text comes before it."""
    tokenizer = tokenizers[kind]
    for name, text in SHORT.items():
        ids = tokenizer.encode(text).tolist()
        whole = tokenizer.decode(ids)
        for cut in range(0, len(ids) + 1):
            head = tokenizer.decode(ids[:cut])
            if head.endswith("\ufffd") or not whole.startswith(head):
                continue  # the cut is within a character
            pieces = pieces_of(tokenizer, ids[cut:], ids[:cut])
            assert head + "".join(pieces) == whole, (name, cut)
            assert cut or kind == "wordpiece" or len(list(filter(None, pieces))) >= len(text) / 20, "not all at once"


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
def test_blanks_between_words_stay(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """After a prompt, and after a document's end, where the decoder takes the first blank away."""
    tokenizer = tokenizers[kind]
    prompt, more = tokenizer.encode("the").tolist(), tokenizer.encode("fox").tolist()
    assert "".join(pieces_of(tokenizer, more + more, prompt)) == " fox fox"
    assert "".join(pieces_of(tokenizer, more + more, [tokenizer.end_of_document])) == "fox fox"
    assert "".join(pieces_of(tokenizer, more, [])) == "fox"


@pytest.mark.parametrize("kind", ["byte", "byte_level", "sentencepiece"])
def test_a_character_comes_when_its_last_byte_does(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    text = "\U0001f98a\u20ac\u00e9"
    ids = tokenizer.encode(text).tolist()[-9:]  # without the blank put before it
    assert pieces_of(tokenizer, ids, tokenizer.encode("a").tolist()) == ["", "", "", text[0], "", "", text[1], "", text[2], ""]


@given(st.one_of(BYTES, CHARACTERS), st.one_of(BYTES, CHARACTERS))
@settings(max_examples=300, deadline=None)
def test_any_bytes(one: list[int], two: list[int]) -> None:
    """Also those that are no text, which do not hold up what follows."""
    tokenizer = ByteTokenizer()
    ids = one + two
    assert "".join(pieces_of(tokenizer, ids, [])) == tokenizer.decode(ids)
    stream, given_out = TextStream(tokenizer), 0
    for count, number in enumerate(ids, 1):
        given_out += len(stream.push(number))
        assert given_out >= len(tokenizer.decode(ids[:count])) - 3


def test_bytes_that_are_never_completed(tokenizers: dict[str, Tokenizer]) -> None:
    assert pieces_of(ByteTokenizer(), [255] * 5 + [65, 0xE2], []) == ["", "", "", "\ufffd", "\ufffd", "\ufffd" * 3 + "A", "", "\ufffd"]
