"""A run folder has its tokenizer's files, and goes on with no other tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.tokenizer_kinds import KINDS
from tptrain.config import ConfigError, DataConfig, TokenizerConfig
from tptrain.data import keep_tokenizer, load_tokenizer

FILES = ["tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {kind: KINDS[kind][0](tmp_path / kind) for kind in ("byte_level", "metaspace")}


def data_of(name: object, **asked: str) -> DataConfig:
    return DataConfig("text", path="x", seq_len=8, tokenizer=TokenizerConfig(str(name), **asked))


def run_of(data: DataConfig, tmp_path: Path) -> Path:
    """A run folder, as a training with `data` leaves it, with the checkpoint step-00000010."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run_dir / "config.yaml").touch()
    keep_tokenizer(data, tmp_path / "store", run_dir, None)
    return run_dir


def test_the_store_s_tokenizer_is_copied(folders: dict[str, Path], tmp_path: Path) -> None:
    """Not what the name stands for now."""
    data = data_of("gone")
    stored = load_tokenizer(data_of(folders["metaspace"]))
    assert stored is not None
    stored.save(tmp_path / "store")
    keep_tokenizer(data, tmp_path / "store", tmp_path / "run", None)
    for file in FILES:
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "store" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    keep_tokenizer(data_of("byte"), tmp_path / "store", tmp_path / "run", None)
    assert not list((tmp_path / "run").iterdir()), "which would be taken for the tokenizer of the new run"
    keep_tokenizer(DataConfig("memorize", seq_len=8), tmp_path / "store", tmp_path / "none", None)
    assert not (tmp_path / "none").exists()


def test_another_tokenizer_than_the_checkpoint_s(folders: dict[str, Path], tmp_path: Path) -> None:
    run_dir = run_of(data_of(folders["byte_level"]), tmp_path)
    start = run_dir / "checkpoints" / "step-00000010"
    before = (run_dir / "tokenizer.json").read_bytes()
    rule = f"is not the tokenizer that {start} was trained with: use data.tokenizer.name={run_dir}/tokenizer.json with its"
    for asked in (folders["metaspace"], "byte"):
        with pytest.raises(ConfigError, match=f"^data.tokenizer.name={asked} {rule}"):
            keep_tokenizer(data_of(asked), tmp_path / "store", run_dir, start)
    with pytest.raises(ConfigError, match=rule):
        keep_tokenizer(data_of(folders["byte_level"], end_token="<|tool|>"), tmp_path / "store", run_dir, start)
    assert (run_dir / "tokenizer.json").read_bytes() == before
    for asked in (folders["byte_level"], run_dir / "tokenizer.json"):
        keep_tokenizer(data_of(asked), tmp_path / "store", run_dir, start)
    keep_tokenizer(data_of(folders["metaspace"]), tmp_path / "store", run_dir, None)
    assert (run_dir / "tokenizer.json").read_bytes() != before


def test_another_than_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    run_dir = run_of(data_of("byte"), tmp_path)
    start = run_dir / "checkpoints" / "step-00000010"
    keep_tokenizer(data_of("byte"), tmp_path / "store", run_dir, start)
    with pytest.raises(ConfigError, match=r"was trained with: use data.tokenizer.name=byte "):
        keep_tokenizer(data_of(folders["metaspace"]), tmp_path / "store", run_dir, start)
    (run_dir / "config.yaml").unlink()
    keep_tokenizer(data_of(folders["metaspace"]), tmp_path / "store", tmp_path / "new", start)  # a checkpoint apart from its run


def test_a_run_folder_that_cannot_be_written(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^hydra.run.dir=.*/file/run cannot be written \(Not a directory\): use hydra.run.dir=FOLDER"):
        keep_tokenizer(data_of(folders["metaspace"]), tmp_path / "store", tmp_path / "file" / "run", None)
