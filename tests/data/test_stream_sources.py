"""Streams of the sources that users name: the same samples from any form of the same documents, and what is held out of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.data.test_stream import END, SEED, Bytes, lane_documents, twin
from tptrain.config_error import ConfigError
from tptrain.data.head import Head
from tptrain.data.sources import open_source
from tptrain.data.space import Space
from tptrain.data.stream import StreamRows, merge_states
from tptrain.data_config import DataConfig

TEXTS = [
    "plain words, and more of them", "Straße, naïve, œuvre", "日本語の文章です", "🙂 and 👩‍👩‍👧", "", "ends of\r\nlines\r\n",
    "\N{BYTE ORDER MARK}mark", "x" * 4000, *(f"document {number} " * (number % 7) for number in range(60)),
]  # fmt: skip


def write_jsonl(folder: Path) -> dict[str, Any]:
    lines = [json.dumps({"text": text, "number": row}, ensure_ascii=row % 2 == 0) for row, text in enumerate(TEXTS)]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:30]).encode() + b"\n"))
    (folder / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines[30:]).encode() + b"\r\n")
    return {"source": "jsonl", "path": str(folder)}


def write_parquet(folder: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, texts in (("a", TEXTS[:30]), ("b", TEXTS[30:])):
        pq.write_table(pa.table({"number": range(len(texts)), "text": texts}), folder / f"{name}.parquet", row_group_size=7)
    return {"source": "parquet", "path": str(folder)}


def write_saved(folder: Path) -> dict[str, Any]:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return {"source": "saved", "path": str(folder / "saved")}


def write_text(folder: Path) -> dict[str, Any]:
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return {"source": "text", "path": str(folder)}


@pytest.mark.parametrize(
    ("write", "sizes"),
    [(write_jsonl, [30, 38]), (write_parquet, [30, 38]), (write_saved, None), (write_text, [1] * len(TEXTS))],
    ids=["jsonl", "parquet", "saved", "text"],
)
@pytest.mark.parametrize("held_out", [0, 9])
def test_samples_of_each_source_with_stops(tmp_path: Path, write: Any, sizes: list[int] | None, held_out: int) -> None:
    """Equal to the serial twin over the same documents in the same files, with a new reader every few batches."""
    values = {"seq_len": 24, "streaming": True, "stream_lanes": 4, "shuffle_buffer": 3, "val_documents": held_out}
    data = DataConfig(**write(tmp_path), **values)
    source = open_source(data)
    shards = source.stream().num_shards
    sizes = sizes or [len(TEXTS) // shards + (shard < len(TEXTS) % shards) for shard in range(shards)]
    starts = np.cumsum([0, *sizes])
    files = [TEXTS[start : start + size] for start, size in zip(starts[:-1], sizes, strict=True)]
    assert len(files) == shards
    wanted, state = twin(files, data, 480), None
    for sample in range(0, 480, 60):
        readers = [StreamRows(source, Bytes(), data, SEED) for _ in range(2)]
        for reader in readers:
            reader.load_state(state)
        for first in range(sample, sample + 60, 20):
            assert np.array_equal(readers[0].rows(first, 10), wanted[first : first + 10])
            assert np.array_equal(readers[1].rows(first + 10, 10), wanted[first + 10 : first + 20])
        state = json.loads(json.dumps(merge_states([reader.state(sample + 60) for reader in readers])))


def test_what_is_held_out_is_what_training_leaves_out(tmp_path: Path) -> None:
    data = DataConfig(**write_jsonl(tmp_path), seq_len=24, streaming=True, stream_lanes=2, shuffle_buffer=5, val_documents=37)
    source = open_source(data)
    head = Head(source, data.val_documents)
    documents = head.load(tmp_path / "cache")
    assert documents.texts(0, len(documents)) == TEXTS[:37] == [row["text"] for row in head.stream()]
    assert head.fingerprint() not in (source.fingerprint(), Head(source, 36).fingerprint())
    rows = StreamRows(source, Bytes(), data, SEED).rows(0, 400)
    trained = set()
    for lane in range(2):
        run = [*rows[lane, :1], *rows[lane::2, 1:].reshape(-1)]
        ends = [place for place, token in enumerate(run) if token == END]
        trained |= {bytes(run[start + 1 : end]).decode() for start, end in zip([-1, *ends], ends, strict=False)}
    assert trained == set(TEXTS[37:]) == {text for lane in range(2) for text in lane_documents([TEXTS[:30], TEXTS[30:]], data, lane)}


def test_too_many_held_out(tmp_path: Path) -> None:
    source = open_source(DataConfig(**write_jsonl(tmp_path), seq_len=24))
    assert len(Head(source, len(TEXTS) - 1).load(tmp_path / "cache")) == len(TEXTS) - 1
    with pytest.raises(ConfigError, match=rf"^data.val_documents={len(TEXTS)} leaves nothing to train on of jsonl .* has {len(TEXTS)} doc"):
        Head(source, len(TEXTS)).load(tmp_path / "cache")


def test_a_connection_lost_while_documents_are_held_out(tmp_path: Path) -> None:
    """Not a fault of data.store_dir, which the documents are written to meanwhile."""

    def stream() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionError("reset by peer")

    source = SimpleNamespace(label="hub x", column="text", fingerprint=lambda: "f", stream=stream)
    with (
        pytest.raises(ConfigError, match=r"^data.streaming=true lost its connection after row 1 of hub x \(Connection"),
        Space(str(tmp_path), tmp_path) as space,
        space.loading(tmp_path / "cache"),
    ):
        Head(source, 3).load(tmp_path / "cache")


def test_a_bad_row_of_a_source_is_named_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "id": 1}\n' * 5 + '{"text": null, "id": 2}\n')
    data = DataConfig(source="jsonl", path=str(tmp_path), seq_len=8, streaming=True, stream_lanes=1)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^data\.text_column=text is null in .*bad\.jsonl, row 6 \(columns: text, id\)"):
            StreamRows(open_source(data), Bytes(), data, SEED).rows(0, 3)
    with pytest.raises(ConfigError, match=r"bad\.jsonl, row 6"):
        Head(open_source(data), 6).load(tmp_path / "cache")
