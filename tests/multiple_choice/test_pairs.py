"""A choice's ids behind its context's, by the rule of lm-evaluation-harness (`_encode_pair`), written out once more here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tptrain.config import ConfigError
from tptrain.data import ByteTokenizer
from tptrain.data.hf_tokenizer import HFTokenizer
from tptrain.multiple_choice.accuracy import accuracies, grouped, runs_together
from tptrain.multiple_choice.pairs import Encoding, Pairs
from tptrain.multiple_choice.questions import Question, read_questions

END = "<|end|>"
QUESTIONS = [
    Question(1, "the cat sat on the", (" mat", " man", "  mat", "zz"), 0),
    Question(2, "the cat sat on the ", ("mat", "man"), 1),
    Question(3, "the cat\n\n", ("sat", "the cat sat"), 1),
    Question(5, "", ("the cat", " the"), 0),
    Question(6, " \n", ("the cat", "mat"), 0),
]


@pytest.fixture(scope="module")
def rules() -> Tokenizer:
    """A byte-level BPE in which a word and the blank before it are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat, there on the mat sat the man\n\n"] * 50, trainer)
    assert len(tokenizer.encode(" mat").ids) == 1
    return tokenizer


def by_the_harness(rules: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = rules.encode(context + continuation).ids
    if not context:
        return [rules.token_to_id(END)], whole
    length = len(rules.encode(context).ids)
    return whole[:length], whole[length:]


@pytest.mark.parametrize("delimiter", ["", " "])
def test_as_the_harness_encodes(rules: Tokenizer, tmp_path: Path, delimiter: str) -> None:
    encoding = Encoding(HFTokenizer("bpe", rules, END), 64, delimiter, False, True)
    pairs = encoding.pairs("file", QUESTIONS)
    pairs.save(tmp_path / "pairs.npz")
    pairs = Pairs.load(tmp_path / "pairs.npz")
    wanted = [by_the_harness(rules, question.context, delimiter + choice) for question in QUESTIONS for choice in question.choices]
    assert len(pairs) == len(wanted)
    for number, (context, choice) in enumerate(wanted):
        assert pairs.row(number).tolist() == context + choice
        assert pairs.choice_tokens[number] == len(choice)
    lengths = [len(pairs.row(number)) for number in pairs.longest_first()]
    assert lengths == sorted((len(context) + len(choice) for context, choice in wanted), reverse=True)


def test_a_choice_that_melts_into_its_context_is_refused(rules: Tokenizer) -> None:
    """`th` is two tokens or one, and `the` is one."""
    at = HFTokenizer("bpe", rules, END)
    before, after = len(at.encode("a th")), len(at.encode("a the"))
    assert after <= before, "or this test shows nothing"
    with pytest.raises(ConfigError, match=r"choices=file line 7 has a choice, number 1, that joins its context's last word, .*: begin it"):
        Encoding(at, 64, "", False, True).pairs("file", [Question(7, "a th", ("xyz", "e"), 0)])


def test_a_context_is_cut_on_its_left_and_never_away() -> None:
    question = Question(1, "abcdef", ("gh", "i"), 0)
    pairs = Encoding(ByteTokenizer(), 4, "", True, True).pairs("file", [question])
    assert [bytes(pairs.row(number).tolist()) for number in (0, 1)] == [b"defgh", b"cdefi"]
    assert pairs.cut == 2
    with pytest.raises(ConfigError, match=r"line 1 has 6 tokens of context and 5 of choice 0, .* room for 5: use a shorter choice"):
        Encoding(ByteTokenizer(), 4, "", True, True).pairs("file", [Question(1, "abcdef", ("ghijk", "i"), 0)])


def test_accuracies_by_three_lengths() -> None:
    """Choices of 1 and 4 characters, 2 and 4 bytes, whose scores each length ranks otherwise."""
    question = Question(1, "", ("é", "four"), 1)
    for scores, right in (([-3.0, -4.0], [0, 1, 1]), ([-1.0, -3.0], [0, 1, 0]), ([-1.0, -8.0], [0, 0, 0]), ([-2.0, -1.0], [1, 1, 1])):
        found = accuracies([question], [scores])
        assert list(found.values()) == [*right, 0.5], scores
    both = accuracies([question, Question(2, "", ("a", "b", "c", "d"), 0)], [[-1.0, -3.0], [-1.0, -1.0, -1.0, -2.0]])
    assert both == {"accuracy": 0.5, "accuracy_per_character": 1.0, "accuracy_per_byte": 0.5, "chance": 0.375}
    assert accuracies([Question(1, "", ("a", "b"), 0)], [[np.nan, -1.0]])["accuracy"] == 0, "no number is no answer"
    assert grouped([question, QUESTIONS[0]], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [[1.0, 2.0], [3.0, 4.0, 5.0, 6.0]]


def test_words_that_run_together_are_found() -> None:
    assert runs_together(QUESTIONS, "") == QUESTIONS[0], "the + zz"
    assert runs_together(QUESTIONS, " ") is None
    assert runs_together(QUESTIONS[1:], "") is None


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"context": "a ", "choices": ["b", " c"], "label": 1, "id": 3}\r\n\n  \n'
        b'{"context":"","choices":["\\u00e9","x"],"label":0}'
    )
    assert read_questions(str(file)) == [Question(1, "a ", ("b", " c"), 1), Question(4, "", ("é", "x"), 0)]
