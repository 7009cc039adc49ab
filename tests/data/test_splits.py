import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tptrain.data.splits import held_out, hold_out, split_tail

NAMES = [f"folder/{number}.txt" for number in range(400)]


@pytest.mark.parametrize(
    ("documents", "fraction", "expected"),
    [(400, 0.05, 20), (400, 0.25, 100), (2, 0.05, 1), (2, 0.99, 1), (3, 0.99, 2), (10, 0.001, 1), (400, 0.0, 0), (1, 0.5, 0), (0, 0.5, 0)],
)
def test_share_of_the_documents_with_one_at_least_in_each_split(documents: int, fraction: float, expected: int) -> None:
    chosen = held_out(NAMES[:documents], fraction)
    assert len(chosen) == expected
    assert chosen <= set(NAMES[:documents])


def test_the_order_of_the_names_does_not_matter() -> None:
    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    assert held_out(shuffled, 0.1) == held_out(NAMES, 0.1)


def test_a_larger_fraction_only_adds_documents() -> None:
    assert held_out(NAMES, 0.05) < held_out(NAMES, 0.1) < held_out(NAMES, 0.5)


def test_documents_are_spread_not_taken_from_one_end() -> None:
    places = sorted(NAMES.index(name) for name in held_out(NAMES, 0.25))
    quarters = [sum(start <= place < start + 100 for place in places) for start in (0, 100, 200, 300)]
    assert min(quarters) >= 10  # 25 expected in each, standard deviation 3.8


@given(st.text(), st.floats(0.001, 0.999))
@settings(max_examples=50, deadline=None)
def test_split_tail_cuts_once(text: str, fraction: float) -> None:
    head, tail = split_tail(text, fraction)
    assert head + tail == text
    assert len(tail) == (max(1, round(fraction * len(text))) if text else 0)


# ---- rows, which have no names ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"), [(400, 0.05, 20), (1000, 0.333, 333), (2, 0.05, 1), (3, 0.99, 2), (1, 0.5, 0), (7, 0.0, 0)]
)
def test_rows_are_held_out_to_the_exact_number_however_they_are_asked_for(rows: int, fraction: float, expected: int) -> None:
    whole = hold_out(rows, None, fraction).mask(0, rows)
    assert (whole.sum(), len(whole)) == (expected, rows)
    pieces = [hold_out(rows, None, fraction).mask(first, min(first + 7, rows)) for first in range(0, rows, 7)]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_a_larger_fraction_only_adds_rows_and_they_are_spread() -> None:
    small, large = (hold_out(10_000, None, fraction).mask(0, 10_000) for fraction in (0.1, 0.3))
    assert not (small & ~large).any()
    counts = small.reshape(10, 1000).sum(axis=1)
    assert np.abs(counts - 100).max() < 5 * np.sqrt(90)


def test_named_documents_are_held_out_by_their_names() -> None:
    chosen = held_out(NAMES, 0.25)
    rule = hold_out(len(NAMES), NAMES, 0.25)
    assert [name in chosen for name in NAMES[50:300]] == rule.mask(50, 300).tolist()
    assert (rule.tail, hold_out(1, ["a"], 0.25).tail, hold_out(1, None, 0.0).tail) == (0.0, 0.25, 0.0)
