"""The example of a W&B sweep: the command that wandb's own agent makes of it is one that tptrain takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils

from tests.command import command
from tptrain.job import keys

SWEEP: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "docs/wandb_sweep.yaml").read_text())
CHOSEN = {"optimizer.lr": 0.0025, "lr_schedule.warmup_steps": 50, "model": "llama_tiny"}


def test_the_sweep_s_keys_are_those_of_the_config() -> None:
    assert SWEEP["parameters"].keys() == CHOSEN.keys()
    assert SWEEP["parameters"].keys() <= keys().keys()
    assert SWEEP["metric"]["name"] == "val_loss", "as in metrics.jsonl"


@pytest.mark.parametrize("model", SWEEP["parameters"]["model"]["values"])
def test_the_agent_s_command_is_taken(model: str, tmp_path: Path) -> None:
    chosen = {**CHOSEN, "model": model}
    arguments = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    line: list[str] = []
    for word in utils.create_sweep_command(SWEEP["command"]):
        line += arguments[word[2:-1]] if word.startswith("${") else [word]
    assert line[0] == SWEEP["program"] == "tptrain"
    outcome = command(tmp_path, *line[1:], "--cfg", "job")
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load(outcome.out)
    assert (config["optimizer"]["lr"], config["lr_schedule"]["warmup_steps"]) == (0.0025, 50)
    assert (config["model"]["name"], config["wandb"]["mode"], config["train"]["max_steps"]) == (model, "online", 200)
