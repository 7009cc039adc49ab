"""data=memorize: random ids that are the same for everybody."""

from collections.abc import Callable

import numpy as np
import pytest

from tptrain.config import Config
from tptrain.data import Sampler, TokenStore, prepare
from tptrain.data.memorize import KEY, random_tokens


def test_ids_are_philox_words_scaled_to_the_vocabulary() -> None:
    words = np.random.Philox(key=KEY).random_raw(1000)
    assert random_tokens(1000, 777).tolist() == [(int(word) // 2**32) * 777 // 2**32 for word in words]


def test_ids_are_even_and_below_the_vocabulary() -> None:
    counts = np.bincount(random_tokens(100_000, 50), minlength=50)
    assert len(counts) == 50
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1024, np.uint16), (65536, np.uint16), (65537, np.uint32), (200_000, np.uint32)])
def test_store_has_num_sequences_samples_in_each_split(make_config: Callable[..., Config], vocab_size: int, dtype: type) -> None:
    config = make_config("memorize", seq_len=32, num_sequences=100, vocab_size=vocab_size, model_vocab_size=vocab_size)
    store = TokenStore.open(prepare(config))
    assert store.train.tokens.dtype == dtype
    assert store.train.tokens[:].tolist() == random_tokens(100 * 32 + 1, vocab_size).tolist()
    assert np.array_equal(store.val.tokens[:], store.train.tokens[:])
    assert Sampler(store.train.tokens, 32, seed=1).samples_per_epoch == 100
    assert (store.tokenizer, store.end_of_document, store.vocab_size, store.train.num_documents) == (None, None, vocab_size, 1)


def test_the_run_s_seed_does_not_enter_but_the_size_does(make_config: Callable[..., Config]) -> None:
    first, again = (prepare(make_config("memorize", seed=seed, vocab_size=100)) for seed in (1, 2))
    assert first == again
    assert prepare(make_config("memorize", vocab_size=101)) != first
    assert prepare(make_config("memorize", vocab_size=100, num_sequences=99)) != first
