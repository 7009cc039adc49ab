"""What a run says of its code."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from tptrain.monitor.facts import git_commit, versions


def test_versions_are_those_of_the_packages() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert {found[name] == metadata.version(name) for name in ("torch", "wandb", "numpy")} == {True}


def test_the_commit_is_git_s_and_says_that_files_differ(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", str(tmp_path), *settings, *words], capture_output=True, text=True, check=True).stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    assert git_commit(tmp_path) is None, "no commit yet"
    git("add", "file")
    git("commit", "--quiet", "-m", "first")
    git("tag", "v1")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{git('rev-parse', 'HEAD')}-dirty"
