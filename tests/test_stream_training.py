"""A run that streams: the same samples and losses whatever stops it and whatever layout goes on, and nothing read twice but a little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.saving import save_now, start_from
from tests.support import small_config
from tests.test_sample_order import note_inputs
from tptrain.checkpoint.folder import complete_checkpoints, read_state
from tptrain.config import Config
from tptrain.config_error import ConfigError
from tptrain.data.dataset import open_data
from tptrain.data.prepare import prepare
from tptrain.data.stream import StreamRows
from tptrain.data.tokenizers import load_tokenizer
from tptrain.data_config import SourceConfig, TokenizerConfig
from tptrain.mesh import build_mesh
from tptrain.trainer import Trainer

STEPS = 14
UNBROKEN: list[tuple[int, dict[str, int]]] = [(STEPS, {})]
STOPS: list[tuple[int, dict[str, int]]] = [
    (3, {"dp": 4, "micro_batch_size": 2}),
    (5, {"dp": 2, "tp": 2, "micro_batch_size": 4}),
    (6, {"dp": 4, "micro_batch_size": 1}),
    (9, {"tp": 2, "pp": 2, "micro_batch_size": 1}),
    (12, {"dp": 2, "pp": 2, "micro_batch_size": 2}),
    (STEPS, {"pp": 4, "micro_batch_size": 8}),
]
"""Until which step a run goes, and in which layout."""


def streaming_config(folder: Path, **changes: Any) -> Config:
    """Streams folder/text, of which two epochs are about as many tokens as STEPS steps of eight samples."""
    values: dict[str, Any] = {
        "data__source": "jsonl", "data__path": str(folder / "text"), "data__store_dir": str(folder / "stores"), "data__val_fraction": 0.0,
        "data__streaming": True, "data__val_documents": 6, "data__stream_lanes": 4, "data__shuffle_buffer": 3, "data__seq_len": 16,
        "train__max_steps": STEPS, "train__global_batch_size": 8, "train__eval_steps": None, "parallel__micro_batches": None,
    }  # fmt: skip
    return small_config(**{**values, **changes})


def write_text(folder: Path) -> None:
    (folder / "text").mkdir()
    for name, rows in (("a", range(20)), ("b", range(20, 56))):
        lines = (json.dumps({"text": f"{row} " + "word, " * (row % 5)}) + "\n" for row in rows)
        (folder / "text" / f"{name}.jsonl").write_text("".join(lines))


def train(rank: int, folder: Path, run_dir: Path, stops: list[tuple[int, dict[str, int]]]) -> dict[str, Any]:
    """What this rank's first stage computes on, by step, and the losses."""
    seen: dict[int, list[tuple[int, ...]]] = {}
    losses, evaluations, known = [], [], []
    for last, layout in stops:
        config = streaming_config(folder, **{f"parallel__{key}": value for key, value in layout.items()})
        mesh = build_mesh(config.parallel, torch.device("cpu"), 60)
        trainer = Trainer(config, mesh, open_data(config, prepare(config, lambda line: None)))
        start_from(trainer, run_dir)
        if trainer.reads and isinstance(trainer.data.train, StreamRows):
            known.append(sorted(trainer.data.train.state(trainer.samples_done)["lanes"]))
        note_inputs(trainer, seen)
        trainer.read_ahead()
        while trainer.steps_done < last:
            losses.append(trainer.step().loss)
            evaluations.append(trainer.evaluate())
        save_now(trainer, run_dir)
        trainer.close()
    return {"seen": seen, "losses": losses, "evaluations": evaluations, "known": known}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streamed")
    write_text(path)
    prepare(streaming_config(path), lambda line: None)
    return path


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every rank's findings of the unbroken run in one process and of the broken one in four."""
    return {
        "unbroken": run_ranks(1, train, folder, folder / "one", UNBROKEN),
        "broken": run_ranks(4, train, folder, folder / "four", STOPS),
    }


def test_each_step_trains_on_the_stream_s_next_samples(folder: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    config = streaming_config(folder)
    rows = open_data(config, prepare(config, lambda line: None)).train
    assert rows.samples_per_epoch is None
    for run, ranks in runs.items():
        for step in range(STEPS):
            found = [row for rank in ranks for row in rank["seen"].get(step, [])]
            assert sorted(found) == sorted(map(tuple, rows.rows(8 * step, 8).tolist())), (run, step)


def test_losses_do_not_depend_on_stops_and_layouts(runs: dict[str, list[dict[str, Any]]]) -> None:
    (unbroken,), broken = runs["unbroken"], runs["broken"]
    for rank in broken:
        assert rank["losses"] == pytest.approx(unbroken["losses"], rel=1e-5)
        assert [e["val_loss"] for e in rank["evaluations"]] == pytest.approx([e["val_loss"] for e in unbroken["evaluations"]], rel=1e-5)


def test_a_checkpoint_knows_where_every_lane_stands(folder: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """After 112 samples each of the 4 lanes has given 28 windows of 16 tokens: the state lies before that, by less than three blocks."""
    starts = [known for rank in runs["broken"] for known in rank["known"]]
    assert starts.count([]) == 4, "only the first start, of four readers, is from nothing"
    assert starts.count(["0", "1", "2", "3"]) == len(starts) - 4
    for run in ("one", "four"):
        state = read_state(complete_checkpoints(folder / run / "checkpoints")[-1])["stream"]
        assert sorted(state["lanes"]) == ["0", "1", "2", "3"]
        for mark in state["lanes"].values():
            assert 28 * 16 - 3 * 3 * 30 < mark["token"] <= 28 * 16
        assert state["of"]["data.stream_lanes"] == 4


def test_what_prepare_and_the_banner_say(folder: Path) -> None:
    lines: list[str] = []
    config = streaming_config(folder)
    data = open_data(config, prepare(config, lines.append))
    assert f"streaming jsonl {folder}/text: read while training, with no token store" in lines
    assert isinstance(data.train, StreamRows)
    assert data.end_of_document == 256
    held_out = sum(len(f"{row} " + "word, " * (row % 5)) + 1 for row in range(6))
    assert data.text == f"streaming jsonl {folder}/text, 4 lanes, 3 documents of each mixed at a time, {held_out} held out"
    assert list(data.validation) == ["val_loss"]
    assert data.reads(100) == ""


def test_a_stream_without_anything_to_evaluate_on_is_refused(folder: Path) -> None:
    config = streaming_config(folder, data__val_documents=0, train__eval_steps=5)
    with pytest.raises(ConfigError, match=r"^train\.eval_steps=5 has nothing to evaluate on.*use 0, or data\.val_documents=500"):
        prepare(config, lambda line: None)
    prepare(streaming_config(folder, data__val_documents=0, train__eval_steps=0), lambda line: None)


def test_validation_sets_of_a_stream(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("some more text to look at")
    sets = {"more": SourceConfig(source="text", path=str(tmp_path / "more.txt"))}
    config = streaming_config(folder, data__val_sets=sets)
    data = open_data(config, prepare(config, lambda line: None))
    assert list(data.validation) == ["val_loss", "val_loss/more"]
    assert data.weights == {"val_loss": 1.0}
    alone = streaming_config(folder, data__val_sets=sets, data__val_documents=0)
    assert open_data(alone, prepare(alone, lambda line: None)).weights == {"val_loss/more": 1.0}


def test_few_documents_held_out_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.val_documents=1 have 3 tokens, but a sequence needs"):
        prepare(streaming_config(folder, data__val_documents=1), lambda line: None)


def test_two_ways_to_hold_out_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.val_documents=3 and data\.val_split are both given: use one"):
        small_config(
            data__source="saved", data__path="x", data__streaming=True, data__val_documents=3, data__val_split="test", data__val_fraction=0
        )


def test_the_held_out_documents_are_the_stream_s_first(folder: Path) -> None:
    config = streaming_config(folder)
    rows = open_data(config, prepare(config, lambda line: None)).validation["val_loss"]
    assert rows.samples_per_epoch is not None
    text = "".join(f"{row} " + "word, " * (row % 5) + "\0" for row in range(6))
    run = np.array([256 if letter == "\0" else ord(letter) for letter in text])
    windows = {tuple(run[first : first + 17]) for first in range(0, len(run) - 16, 16)}
    assert {tuple(row) for row in rows.rows(0, rows.samples_per_epoch).tolist()} == windows


def test_a_learned_tokenizer_is_found_by_the_ranks(folder: Path) -> None:
    """Learned from the stream, kept in the prepared folder, and what the samples are made of; another one has another folder."""
    folders = {}
    for size in (260, 300):
        tokenizer = TokenizerConfig(name="train", vocab_size=size)
        config = streaming_config(folder, data__tokenizer=tokenizer, data__stream_lanes=1, data__shuffle_buffer=1, model__vocab_size=300)
        folders[size] = prepare(config, lambda line: None)
        learned = load_tokenizer(config.data, folders[size])
        assert learned is not None
        found = open_data(config, folders[size])
        assert found.end_of_document == learned.end_of_document
        rows = found.train.rows(0, 3)
        text = "".join(f"{row} " + "word, " * (row % 5) for row in range(6, 56))
        assert text.startswith(learned.decode([token for token in [*rows[:, :-1].reshape(-1)] if token != learned.end_of_document]))
        assert rows.max() < learned.vocab_size
    assert folders[260] != folders[300]
