"""Each choice of each question behind its context, as ids: what the ranks score.

    context "The capital of France is "     choice "Paris"     delimiter ""
    ids     The capital of France is | Paris
                                     └ a choice's ids are those that follow the context's, of both encoded as one text

Blanks at the context's end are encoded with the choice: most tokenizers write a word with the blank before it as one token, and it is so
that the model has learned it. An empty context is the end of the document before, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tptrain.data.tokenizers import Tokenizer
from tptrain.multiple_choice.questions import Question, bad_line

_QUESTIONS_AT_ONCE = 1000


@dataclass(frozen=True)
class Pairs:
    """Contexts with a choice each, the first question's first choice first."""

    ids: np.ndarray
    """All of them end to end, int32 [tokens]."""
    ends: np.ndarray
    """Where each ends in `ids`, int64 [pairs]."""
    choice_tokens: np.ndarray
    """How many of its last ids are the choice's, int64 [pairs]."""
    cut: int = 0
    """How many had their context cut."""

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, number: int) -> np.ndarray:
        """The ids of a pair, context first."""
        first = self.ends[number - 1] if number else 0
        return self.ids[first : self.ends[number]]

    def longest_first(self) -> np.ndarray:
        """The pairs' numbers, so ordered that neighbours are about equally long; int64 [pairs]."""
        return np.argsort(-np.diff(self.ends, prepend=0), kind="stable")

    def save(self, path: Path) -> None:
        """Write them to an .npz file."""
        np.savez(path, ids=self.ids, ends=self.ends, choice_tokens=self.choice_tokens)

    @classmethod
    def load(cls, path: Path) -> Pairs:
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["ids"], arrays["ends"], arrays["choice_tokens"])


def pairs_path(folder: Path, number: int) -> Path:
    """Where in a job's folder the pairs of its file `number` are."""
    return folder / f"pairs-{number}.npz"


@dataclass(frozen=True)
class Encoding:
    """How questions become ids."""

    tokenizer: Tokenizer
    max_seq_len: int
    """Longest sequence that the model can see. A pair may have one token more: the last is only foretold."""
    delimiter: str
    """Stands between context and choice."""
    cut_context: bool
    """Whether a context that is too long is cut on its left, rather than refused."""
    begins_documents: bool
    """Whether the model has learned what follows the end of a document."""

    def pairs(self, file: str, questions: Sequence[Question]) -> Pairs:
        """All pairs of a file. Raises ConfigError for a line that cannot be scored."""
        rows: list[np.ndarray] = []
        choice_tokens: list[int] = []
        cut = 0
        for first in range(0, len(questions), _QUESTIONS_AT_ONCE):
            part = questions[first : first + _QUESTIONS_AT_ONCE]
            for question, number, row, count in self._encoded(file, part):
                if count == 0:
                    rule = f"has a choice, number {number}, that joins its context's last word, so that no token is its own"
                    raise bad_line(file, question.line, rule, "begin it with a blank, or use delimiter=' '")
                kept = self._fitting(file, question, number, row, count)
                cut += len(kept) < len(row)
                rows.append(kept)
                choice_tokens.append(count)
        return Pairs(np.concatenate(rows).astype(np.int32), np.cumsum([len(row) for row in rows]), np.array(choice_tokens), cut)

    def _encoded(self, file: str, questions: Sequence[Question]) -> list[tuple[Question, int, np.ndarray, int]]:
        """Each question with each choice's number, the pair's ids, and how many of them are the choice's."""
        contexts = [question.context.rstrip() for question in questions]
        for question, context in zip(questions, contexts, strict=True):
            if not context and not self.begins_documents:
                rule = "has an empty context, and with data.document_mask=true the model has not learned to begin a document"
                raise bad_line(file, question.line, rule, "give it a context")
        heads = self._encode(file, questions, contexts)
        wholes = [
            (question, number, head, context + question.context[len(context) :] + self.delimiter + choice)
            for question, context, head in zip(questions, contexts, heads, strict=True)
            for number, choice in enumerate(question.choices)
        ]
        encoded = self._encode(file, [question for question, *_ in wholes], [text for *_, text in wholes])
        pairs = []
        for (question, number, head, _), ids in zip(wholes, encoded, strict=True):
            row = ids if len(head) else np.concatenate([[self.tokenizer.end_of_document], ids])
            pairs.append((question, number, row, max(0, len(ids) - len(head))))
        return pairs

    def _encode(self, file: str, questions: Sequence[Question], texts: list[str]) -> list[np.ndarray]:
        try:
            return self.tokenizer.encode_batch(texts)
        except UnicodeEncodeError:
            for question, text in zip(questions, texts, strict=True):
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise bad_line(file, question.line, f"is no UTF-8 text ({error.reason})", "use text that is") from None
            raise

    def _fitting(self, file: str, question: Question, number: int, row: np.ndarray, count: int) -> np.ndarray:
        """The row, or what of it the model can see. At least one token stands before the choice."""
        most = self.max_seq_len + 1
        if len(row) <= most:
            return row
        sizes = f"has {len(row) - count} tokens of context and {count} of choice {number}"
        rule = f"{sizes}, and model.max_seq_len={self.max_seq_len} leaves room for {most}"
        if count >= most:
            raise bad_line(file, question.line, rule, "use a shorter choice")
        if not self.cut_context:
            raise bad_line(file, question.line, rule, "use a shorter context, or cut_context=true, which cuts its left")
        return row[len(row) - most :]
