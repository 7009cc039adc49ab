"""Which sample of a mixture is which source's which: shares over any stretch, no sample lost; and the data sets of a config."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import tptrain.data.mixture
from tptrain.config import Config, ConfigError
from tptrain.data import Mixture, TokenStore, open_data, prepare
from tptrain.data.mixture import PERIOD, shares_of, slots_of, spread
from tptrain.data_config import DataConfig, MixturePart, SourceConfig, check_data


class Numbered:
    """Row n of source `name` holds the source's number and n."""

    def __init__(self, number: int, samples_per_epoch: int | None = None) -> None:
        self.number, self.samples_per_epoch = number, samples_per_epoch

    def rows(self, first: int, count: int) -> np.ndarray:
        return np.stack([np.full(count, self.number), np.arange(first, first + count)], axis=1)


def mixture_of(weights: list[float], temperature: float = 1.0) -> Mixture:
    names = [f"s{number:03}" for number in range(len(weights))]
    parts = {name: Numbered(number) for number, name in enumerate(names)}
    return Mixture(parts, dict(zip(names, weights, strict=True)), temperature)


WEIGHTS = [
    [0.7, 0.3], [1, 2, 3, 4], [1 / 3, 1 / 3, 1 / 3], [0.001, 0.999], [50.0, *[1.0] * 50], [2.0**-k for k in range(12)],
    [5.0], [0.5000001, 0.4999999], [0.61803, 0.38197, 0.1],
]  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: f"{len(weights)} sources, {weights[0]:.3g} to {weights[-1]:.3g}")
def test_the_shares_hold_over_any_10_000_samples(weights: list[float]) -> None:
    """Within 0.1 % of the samples; in fact within two of them and the rounding of a period."""
    mixture = mixture_of(weights)
    exact = np.array(weights) / sum(weights)
    # count[g]: samples of a source among the first g, over two periods and a half
    order = mixture.rows(0, 5 * PERIOD // 2)[:, 0]
    assert len(order) == 5 * PERIOD // 2, "every window, wherever it starts"
    for number, share in enumerate(exact):
        count = np.concatenate([[0], np.cumsum(order == number)])
        for length in (10_000, 10_001, 100, 1):
            assert np.abs(count[length:] - count[:-length] - share * length).max() < 2 + length * 1e-5
        assert np.abs(count[10_000:] - count[:-10_000] - share * 10_000).max() < 0.001 * 10_000


@pytest.mark.parametrize("weights", WEIGHTS[:4], ids=len)
def test_no_sample_of_a_source_is_lost_or_repeated(weights: list[float]) -> None:
    mixture = mixture_of(weights)
    whole = mixture.rows(0, PERIOD + 5000)
    for number in range(len(weights)):
        own = whole[whole[:, 0] == number, 1]
        assert np.array_equal(own, np.arange(len(own))), "its samples come one after the other"
    assert mixture.taken(PERIOD + 5000) == {f"s{n:03}": np.count_nonzero(whole[:, 0] == n) for n in range(len(weights))}
    generator = np.random.default_rng(0)
    cuts = [0, *sorted(generator.integers(0, len(whole), 40).tolist()), PERIOD - 3, PERIOD + 4, len(whole)]
    for first, last in pairwise(sorted(cuts)):
        assert np.array_equal(mixture.rows(first, last - first), whole[first:last]), "wherever a batch begins and ends"


def test_the_billionth_sample() -> None:
    mixture = mixture_of([0.7, 0.3])
    far = 10_000 * PERIOD
    assert np.array_equal(mixture.rows(far, 1000), mixture.rows(0, 1000) + [0, 1] * (mixture.rows(0, 1000)[:, :1] == 0) * 10_000 * 70_000
                          + [0, 1] * (mixture.rows(0, 1000)[:, :1] == 1) * 10_000 * 30_000)  # fmt: skip
    with pytest.raises(ValueError, match="do not exist"):
        mixture.rows(-1, 1)


def test_temperature_evens_the_shares_out() -> None:
    assert shares_of({"a": 9, "b": 1}, 2.0) == pytest.approx({"a": 3 / 4, "b": 1 / 4})
    assert shares_of({"a": 9, "b": 1}, 1.0) == pytest.approx({"a": 0.9, "b": 0.1})
    assert shares_of({"a": 9, "b": 1}, 0.5) == pytest.approx({"a": 81 / 82, "b": 1 / 82})
    assert shares_of({"a": 1e300, "b": 1e-300}, 1e6)["a"] == pytest.approx(0.5, abs=1e-3), "no overflow"
    assert list(mixture_of([9, 1], 2.0).shares.values()) == pytest.approx([3 / 4, 1 / 4])


def test_slots_by_largest_remainder() -> None:
    assert slots_of([0.7, 0.3]) == [70_000, 30_000], "0.7 * 100,000 is not quite 70,000 in binary"
    assert slots_of([1 / 3] * 3) == [33_334, 33_333, 33_333]
    generator = np.random.default_rng(1)
    for size in range(1, 40):
        shares = generator.dirichlet(np.ones(size))
        slots = slots_of(shares.tolist())
        assert sum(slots) == PERIOD
        assert np.abs(np.array(slots) - shares * PERIOD).max() < 1


def test_a_spread_by_hand() -> None:
    """Windows of the first source's jobs: slots 0-1, 2-3, 4-5; of the second's: 0-2 and 3-5; of the third's one: 0-5."""
    assert spread([3, 2, 1]).tolist() == [0, 1, 0, 1, 0, 2]


def test_a_spread_is_never_a_whole_slot_off() -> None:
    """After any number of slots each source had its share, to within less than one."""
    generator = np.random.default_rng(5)
    for size in (2, 3, 5, 9, 30):
        for _ in range(20):
            counts = generator.integers(1, 60, size)
            order = spread(counts.tolist())
            taken = np.cumsum(order[:, None] == np.arange(size), axis=0)
            assert np.array_equal(taken[-1], counts)
            exact = np.arange(1, len(order) + 1)[:, None] * counts / len(order)
            assert np.abs(taken - exact).max() < 1 - 1e-9


def test_the_order_of_the_names_means_nothing() -> None:
    parts = {"b": Numbered(1), "a": Numbered(0)}
    one, other = Mixture(parts, {"a": 1, "b": 2}), Mixture(dict(reversed(parts.items())), {"b": 2, "a": 1})
    assert np.array_equal(one.rows(0, 1000), other.rows(0, 1000))


def test_a_share_below_one_slot() -> None:
    with pytest.raises(ValueError, match=r"s001 has a share of 1\.0e-06, less than one sample in 100,000"):
        mixture_of([1, 1e-6])


# ---- from the config -----------------------------------------------------------------------------------------


@pytest.fixture
def corpora(tmp_path: Path) -> Callable[[str, int], str]:
    """corpora(name, documents): a folder of documents of 100 letters of its own."""

    def make(name: str, documents: int) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for number in range(documents):
            if not (folder / f"{number}.txt").exists():
                (folder / f"{number}.txt").write_text(name[0] * 99 + chr(0x30 + number % 10))
        return str(folder)

    return make


@pytest.fixture
def mixture_config(make_config: Callable[..., Config], corpora: Callable[[str, int], str]) -> Callable[..., Config]:
    """mixture_config(**data): wiki and code, 3 to 1; 20 and 40 documents."""

    def make(**data: object) -> Config:
        parts = {
            "wiki": MixturePart("text", path=corpora("wiki", 20), weight=3.0),
            "code": MixturePart("text", path=corpora("code", 40), weight=1.0),
        }
        return make_config("mixture", **{"seq_len": 10, "val_fraction": 0.1, "mixture": parts, **data})

    return make


def test_a_mixture_reads_its_sources_by_their_weights(mixture_config: Callable[..., Config]) -> None:
    config = mixture_config(temperature=2.0)
    folder = prepare(config)
    data = open_data(config, folder)
    rows = data.train.rows(0, 10_000)
    share = 3**0.5 / (3**0.5 + 1)
    is_wiki, is_code = (np.any(rows == ord(letter), axis=1) for letter in "wc")
    assert not np.any(is_wiki & is_code), "no row is of two sources"
    assert is_wiki.mean() == pytest.approx(share, abs=1e-3)
    assert data.train_tokens == {"wiki": 18 * 101, "code": 36 * 101}
    assert data.end_of_document == 256
    wiki, code = ((tokens - 1) // 10 for tokens in (18 * 101, 36 * 101))
    assert data.epochs(10_000) == pytest.approx({"wiki": 10_000 * share / wiki, "code": 10_000 * (1 - share) / code}, rel=1e-3)
    assert data.reads(10_000) == f"code 36.6 % {10_000 * (1 - share) / code:.3g} epochs, wiki 63.4 % {10_000 * share / wiki:.3g} epochs"
    assert data.text == f"mixture: {54 * 101:,} tokens, {6 * 101:,} held out"


def test_each_source_of_a_mixture_has_an_order_of_its_own(mixture_config: Callable[..., Config], tmp_path: Path) -> None:
    """And another one in each epoch: two sources of one length would else be read in step."""
    config = mixture_config()
    config.data.mixture["code"].path = config.data.mixture["wiki"].path
    parts = open_data(config, prepare(config)).train.parts  # type: ignore[attr-defined]
    orders = [parts[name].windows(epoch * 181, 181) for name in ("wiki", "code") for epoch in (0, 1)]
    assert all(sorted(order) == list(range(181)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_the_validation_loss_of_a_mixture_is_the_mean_by_its_shares(mixture_config: Callable[..., Config]) -> None:
    config = mixture_config(temperature=2.0)
    data = open_data(config, prepare(config))
    assert list(data.validation) == ["val_loss/wiki", "val_loss/code"]
    share = 3**0.5 / (3**0.5 + 1)
    losses = {"val_loss/wiki": 2.0, "val_loss/code": 4.0}
    assert data.mean(losses) == {"val_loss": pytest.approx(2 * share + 4 * (1 - share)), **losses}
    for name, documents in (("wiki", 2), ("code", 4)):
        rows = data.validation[f"val_loss/{name}"]
        assert rows.samples_per_epoch == (documents * 101 - 1) // 10
        assert np.any(rows.rows(0, 20) == ord(name[0]), axis=1).all()


def test_the_folder_of_a_set_can_be_moved_with_the_stores(mixture_config: Callable[..., Config], tmp_path: Path) -> None:
    config = mixture_config()
    folder = prepare(config)
    assert folder.parent == tmp_path / "stores"
    before = open_data(config, folder).train.rows(0, 100)
    (tmp_path / "stores").rename(tmp_path / "elsewhere")
    after = open_data(config, tmp_path / "elsewhere" / folder.name).train.rows(0, 100)
    assert np.array_equal(before, after)


def test_another_mixture_of_the_same_sources_uses_their_stores(mixture_config: Callable[..., Config], tmp_path: Path) -> None:
    lines: list[str] = []
    first = prepare(mixture_config(), lines.append)
    assert prepare(mixture_config(temperature=3.0), lines.append) == first, "weights and temperature are no part of what is on disk"
    assert len(list((tmp_path / "stores").glob("text-*"))) == 2
    assert sum(line.startswith("tokenising") for line in lines) == 2


# ---- validation sets -----------------------------------------------------------------------------------------


def test_named_validation_sets(make_config: Callable[..., Config], corpora: Callable[[str, int], str]) -> None:
    sets = {"books": SourceConfig("text", path=corpora("books", 3)), "noise": SourceConfig("memorize", num_sequences=5, vocab_size=9)}
    config = make_config("text", path=corpora("wiki", 20), seq_len=10, val_fraction=0.1, val_sets=sets)
    data = open_data(config, prepare(config))
    assert {key: rows.samples_per_epoch for key, rows in data.validation.items()} == {
        "val_loss": (2 * 101 - 1) // 10, "val_loss/books": (3 * 101 - 1) // 10, "val_loss/noise": 5,
    }  # fmt: skip
    losses = {"val_loss": 1.0, "val_loss/books": 2.0, "val_loss/noise": 3.0}
    assert data.mean(losses) == losses
    assert next(iter(data.mean(losses))) == "val_loss"
    assert data.text == "text: 1,818 tokens, 202 held out, 303 in books, 51 in noise"
    assert np.any(data.validation["val_loss/books"].rows(0, 30) == ord("b"), axis=1).all()
    assert not np.any(data.train.rows(0, 500) == ord("b"))


def test_where_nothing_is_held_out_the_first_set_is_the_validation_loss(
    make_config: Callable[..., Config], corpora: Callable[[str, int], str]
) -> None:
    sets = {"books": SourceConfig("text", path=corpora("books", 3)), "arts": SourceConfig("text", path=corpora("arts", 3))}
    config = make_config("text", path=corpora("wiki", 20), seq_len=10, val_fraction=0.0, val_sets=sets)
    data = open_data(config, prepare(config))
    assert data.mean({"val_loss/books": 2.0, "val_loss/arts": 5.0})["val_loss"] == 2.0
    assert list(data.validation) == ["val_loss/books", "val_loss/arts"]
    assert data.text == "text: 2,020 tokens, 303 in books, 303 in arts"


def test_no_evaluation_needs_no_validation_sets(make_config: Callable[..., Config], corpora: Callable[[str, int], str]) -> None:
    sets = {"books": SourceConfig("text", path="/no/such/file")}
    config = make_config("text", path=corpora("wiki", 20), seq_len=10, eval_steps=0, val_sets=sets)
    folder = prepare(config)
    assert TokenStore.open(folder).train.num_documents == 19
    assert not open_data(config, folder).validation


# ---- refusals ------------------------------------------------------------------------------------------------


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_name_the_source(mixture_config: Callable[..., Config], corpora: Callable[[str, int], str]) -> None:
    config = mixture_config()
    config.data.mixture["code"].weight = 1e-6
    assert refusal(config) == (
        "data.mixture.code.weight=1e-06 is a share of 3.3e-07, less than one sample in 100,000: "
        "use a larger weight, or leave the source away"
    )
    config = mixture_config()
    config.data.mixture["code"] = MixturePart("memorize", vocab_size=1000)
    assert refusal(config) == (
        "data.mixture.code.vocab_size=1000 is above model.vocab_size=512: "
        "use data.mixture.code.vocab_size=512 or less, or model.vocab_size=1000 or more"
    )
    short = corpora("xs", 2)
    config = mixture_config(seq_len=200)
    config.data.mixture["code"].path = short
    assert refusal(config) == (
        "data.seq_len=200 is too long for the train split of code: a sequence needs data.seq_len + 1 = 201 tokens, and it has 101: "
        "use data.seq_len=100 or less, or more text"
    )
    config = mixture_config(seq_len=210)
    assert refusal(config) == (
        "data.val_fraction=0.1 leaves the val split of wiki 202 tokens, but a sequence needs data.seq_len + 1 = 211: "
        "use a larger data.val_fraction, data.seq_len=201 or less, more text, or train.eval_steps=0"
    )
    config = mixture_config(seq_len=110, val_sets={"books": SourceConfig("text", path=corpora("books", 1))})
    assert refusal(config) == (
        "data.val_sets.books=text has 101 tokens, but a sequence needs data.seq_len + 1 = 111: "
        "use another source, data.seq_len=100 or less, more text, or train.eval_steps=0"
    )


def test_a_validation_set_has_no_name_of_the_mixture(mixture_config: Callable[..., Config], corpora: Callable[[str, int], str]) -> None:
    """Both losses would have the key val_loss/wiki."""
    config = mixture_config(val_sets={"wiki": SourceConfig("text", path=corpora("books", 9))})
    with pytest.raises(ConfigError, match=r"^data\.val_sets=wiki is also a source of the mixture, .*: use another name$"):
        check_data(config.data)


@pytest.mark.parametrize("place", ["data", "mixture", "val_sets"])
def test_documents_are_kept_apart_where_there_are_documents(place: str) -> None:
    """Random ids hold the id that ends documents like any other."""
    text, ids = MixturePart("text", path="a"), MixturePart("memorize")
    data = {
        "data": DataConfig("memorize", seq_len=8, document_mask=True),
        "mixture": DataConfig("mixture", seq_len=8, document_mask=True, mixture={"a": text, "b": ids}),
        "val_sets": DataConfig("text", path="a", seq_len=8, document_mask=True, val_sets={"b": ids}),
    }[place]
    with pytest.raises(ConfigError, match=r"^data\.document_mask=true needs documents, and source=memorize has none: "):
        check_data(data)
    data.document_mask = False
    check_data(data)


def test_the_period_is_what_the_docstring_says() -> None:
    assert f"a period of {PERIOD:,} slots" in str(tptrain.data.mixture.__doc__)
