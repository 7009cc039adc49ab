import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tptrain.data.splits import held_out, split_tail

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
