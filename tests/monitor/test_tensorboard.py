"""TensorBoard's own reader reads what was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import small_config
from tptrain.config import ConfigError
from tptrain.monitor.tensorboard import TensorBoard

RECORDS = [{"step": step, "loss": 0.5**step, "mfu": None, "grad_norm": float("nan"), "time": 1e9 + step} for step in (10, 20, 30, 40)]


def test_each_step_stands_once_at_its_time_also_after_a_resume_that_goes_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(True, tmp_path)
    for record in RECORDS[:3]:
        first.log(record)
    first.log({"step": 30, "val_loss": 2.0})
    first.close()
    second = TensorBoard(True, tmp_path, earlier=RECORDS[:2])
    second.log(RECORDS[2])
    second.log(RECORDS[3])
    second.close()
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=False)
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"], "no unknown numbers, and nothing of what was trained again"
    assert [(event.wall_time, event.step, event.value) for event in events.Scalars("loss")] == [
        (1e9 + step, step, 0.5**step) for step in (10, 20, 30, 40)
    ]


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    board = TensorBoard(False, tmp_path)
    board.log(RECORDS[0])
    board.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    board = TensorBoard(True, tmp_path / "file")
    board.log(RECORDS[0])
    board.close()
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith("warning: TensorBoard gets no more numbers: ")


def test_it_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert small_config(train__tensorboard=True).train.tensorboard
    monkeypatch.setattr("tptrain.config_values.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        small_config(train__tensorboard=True)
    assert str(error.value) == (
        "train.tensorboard=true needs the package tensorboard, which is not installed: "
        "pip install 'tptrain[tensorboard]', or use train.tensorboard=false"
    )
    assert not small_config().train.tensorboard
