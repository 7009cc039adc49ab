"""The same versions on all ranks, or one line that says who has which. Ranks are threads with a store in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from torch.distributed import HashStore

from tptrain.config import ConfigError
from tptrain.doctor import versions
from tptrain.doctor.versions import CODE, Told, agree, code_hash, mismatch, own_versions


def told(*values: dict[str, str | None]) -> list[Told]:
    return [Told(rank, f"host-{rank // 2}", each) for rank, each in enumerate(values)]


def test_the_versions_are_those_that_are_installed() -> None:
    found = own_versions()
    assert found["torch"] == metadata.version("torch")
    assert found["datasets"] == metadata.version("datasets")
    assert len(found[CODE] or "") == 12


def test_a_hash_of_the_code_sees_every_file_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.py").write_text("1")
    hashes = [code_hash(tmp_path)]
    for change in (
        lambda: (tmp_path / "inner/b.py").write_text("2"),
        lambda: (tmp_path / "inner/b.py").write_text("3"),
        lambda: (tmp_path / "inner/b.py").rename(tmp_path / "inner/c.py"),
    ):
        change()
        hashes.append(code_hash(tmp_path))
    assert len(set(hashes)) == 4
    (tmp_path / "notes.txt").write_text("no code")
    assert code_hash(tmp_path) == hashes[-1]


@pytest.mark.parametrize(
    ("versions", "line"),
    [
        ([{"torch": "2.13"}] * 4, ""),
        (
            [{"torch": "2.13"}, {"torch": "2.13"}, {"torch": "2.12"}, {"torch": "2.13"}],
            "torch is 2.13 on ranks 0, 1, 3 (host-0, host-1) and 2.12 on rank 2 (host-1): install the same version on every rank",
        ),
        (
            [{"a": "1", "b": None, "c": "5"}, {"a": "2", "b": "4", "c": "5"}],
            "a is 1 on rank 0 (host-0) and 2 on rank 1 (host-0); b differs too: install the same version on every rank",
        ),
        (
            [{CODE: "aaa", "b": "1", "c": None}, {CODE: "bbb", "b": "2", "c": "5"}],
            "tptrain's code is aaa on rank 0 (host-0) and bbb on rank 1 (host-0); b and c differ too: run the same code on every rank",
        ),
        ([{"c": None}, {"c": "5"}], "c is missing on rank 0 (host-0) and 5 on rank 1 (host-0): install the same version on every rank"),
    ],
)
def test_who_has_which(versions: list[dict[str, str | None]], line: str) -> None:
    assert mismatch(told(*versions)) == line


def outcomes(ranks: int, call: Callable[[int], None]) -> list[str]:
    """What each rank's call raises, as text."""
    found = [""] * ranks

    def run(rank: int) -> None:
        try:
            call(rank)
        except (ConfigError, RuntimeError) as error:
            found[rank] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_every_rank_refuses_with_the_same_line(monkeypatch: pytest.MonkeyPatch) -> None:
    store, has = HashStore(), threading.local()
    monkeypatch.setattr(versions, "own_versions", lambda: {"torch": has.torch})

    def ask(rank: int) -> None:
        has.torch = "2.12" if rank == 1 else "2.13"
        agree(store, rank, 3, 30)

    assert len(set(found := outcomes(3, ask))) == 1
    assert found[0].startswith("ConfigError: torch is 2.13 on ranks 0, 2 (")
    store = HashStore()
    assert outcomes(
        3, lambda rank: agree(store, 0 if rank == 0 else rank, 3, 30) if has.__setattr__("torch", "2.13") is None else None
    ) == [
        "",
        "",
        "",
    ]


def test_a_rank_that_does_not_come_is_named() -> None:
    assert outcomes(1, lambda rank: agree(HashStore(), 0, 2, 0.5)) == [
        "RuntimeError: timed out: rank 1 did not come within launch.timeout_seconds=0.5"
    ]
