"""The wheel works outside the repository."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

from tests.support import SMALL

ROOT = Path(__file__).parents[1]


def test_the_wheel_trains_outside_the_repository(tmp_path: Path) -> None:
    """Built, installed beside nothing but its requirements, run from an empty folder.

    The requirements are this environment's, by a path file: they are not what is tested, and installing torch takes minutes.
    """
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("tptrain-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "tptrain/conf/config.yaml" in names
    assert not [name for name in names if name.startswith(("tests/", "outputs/", "conf/"))]

    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env/bin/python"
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*arguments: str) -> str:
        return subprocess.run([python, *arguments], check=True, capture_output=True, text=True, cwd=empty).stdout

    site = Path(run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    zipfile.ZipFile(wheel).extractall(site)
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert str(site) in run("-c", "import tptrain; print(tptrain.__file__)")
    assert "hidden_size: 2048" in run("-m", "tptrain", "--cfg", "job", "model=gpt_1b", "parallel=tp4_pp2")
    assert "done" in run("-m", "tptrain", *SMALL, "train.max_steps=5", "hydra.run.dir=run")
    assert (empty / "run/metrics.jsonl").is_file()
