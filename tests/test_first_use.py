"""The very first `tptrain` of somebody whose container has no home directory, no right to the package, and a terminal of 60 columns."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tptrain.environment import give_home

COLUMNS = 60
USER = 54321
"""A user that no list of users has."""
PROJECT = Path(__file__).parents[1]
SHORT = ["train.max_steps=3", "train.log_every=1", "train.eval_steps=1", "train.sample_tokens=40", "hydra.run.dir=run"]


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder to which every user finds the way, as they do not to pytest's."""
    with tempfile.TemporaryDirectory(prefix="first-use-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="becomes another user")
def test_a_first_run_without_home_or_rights_on_a_narrow_terminal(open_path: Path) -> None:
    package, folder, tmp = open_path / "package", open_path / "work", open_path / "tmp"
    for name in ("tptrain", "conf"):
        shutil.copytree(PROJECT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(package.rglob("*"))
    for own in (folder, tmp):
        own.mkdir()
        os.chown(own, USER, USER)
    code, shown = run_on_terminal(folder, tmp, package, "tptrain", *SHORT)
    assert code == 0, shown
    assert "Traceback" not in shown
    assert "arning" not in shown
    assert "The model writes:" in shown

    wide = [line for line in lines_of(shown) if len(line) > COLUMNS]
    assert not [line for line in wide if len(line.split()) > 1], "only a path may be so long"
    assert list((folder / "run/wandb").glob("offline-run-*/run-*.wandb")), "W&B needs somewhere for its settings"
    assert sorted(path.name for path in folder.iterdir()) == ["outputs", "run"]
    assert sorted(package.rglob("*")) == before
    left = {path.name for path in tmp.iterdir()}
    assert left <= {f"tptrain-{USER}", f"torchinductor_uid_{USER}"}, "caches, and nothing temporary"


def test_who_has_no_home_gets_a_place_for_caches_of_his_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", nowhere)
    give_home()
    place = tmp_path / f"tptrain-{os.getuid()}"
    assert (os.environ["HOME"], os.environ["XDG_CACHE_HOME"]) == (str(place), str(place / "cache"))
    assert place.stat().st_mode & 0o777 == 0o700

    place.rmdir()
    place.symlink_to("/")  # somebody else was there first
    monkeypatch.delenv("XDG_CACHE_HOME")
    give_home()
    assert Path(os.environ["HOME"]).parent == tmp_path
    assert os.environ["HOME"] != str(place)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    give_home()
    assert "XDG_CACHE_HOME" not in os.environ, "who has a home keeps it"


def run_on_terminal(folder: Path, tmp: Path, package: Path, *command: str) -> tuple[int, str]:
    """The exit code of `python -m ...` in a folder, and all that a terminal of 60 columns got.

    It can read what root can, since Python itself may lie in root's home, but write only what everybody can.
    """
    drop = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--inh-caps=+dac_read_search"]
    drop += ["--ambient-caps=+dac_read_search", "env", "-i", "PATH=/usr/bin:/bin", "TERM=xterm", f"TMPDIR={tmp}", f"PYTHONPATH={package}"]
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    child = subprocess.Popen(
        [*drop, sys.executable, "-m", *command], cwd=folder, stdin=follower, stdout=follower, stderr=follower, start_new_session=True
    )
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # the child closed its end
        pass
    finally:
        os.close(leader)
    return child.wait(60), shown.decode()


def lines_of(shown: str) -> list[str]:
    """What stood on a line at any time: the parts between line ends, returns and moves of the cursor."""
    parts = re.split(r"[\r\n]|\x1b\[\d*[A-HJK]", shown)
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part).rstrip() for part in parts]
