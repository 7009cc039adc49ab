"""The commands of the README, the docs and the config files are real: none is refused; and the README's make targets exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tptrain.cli import CONF, compose
from tptrain.config import Config, resolve
from tptrain.pipeline.load import load_schedule
from tptrain.verbs import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for line in page.read_text().splitlines()
    if re.match(r"^    (\$ )?tptrain", line) and not line.strip().startswith("tptrain:")
]
REFUSED = {"$ tptrain parallel.tp=3"}
"""What the docs show as refused."""
OPENINGS = [re.sub(r"^# @package.*\n", "", path.read_text()).splitlines()[0].removeprefix("# ") for path in CONF.rglob("*.yaml")]


def arguments(command: str) -> tuple[str, list[str]]:
    """The verb and the overrides of a command line, `torchrun ... -m tptrain` included."""
    words = shlex.split(command.removeprefix("$ "))
    after = words[words.index("tptrain") + 1 :]
    return (after[0], after[1:]) if after and after[0] in VERBS else ("train", after)


@pytest.mark.parametrize("command", sorted({*COMMANDS, *OPENINGS}))
def test_a_command_of_the_docs_is_not_refused(command: str) -> None:
    verb, overrides = arguments(re.split(" > |   ", command)[0])
    sweeps = "-m" in overrides
    overrides = [word for word in overrides if not word.startswith(("hydra", "-"))]
    config = compose([word.partition(",")[0] if sweeps else word for word in overrides], verb)
    assert isinstance(config, VERBS[verb].schema)
    if isinstance(config, Config) and command not in REFUSED:
        parallel = resolve(config).parallel
        if not parallel.schedule_is_file:
            load_schedule(parallel)


def test_the_two_commands_come_first_and_exist() -> None:
    code = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    ")]
    assert code[:2] == ["make run", "make test"]
    for command in code[:2]:
        planned = subprocess.run(["make", "--dry-run", command.split()[1]], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert ".venv/bin/" in planned


def test_the_tables_of_options_are_complete() -> None:
    for group in (path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"):
        row = next(line for line in README.splitlines() if line.startswith(f"| `{group.name}` |"))
        options = row.split("|")[-2].strip(" `").split()
        assert set(options) == {path.stem for path in group.glob("*.yaml")}


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
