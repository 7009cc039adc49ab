import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tptrain.data import Sampler, permute
from tptrain.data.sampler import epoch_key

WORD = (1 << 64) - 1


def mix(value: int) -> int:
    """splitmix64's finalizer, in Python integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def permute_by_hand(index: int, length: int, key: int) -> int:
    """The same definition, one number at a time, without numpy."""
    half = 0
    while 4**half < length:
        half += 1
    while True:
        left, right = divmod(index, 2**half)
        for number in range(1, 9):
            round_key = mix(((number * 0x9E3779B97F4A7C15) & WORD) ^ key)
            left, right = right, left ^ (mix(right ^ round_key) % 2**half)
        index = left * 2**half + right
        if index < length:
            return index


# ---- permute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [*range(1, 70), 255, 256, 257, 1000, 1023, 1024, 1025, 4095, 4096, 4097, 65537, 300_001])
def test_permute_is_a_bijection(length: int) -> None:
    for key in (0, 1, WORD):
        assert np.array_equal(np.sort(permute(np.arange(length), length, key)), np.arange(length))


@given(st.integers(1, 1 << 62), st.integers(0, WORD), st.data())
@settings(max_examples=150, deadline=None)
def test_permute_matches_its_definition_at_any_length(length: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20, unique=True))
    images = permute(np.array(indices), length, key)
    assert images.tolist() == [permute_by_hand(index, length, key) for index in indices]
    assert images.tolist() == [permute(index, length, key) for index in indices]
    assert len(set(images.tolist())) == len(indices)
    assert isinstance(permute(indices[0], length, key), int)


@pytest.mark.parametrize("length", [2, 3, 5, 16])
def test_each_index_goes_everywhere_about_equally_often(length: int) -> None:
    keys = 2000
    counts = np.zeros((length, length))
    for key in range(keys):
        counts[np.arange(length), permute(np.arange(length), length, key)] += 1
    sigma = np.sqrt(keys * (1 / length) * (1 - 1 / length))
    assert np.abs(counts - keys / length).max() < 5 * sigma


def test_all_orders_of_four_come_up_about_equally_often() -> None:
    keys, orders = 3000, dict.fromkeys(itertools.permutations(range(4)), 0)
    for key in range(keys):
        orders[tuple(permute(np.arange(4), 4, key).tolist())] += 1
    assert max(abs(count - keys / 24) for count in orders.values()) < 5 * np.sqrt(keys / 24)


@pytest.mark.parametrize(("index", "length"), [(5, 5), (-1, 5), (0, 0)])
def test_permute_refuses_what_is_out_of_range(index: int, length: int) -> None:
    with pytest.raises(ValueError, match="range"):
        permute(index, length, 1)
    with pytest.raises(ValueError, match="range"):
        permute(np.array([0, index]), length, 1)


def test_epoch_key_is_a_hash_of_seed_and_epoch() -> None:
    expected = int.from_bytes(hashlib.blake2b(b"12/3", digest_size=8).digest(), "little")
    assert epoch_key(12, 3) == expected
    assert epoch_key(1, 23) != expected


# ---- Sampler ---------------------------------------------------------------------------------------------


def random_tokens(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 60_000, count).astype(np.uint16)


@pytest.mark.parametrize(
    ("count", "seq_len", "expected"), [(13, 4, 3), (12, 4, 2), (16, 4, 3), (17, 4, 4), (5, 4, 1), (2, 1, 1), (10, 1, 9)]
)
def test_samples_per_epoch(count: int, seq_len: int, expected: int) -> None:
    assert Sampler(random_tokens(count), seq_len, 0).samples_per_epoch == expected


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_tokens_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"seq_len \+ 1 = 5"):
        Sampler(random_tokens(count), 4, 0)


def test_rows_are_slices_in_the_permuted_order() -> None:
    tokens, seq_len, seed = random_tokens(500), 7, 99
    sampler = Sampler(tokens, seq_len, seed)
    n = (500 - 1) // 7
    rows = sampler.rows(0, 3 * n)
    assert rows.dtype == np.int64
    assert rows.shape == (3 * n, seq_len + 1)
    for number, row in enumerate(rows):
        key = int.from_bytes(hashlib.blake2b(f"{seed}/{number // n}".encode(), digest_size=8).digest(), "little")
        start = permute_by_hand(number % n, n, key) * seq_len
        assert row.tolist() == tokens[start : start + seq_len + 1].tolist()


def test_without_a_seed_rows_come_in_order_and_begin_again() -> None:
    rows = Sampler(np.arange(14, dtype=np.uint32), 4, None).rows(1, 4)
    assert rows.tolist() == [[4, 5, 6, 7, 8], [8, 9, 10, 11, 12], [0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


@pytest.mark.parametrize("n", [1, 2, 3, 10, 97, 128])
def test_each_sample_comes_exactly_once_an_epoch(n: int) -> None:
    sampler = Sampler(np.arange(n * 3 + 1), 3, seed=5)
    for epoch in range(4):
        starts = sampler.rows(epoch * n, n)[:, 0]
        assert sorted(starts.tolist()) == [3 * window for window in range(n)]


def test_any_cut_into_batches_gives_the_same_rows() -> None:
    sampler = Sampler(random_tokens(400), 4, seed=7)  # 99 samples an epoch: batches cross the boundary
    whole = sampler.rows(0, 240)
    for batch in (1, 7, 16, 60, 100, 240):
        cut = [sampler.rows(first, min(batch, 240 - first)) for first in range(0, 240, batch)]
        assert np.array_equal(np.concatenate(cut), whole)
    for dp in (2, 3, 4):  # a step's rows over dp ranks, as consecutive blocks
        ranks = [sampler.rows(step * 24 + rank * (24 // dp), 24 // dp) for step in range(10) for rank in range(dp)]
        assert np.array_equal(np.concatenate(ranks), whole)


def test_order_differs_by_epoch_and_by_seed() -> None:
    n = 200
    orders = [Sampler(np.arange(n + 1), 1, seed).windows(epoch * n, n) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 20  # of 200, one is expected
    for order in orders:
        assert (order == np.arange(n)).sum() < 20


def test_a_fresh_sampler_goes_on_where_another_stopped() -> None:
    tokens = random_tokens(1000)
    assert np.array_equal(Sampler(tokens, 8, 3).rows(1_000_000, 5), Sampler(tokens, 8, 3).rows(999_990, 20)[10:15])


def test_no_rows_and_negative_numbers() -> None:
    sampler = Sampler(random_tokens(50), 4, 0)
    assert sampler.rows(3, 0).shape == (0, 5)
    with pytest.raises(ValueError, match="do not exist"):
        sampler.rows(-1, 2)
