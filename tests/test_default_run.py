"""`tptrain` with nothing more, as `make run` calls it: it must learn the text, not only run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.command import finish, start
from tptrain.data import TokenStore
from tptrain.monitor.metrics import read_metrics


@pytest.mark.timeout(900)
def test_the_default_run_learns_real_text(tmp_path: Path) -> None:
    """The held-out loss ends at least 1.0 nat a byte below the entropy of the same text's byte frequencies."""
    outcome = finish(start(tmp_path, "hydra.run.dir=run", "hardware=cpu"), timeout=800)
    assert outcome.code == 0, outcome.err
    (store,) = (tmp_path / "outputs/token_stores").glob("python_docs-*")
    counts = np.bincount(TokenStore.open(store).val.tokens[:])
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * np.log(frequencies)).sum()
    assert 2.5 < entropy < 4, "no text"
    losses = [record["val_loss"] for record in read_metrics(tmp_path / "run") if "val_loss" in record]
    assert losses[-1] < entropy - 1.0
    assert losses == sorted(losses, reverse=True)
    assert "The model writes:" in outcome.out
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))
