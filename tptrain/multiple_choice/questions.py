"""A file of multiple-choice questions: JSON Lines, an object a line.

    {"context": "The capital of France is", "choices": [" Paris", " Rome"], "label": 0}

The label is the number of the right choice, counted from 0. Other keys mean nothing here; blank lines are passed over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.config import ConfigError, refuse

_REMEDY = 'write {"context": "a text", "choices": ["one", "two"], "label": 0}'


@dataclass(frozen=True)
class Question:
    """One line."""

    line: int
    """Its number in the file, counted from 1."""
    context: str
    choices: tuple[str, ...]
    label: int
    """Which choice is right, counted from 0."""


def read_questions(file: str) -> list[Question]:
    """All questions of a file, at least one. Raises ConfigError, with the line's number where it is a line that cannot be used."""
    try:
        lines = Path(file).expanduser().read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise refuse("choices", file, f"cannot be read ({error.strerror})", "use choices=FILE.jsonl with a file of questions") from error
    questions = [_question(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise refuse("choices", file, "has no questions", "use a file with one a line")
    return questions


def bad_line(file: str, line: int, fault: str, remedy: str) -> ConfigError:
    """The refusal of a line: `choices=FILE line 3 has ...: use ...`."""
    return refuse("choices", file, f"line {line} {fault}", remedy)


def _question(file: str, number: int, line: bytes) -> Question:
    try:
        found: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise bad_line(file, number, "is no UTF-8 text", "write it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise bad_line(file, number, f"is no JSON ({str(error).splitlines()[0]})", _REMEDY) from None
    missing = ["object"] if not isinstance(found, dict) else [key for key in ("context", "choices", "label") if key not in found]
    if missing:
        raise bad_line(file, number, f"has no {missing[0]}", _REMEDY)
    context, choices, label = found["context"], found["choices"], found["label"]
    if not isinstance(context, str):
        raise bad_line(file, number, "has a context that is no text", _REMEDY)
    if not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        raise bad_line(file, number, "has choices that are no list of texts", _REMEDY)
    if len(choices) < 2:
        raise bad_line(file, number, f"has {len(choices)} choice{'s' * (len(choices) != 1)}", "give two or more")
    if "" in choices:
        raise bad_line(file, number, f"has an empty choice, number {choices.index('')}", "give each choice a text")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        rule, remedy = f"has label {json.dumps(label)} for {len(choices)} choices", f"use 0 to {len(choices) - 1}, 0 for the first choice"
        raise bad_line(file, number, rule, remedy)
    return Question(number, context, tuple(choices), label)
