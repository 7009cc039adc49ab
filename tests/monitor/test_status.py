import json
import os

import pytest

from tptrain.monitor.status import read_status, write_status


def test_a_status_reads_back_and_keeps_the_last_step(tmp_path):
    assert read_status(tmp_path) is None
    write_status(tmp_path / "new", "running")
    assert read_status(tmp_path / "new") == {"state": "running", "step": None, "error": None}
    write_status(tmp_path, "running", step=120)
    write_status(tmp_path, "failed", error="rank 1: boom")
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "failed", "step": 120, "error": "rank 1: boom"}
    write_status(tmp_path, "running", step=0)
    assert read_status(tmp_path) == {"state": "running", "step": 0, "error": None}


def test_an_unknown_state_is_refused_and_changes_nothing(tmp_path):
    write_status(tmp_path, "done", step=3)
    with pytest.raises(ValueError, match="state=finished is unknown: use one of running, done, stopped, failed"):
        write_status(tmp_path, "finished", step=4)
    assert read_status(tmp_path) == {"state": "done", "step": 3, "error": None}


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_dies_leaves_the_old_status_and_no_litter(tmp_path, monkeypatch, broken):
    write_status(tmp_path, "running", step=7)

    def die(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, die)
        with pytest.raises(OSError, match="disk full"):
            write_status(tmp_path, "done", step=8)
    assert read_status(tmp_path) == {"state": "running", "step": 7, "error": None}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("content", ["", '{"state": "run', "[]", "\x00\x00"])
def test_a_file_that_others_broke_reads_as_none(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None
    write_status(tmp_path, "running")
    assert read_status(tmp_path) == {"state": "running", "step": None, "error": None}
