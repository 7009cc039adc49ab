"""`tptrain doctor` as a command: a rank that a busy loop slows, ranks with different versions, and one rank alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import FAULTS, command
from tests.support import SMALL, small_config
from tptrain import consult, environment
from tptrain.config import ConfigError

DOCTOR = ("doctor", *SMALL, "hydra.run.dir=run", "launch.threads_per_rank=1")


def test_a_rank_slowed_by_a_busy_loop_is_found(tmp_path: Path) -> None:
    """Under torchrun, whose exit code is 1 for every failure. Nine tenths of the rank's core are gone, whatever else the machine does."""
    outcome = command(tmp_path, *DOCTOR, "parallel=tp2", torchrun=2, PYTHONPATH=str(FAULTS), FAULT="busy:1")
    assert outcome.code == 1, outcome.err
    found = json.loads((tmp_path / "run/doctor.json").read_text())
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert found["slowest_rank"] == 1
    slow = [finding["text"] for finding in found["findings"] if finding["kind"] == "slow rank"]
    assert [text.split(" on ")[0] for text in slow] == ["rank 1"]
    assert found["ranks"][1]["core_share"] < 0.35
    assert any(finding["kind"] == "busy cores" for finding in found["findings"])
    assert {link["kind"] for link in found["links"]} == {"tp", "all"}
    lines = outcome.out.splitlines()
    assert any(line.startswith("slow rank     rank 1 on ") for line in lines)
    assert any(line.startswith("slowest rank  rank 1 on ") for line in lines)
    assert any(line.startswith("slowest link  ") for line in lines)
    assert next(line for line in lines if line.startswith("verdict")).split()[1:3] == ["slow", "rank,"]
    assert not (tmp_path / "run/doctor").exists()


def test_another_version_on_one_rank_is_refused(tmp_path: Path) -> None:
    outcome = command(tmp_path, *DOCTOR, "parallel=tp2", PYTHONPATH=str(FAULTS), FAULT="version:1")
    assert outcome.code == 2, outcome.err
    assert "measuring" not in outcome.out
    (line,) = outcome.err.splitlines()
    assert line.startswith("tptrain: torch is 2.")
    assert " on rank 0 (" in line
    assert " and 1.0.0 on rank 1 (" in line
    assert line.endswith("install the same version on every rank")
    assert not (tmp_path / "run").exists()


def test_one_rank_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the command's own process; a run that is in the folder already keeps its files."""
    (tmp_path / "config.yaml").write_text("of a training")
    monkeypatch.setattr("tptrain.doctor.judge.STORE_DISK_BYTES", 0)
    config = small_config(doctor__slow_rank=0.99, data__store_dir=str(tmp_path / "stores"))
    monkeypatch.setattr(environment, "set_up", lambda config, place: None)
    consult.doctor(config, tmp_path, None)
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert (len(found["ranks"]), found["links"], found["findings"], found["slowest_rank"]) == (1, [], [], None)
    assert found["ranks"][0]["matmul_flops_per_second"]["fp32"] > 0
    assert (tmp_path / "config.yaml").read_text() == "of a training"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "doctor.json"]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["verdict", "all", "well"]


@pytest.mark.parametrize(("key", "value"), [("doctor__slow_rank", 0.0), ("doctor__slow_link", 1.0)])
def test_limits_are_shares(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key.replace("__", r"\.")):
        small_config(**{key: value})
