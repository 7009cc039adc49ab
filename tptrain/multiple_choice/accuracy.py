"""How often the right choice has the highest score, under three scores.

    accuracy                  log-probability of the choice's tokens after the context, summed: `acc` of lm-evaluation-harness
    accuracy_per_character    the same divided by the choice's characters: its `acc_norm`
    accuracy_per_byte         the same divided by the choice's bytes in UTF-8

Of equal scores the first choice's counts. A choice's length is that of its text in the file, without the delimiter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tptrain.multiple_choice.questions import Question

ACCURACIES = ("accuracy", "accuracy_per_character", "accuracy_per_byte")


def grouped(questions: Sequence[Question], scores: Sequence[float]) -> list[list[float]]:
    """The pairs' scores by question."""
    ends = np.cumsum([len(question.choices) for question in questions])
    return [list(scores[end - len(question.choices) : end]) for question, end in zip(questions, ends, strict=True)]


def accuracies(questions: Sequence[Question], log_likelihoods: Sequence[Sequence[float]]) -> dict[str, float]:
    """The share of the questions that each score answers rightly, and `chance`, that of guesses. log_likelihoods: by question, in nats.

    >>> question = Question(1, "", ("yes", "no, by no means"), 1)
    >>> accuracies([question], [[-2.0, -3.0]])
    {'accuracy': 0.0, 'accuracy_per_character': 1.0, 'accuracy_per_byte': 1.0, 'chance': 0.5}
    """
    right = dict.fromkeys(ACCURACIES, 0)
    for question, scores in zip(questions, log_likelihoods, strict=True):
        characters = [len(choice) for choice in question.choices]
        number_of_bytes = [len(choice.encode()) for choice in question.choices]
        for name, lengths in zip(ACCURACIES, ([1] * len(scores), characters, number_of_bytes), strict=True):
            each = np.array(scores) / lengths
            best = int(np.argmax(each))  # the first that is no number, if there is one
            right[name] += best == question.label and not np.isnan(each[best])
    chance = sum(1 / len(question.choices) for question in questions) / len(questions)
    return {**{name: count / len(questions) for name, count in right.items()}, "chance": chance}


def runs_together(questions: Sequence[Question], delimiter: str) -> Question | None:
    """The first question in which a context ends in a letter or digit and a choice goes on with one, as if they were one word."""
    if delimiter:
        return None
    return next((one for one in questions if one.context[-1:].isalnum() and any(choice[0].isalnum() for choice in one.choices)), None)
