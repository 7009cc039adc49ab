"""Streaming against a serial twin that reads the files itself: which text a sample holds, and that nothing is lost or doubled."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tptrain.config_error import ConfigError
from tptrain.data.dealer import Dealer, is_network_error
from tptrain.data.lane import block_key
from tptrain.data.sampler import permute
from tptrain.data.stream import StreamRows, merge_states
from tptrain.data_config import DataConfig

SEQ_LEN, SEED, END = 16, 11, 256
SCRIPTS = ("plain words ", "Größenwahn ", "日本語の文 ", "привет мир ", "🙂🙃 ")


class Bytes:
    """UTF-8 bytes, as the serial twin makes them."""

    end_of_document = END

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


class Files:
    """Lines of JSON, some of them gzipped, as a source gives them."""

    label, column = "jsonl test", "text"

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self._opened = paths, None

    def stream(self) -> Any:
        import datasets

        if self._opened is None:  # once, because it takes a while; each reader gets a stream with a state of its own
            files = [str(path) for path in self.paths]
            self._opened = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
        return deepcopy(self._opened)


def write(folder: Path, counts: Sequence[int], seed: int = 0) -> tuple[Files, list[list[str]]]:
    """A file for each count of documents, every other one gzipped; and the documents. Each has a text of its own."""
    generator = random.Random(seed)
    paths, files = [], []
    for number, count in enumerate(counts):
        texts = [f"{number}.{row} " + generator.choice(SCRIPTS) * generator.randrange(12) for row in range(count)]
        if count > 5:
            texts[3], texts[4] = "", "windows\r\nline ends\r\n"
        lines = "".join(json.dumps({"text": text, "other": row}, ensure_ascii=number % 3 == 0) + "\n" for row, text in enumerate(texts))
        path = folder / (f"{number}.jsonl.gz" if number % 2 else f"{number}.jsonl")
        path.write_bytes(gzip.compress(lines.encode()) if number % 2 else lines.encode())
        paths.append(path)
        files.append(texts)
    return Files(paths), files


def config(**values: Any) -> DataConfig:
    return DataConfig(**{"source": "jsonl", "seq_len": SEQ_LEN, "streaming": True, "stream_lanes": 4, "shuffle_buffer": 7, **values})


def quiet(source: Files, data: DataConfig) -> StreamRows:
    return StreamRows(source, Bytes(), data, SEED, lambda line: None)


# ---- the serial twin --------------------------------------------------------------------------------------------------


def lane_documents(files: list[list[str]], data: DataConfig, lane: int) -> list[str]:
    """A lane's documents in the stream's order: files dealt to the greatest number of parts that divides files and lanes, then rows."""
    parts = next(n for n in range(min(len(files), data.stream_lanes), 0, -1) if len(files) % n == 0 == data.stream_lanes % n)
    if data.val_documents:
        parts = 1
    part = [text for file in files[lane % parts :: parts] for text in file][data.val_documents :]
    return part[lane // parts :: data.stream_lanes // parts]


def lane_tokens(files: list[list[str]], data: DataConfig, lane: int, count: int) -> list[int]:
    """The first tokens of a lane's endless run, by one loop over its documents."""
    documents, tokens, epoch = lane_documents(files, data, lane), [], 0
    while len(tokens) < count:
        for block in range(-(-len(documents) // data.shuffle_buffer)):
            texts = documents[block * data.shuffle_buffer : (block + 1) * data.shuffle_buffer]
            key = block_key(SEED, epoch, lane, block)
            for place in range(len(texts)):
                tokens += [*texts[permute(place, len(texts), key)].encode(), END]
        epoch += 1
    return tokens[:count]


def twin(files: list[list[str]], data: DataConfig, samples: int) -> np.ndarray:
    """Samples 0 .. samples - 1: the lanes take turns, stream_run windows each."""
    length = data.seq_len
    lanes = [lane_tokens(files, data, lane, samples * length + 1) for lane in range(data.stream_lanes)]
    given, rows = [0] * data.stream_lanes, []
    while len(rows) < samples:
        for lane, tokens in enumerate(lanes):
            for _ in range(data.stream_run):
                rows.append(tokens[given[lane] * length : (given[lane] + 1) * length + 1])
                given[lane] += 1
    return np.array(rows[:samples])


# ---- the ids ----------------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "one file, dealt by rows": ([90], {}),
    "files dealt whole": ([30, 25, 41, 28], {}),
    "files and rows": ([20, 21, 22, 23, 24, 31], {}),
    "more files than lanes": ([9, 14, 11, 8], {"stream_lanes": 2, "stream_run": 3}),
    "held-out documents": ([20, 30], {"val_documents": 23}),
    "full rounds": ([56], {}),
    "one lane in the stream's order": ([40, 3], {"stream_lanes": 1, "shuffle_buffer": 1}),
}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Files, list[list[str]], DataConfig]:
    monkeypatch.setattr("tptrain.data.lane._PIECE_CHARACTERS", 150)  # so that a block has several pieces, and states lie within blocks
    counts, values = SHAPES[request.param]
    return *write(tmp_path, counts), config(**values)


def test_samples_are_those_of_the_twin_over_epochs(shape: tuple[Files, list[list[str]], DataConfig]) -> None:
    source, files, data = shape
    wanted = twin(files, data, 700)
    rows = quiet(source, data)
    assert rows.samples_per_epoch is None
    assert np.array_equal(np.concatenate([rows.rows(first, 35) for first in range(0, 700, 35)]), wanted)


def test_readers_of_any_layout_with_stops_give_the_same_samples(shape: tuple[Files, list[list[str]], DataConfig]) -> None:
    """Batches of 8, 12 and 24 samples over 1, 2 and 4 readers that each take calls of their own size, with a stop at every change."""
    source, files, data = shape
    wanted = twin(files, data, 600)
    generator, state, sample, seen = random.Random(5), None, 0, []
    while sample < 550:
        dp, batch = generator.choice([1, 2, 4]), generator.choice([8, 12, 24])
        share = batch // dp
        readers = [quiet(source, data) for _ in range(dp)]
        for reader in readers:
            reader.load_state(state)
        for _ in range(generator.randrange(1, 4)):
            for rank, reader in enumerate(readers):
                size = generator.choice([1, 2, share])
                for first in range(0, share, size):
                    at = sample + rank * share + first
                    count = min(size, share - first)
                    assert np.array_equal(reader.rows(at, count), wanted[at : at + count]), (dp, batch, at)
                    seen += range(at, at + count)
            sample += batch
            if sample + 24 > 600:
                break
        ahead = generator.randrange(0, 3) * batch  # a reader that prefetches is ahead of the trainer when it stops
        for reader in readers:
            if ahead and sample + ahead < 590:
                reader.rows(sample + ahead - share, 1)
        state = json.loads(json.dumps(merge_states([reader.state(sample) for reader in readers])))
        if sample + 24 > 600:
            break
    assert sorted(seen) == list(range(sample))


def test_a_resume_reads_little_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a state, only the rounds that the lanes stand in are read, not the epoch from its start. Without one, it is exact as well."""
    source, files = write(tmp_path, [4000])
    data = config()
    wanted = twin(files, data, 4 * 1024)
    reader = quiet(source, data)
    for first in range(0, 3200, 32):
        reader.rows(first, 32)
    state = reader.state(3200 - 5 * 32)
    rounds = 0
    read_round = Dealer._read_round

    def counted(dealer: Dealer) -> list[str]:
        nonlocal rounds
        rounds += 1
        return read_round(dealer)

    monkeypatch.setattr(Dealer, "_read_round", counted)
    behind = quiet(source, data)
    behind.load_state(state)
    assert np.array_equal(behind.rows(3200 - 5 * 32, 32), wanted[3200 - 5 * 32 : 3200 - 4 * 32])
    assert 1 <= rounds <= 8
    without = quiet(source, data)
    assert np.array_equal(without.rows(3200, 32), wanted[3200:3232])
    assert rounds > 20


def test_a_jump_back_and_a_jump_far_ahead(tmp_path: Path) -> None:
    source, files = write(tmp_path, [60])
    data = config()
    wanted = twin(files, data, 900)
    rows = quiet(source, data)
    for first in (500, 0, 880, 300, 299, 301, 10):
        assert np.array_equal(rows.rows(first, 12), wanted[first : first + 12]), first
        dealer = rows._dealers[0]
        assert all(at >= dealer._next[lane] for at, lane in dealer._waiting), "text waits that nobody will ask for"
        for lane in rows._lanes.values():
            tokens = [mark.token for mark in lane._marks]
            assert tokens == sorted(set(tokens)), "marks out of order"
    with pytest.raises(ValueError, match="do not exist"):
        rows.rows(-1, 2)


def test_an_epoch_holds_each_document_once(shape: tuple[Files, list[list[str]], DataConfig]) -> None:
    """Cut at the end ids, the first epoch of all lanes is the multiset of the stream's documents behind the held-out ones."""
    source, files, data = shape
    everything = [text for file in files for text in file]
    counts = [len(lane_documents(files, data, lane)) for lane in range(data.stream_lanes)]
    assert sum(counts) == len(everything) - data.val_documents
    rows, found = quiet(source, data), Counter[bytes]()
    samples = rows.rows(0, 2400)
    lanes = np.arange(2400) // data.stream_run % data.stream_lanes
    for lane, count in enumerate(counts):
        windows = samples[lanes == lane]
        run = [*windows[0, :1], *windows[:, 1:].reshape(-1)]
        ends = [place for place, token in enumerate(run) if token == END]
        starts = [0, *(end + 1 for end in ends)]
        documents = [bytes(run[start:end]) for start, end in zip(starts, ends, strict=False)]
        assert len(documents) >= count
        found.update(documents[:count])
        assert len(documents) >= 2 * count
        if count > 12:  # the second epoch comes in another order
            assert Counter(documents[:count]) == Counter(documents[count : 2 * count])
            assert documents[:count] != documents[count : 2 * count] or data.shuffle_buffer == 1
    assert found == Counter(text.encode() for text in everything[data.val_documents :])


def test_a_stream_run_keeps_each_reader_to_its_own_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 samples a batch, 4 lanes, runs of 4: of 2 readers, each knows 2 lanes, and of 4 each one."""
    source, _ = write(tmp_path, [50])
    data = config(stream_run=4)
    for dp in (2, 4):
        known = []
        for rank in range(dp):
            reader = quiet(source, data)
            for batch in range(20):
                reader.rows(batch * 16 + rank * 16 // dp, 16 // dp)
            known.append(sorted(map(int, reader.state(320)["lanes"])))
        assert sorted(lane for lanes in known for lane in lanes) == [0, 1, 2, 3]


def test_a_lane_far_behind_is_read_again_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows alternate between long and short, lanes drift apart without end; what waits stays bounded, and the samples exact."""
    monkeypatch.setattr("tptrain.data.dealer._WAITING_CHARACTERS", 3000)
    texts = [f"{row}" * (30 if row % 2 else 1) for row in range(400)]
    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = config(stream_lanes=2)
    rows = quiet(Files([path]), data)
    assert np.array_equal(np.concatenate([rows.rows(first, 4) for first in range(0, 400, 4)]), twin([texts], data, 400))
    assert rows._dealers[0]._waiting_characters <= 3000


def test_a_state_of_another_deal_is_refused(tmp_path: Path) -> None:
    source, _ = write(tmp_path, [50])
    reader = quiet(source, config())
    reader.rows(0, 40)
    for key, value in {"stream_lanes": 2, "shuffle_buffer": 8, "stream_run": 2, "val_documents": 1, "seq_len": 8}.items():
        with pytest.raises(ConfigError, match=rf"^data\.{key}={value} differs from .* of the checkpoint's stream: use data\.{key}="):
            quiet(source, config(**{key: value})).load_state(reader.state(40))
    fresh = quiet(source, config())
    fresh.load_state(None)
    assert merge_states([None, None]) is None
    near, far = ({"token": token, "epoch": 0, "block": 0, "document": token, "start": {}} for token in (40, 30))
    readers = [{"of": {}, "lanes": {"0": near, "1": far}}, None, {"of": {}, "lanes": {"0": far, "1": near, "2": far}}]
    assert merge_states(readers) == {"of": {}, "lanes": {"0": near, "1": near, "2": far}}
    assert not fresh.state(0)["lanes"]


# ---- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "what"), [(None, "is null"), (5, "is int, not text"), (["a"], "is list, not text"), (..., "is null|is missing")]
)
def test_a_field_that_is_no_text_names_row_and_columns(tmp_path: Path, value: object, what: str) -> None:
    lines = [{"text": f"{row}", "id": row} for row in range(200)]
    bad = lines if isinstance(value, (int, list)) else lines[33:34]
    for line in bad:
        line["text"] = value  # type: ignore[assignment]
        if value is ...:
            del line["text"]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = 1 if len(bad) > 1 else 34
    with pytest.raises(ConfigError, match=rf"^data\.text_column=text ({what}) in jsonl test, row {row} \(columns: text, id\): "):
        quiet(Files([path]), config()).rows(0, 40)
    reader = quiet(Files([path]), config(shuffle_buffer=3))  # in its third round, or its first
    for _ in range(2):  # not passed over when it is asked again
        with pytest.raises(ConfigError, match=rf" in jsonl test, row {row} "):
            reader.rows(0, 4)


def test_a_column_that_does_not_exist(tmp_path: Path) -> None:
    source, _ = write(tmp_path, [40])
    source.column = "body"
    with pytest.raises(ConfigError, match=r"^data\.text_column=body is missing in jsonl test, row 1 \(columns: text, other\): "):
        quiet(source, config()).rows(0, 1)


def test_fewer_documents_than_lanes(tmp_path: Path) -> None:
    source, _ = write(tmp_path, [3])
    with pytest.raises(ConfigError, match=r"^data\.stream_lanes=4 leaves lane 3 without a document"):
        quiet(source, config()).rows(0, 8)


def test_a_file_that_breaks_off(tmp_path: Path) -> None:
    source, _ = write(tmp_path, [10, 2000])
    source.paths[1].write_bytes(source.paths[1].read_bytes()[:-300])
    reader = quiet(source, config())
    said = r"^data\.streaming=true cannot read jsonl test \(files 2, 4, \.\.\.\) after row \d+ \(EOFError: "
    for _ in range(2):  # not passed over when it is asked again
        with pytest.raises(ConfigError, match=said) as caught:
            reader.rows(0, 5000)
        assert "\n" not in str(caught.value)


class Flaky:
    """A stream whose connection breaks in mid-round, `failures` times at the same row."""

    def __init__(self, inner: Any, failures: int, error: Callable[[], Exception]) -> None:
        self.inner, self.failures, self.error, self.broken = inner, failures, error, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def iter(self, batch_size: int) -> Any:
        for number, batch in enumerate(self.inner.iter(batch_size)):
            if (number == 1 or self.broken) and self.failures:
                self.failures, self.broken = self.failures - 1, True
                raise self.error()
            yield batch


@pytest.mark.parametrize("failures", [1, 5, 6])
def test_a_lost_connection_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("tptrain.data.dealer.time.sleep", pauses.append)
    source, files = write(tmp_path, [200])
    data, lines = config(), []
    flaky = Flaky(source.stream(), failures, lambda: ConnectionError("Server Disconnected"))
    monkeypatch.setattr(source, "stream", lambda: flaky)
    rows = StreamRows(source, Bytes(), data, SEED, lines.append)
    if failures > 5:
        with pytest.raises(ConfigError, match=r"^data\.streaming=true lost its connection after row 28 of jsonl test \(ConnectionError: S"):
            rows.rows(0, 300)
    else:
        assert np.array_equal(rows.rows(0, 300), twin(files, data, 300))
    assert pauses == [1, 2, 4, 8, 16][:failures]
    assert lines[0] == "jsonl test: ConnectionError: Server Disconnected; trying again in 1 s"
    assert len(lines) == min(failures, 5)


def test_which_errors_are_of_the_network() -> None:
    outer = RuntimeError("reading failed")
    outer.__cause__ = TimeoutError()
    assert all(map(is_network_error, (outer, ConnectionResetError())))
    assert not any(map(is_network_error, (FileNotFoundError(), ValueError(), PermissionError(), EOFError())))
