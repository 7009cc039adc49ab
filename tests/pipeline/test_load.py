"""The schedule that a config names, and the refusal of files that hold none that fits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import small_config
from tptrain.config import ConfigError, ParallelConfig
from tptrain.pipeline.actions import with_transfers
from tptrain.pipeline.load import load_schedule
from tptrain.pipeline.notation import dumps
from tptrain.pipeline.schedules import SCHEDULES, one_forward_one_backward, zb_v

STAGES = {"gpipe": 2, "1f1b": 1, "interleaved": 2, "zb_h1": 1, "zb_v": 2}


def parallel(schedule: str, **changes: object) -> ParallelConfig:
    """Of a resolved config."""
    return small_config(
        parallel__pp=2, parallel__schedule=schedule, **{f"parallel__{key}": value for key, value in changes.items()}
    ).parallel


def file_of(folder: Path, text: str | bytes) -> str:
    path = folder / "mine.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_named_schedule(name: str) -> None:
    asked = parallel(name, stages_per_rank=STAGES[name])
    assert load_schedule(asked) == with_transfers(SCHEDULES[name](2, STAGES[name], 4))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_file_with_the_same_schedule(name: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, "# mine\n" + dumps(SCHEDULES[name](2, STAGES[name], 4)))
    assert load_schedule(parallel(path, stages_per_rank=STAGES[name])) == load_schedule(parallel(name, stages_per_rank=STAGES[name]))


GOOD = dumps(one_forward_one_backward(2, 1, 4))
NAMES = "or use one of gpipe, 1f1b, interleaved, zb_h1, zb_v"
REFUSED = {
    "no computation": ("# nothing\n", 1, f"holds no computation: mend the file, {NAMES}"),
    "a word": (GOOD.replace("0F1", "0G1"), 1, "is no schedule (line 1, word 2: '0G1' is not a stage, one of F, B, I, W, and a micro-batch, "
               f"as in 0F0): mend the file, {NAMES}"),
    "bytes": (b"0F0 \xff", 1, f"is no UTF-8 text (byte 4): give the path of a text file, {NAMES}"),
    "fewer ranks": (dumps(one_forward_one_backward(1, 1, 4)), 1, f"holds 1 rank, but parallel.pp=2: use parallel.pp=1, {NAMES}"),
    "more ranks": (dumps(one_forward_one_backward(3, 1, 4)), 1, f"holds 3 ranks, but parallel.pp=2: use parallel.pp=3, {NAMES}"),
    "fewer stages": (GOOD, 2, f"has 1 stage a rank, but parallel.stages_per_rank=2: use parallel.stages_per_rank=1, {NAMES}"),
    "more stages": (dumps(zb_v(2, 2, 4)), 1,
                    f"has 2 stages a rank, but parallel.stages_per_rank=1: use parallel.stages_per_rank=2, {NAMES}"),
    "uneven stages": ("0F0 0B0\n1F0 2F0 2B0 1B0", 1, f"gives rank 0 1 stage and rank 1 2: give every rank as many, {NAMES}"),
    "fewer micro-batches": (dumps(one_forward_one_backward(2, 1, 1)), 1,
                            f"holds 1 micro-batch, but parallel.micro_batches=4: use parallel.micro_batches=1, {NAMES}"),
    "more micro-batches": (dumps(one_forward_one_backward(2, 1, 5)), 1,
                           f"holds 5 micro-batches, but parallel.micro_batches=4: use parallel.micro_batches=5, {NAMES}"),
    "a backward missing": (GOOD.replace(" 1B2", ""), 1, f"cannot run (rank 1: 1B2 is missing): mend the file, {NAMES}"),
    "no forward": ("0B0\n1B0", 1, f"has 0 stages a rank, but parallel.stages_per_rank=1: mend the file, {NAMES}"),
    "an order": ("0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3\n1F0 1F1 1B2 1F2 1F3 1B0 1B1 1B3", 1,
                 f"cannot run (rank 1, position 2: 1B2 stands before its forward): mend the file, {NAMES}"),
    "a cycle": ("0F0 0B0 0F1 0F2 0F3 0B1 0B2 0B3\n1F0 1F1 1B0 1F2 1F3 1B1 1B2 1B3", 1,
                "cannot run (rank 0, position 1: 0B0 waits for ever: rank 1, which makes its input in stage 1, waits for others in turn): "
                f"mend the file, {NAMES}"),
    "a far stage": (GOOD.replace("1F", "999999F").replace("1B", "999999B"), 1,
                    f"cannot run (stage 1 has no forward on any rank): mend the file, {NAMES}"),
    "a far micro-batch": (GOOD.replace("F3", "F7").replace("B3", "B7"), 1,
                          "cannot run (rank 0, position 5: 0F7 is of a micro-batch that does not exist: there are 4, counted from 0): "
                          f"mend the file, {NAMES}"),
    "stage 0 elsewhere": ("\n".join(reversed(GOOD.splitlines())), 1,
                          f"has stage 0 on rank 1, but the inputs are on rank 0: give stage 0 to rank 0, {NAMES}"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(name: str, tmp_path: Path) -> None:
    text, stages, rest = REFUSED[name]
    path = file_of(tmp_path, text)
    with pytest.raises(ConfigError) as refusal:
        load_schedule(parallel(path, stages_per_rank=stages))
    assert str(refusal.value) == f"parallel.schedule={path} {rest}"


def test_the_last_stage_between_the_ends(tmp_path: Path) -> None:
    path = file_of(tmp_path, "0F0 0B0\n2F0 2B0\n1F0 1B0\n")
    asked = small_config(parallel__pp=3, parallel__schedule=path, parallel__micro_batches=1, train__global_batch_size=2).parallel
    with pytest.raises(ConfigError) as refusal:
        load_schedule(asked)
    rule = "has the last stage, 2, on rank 1, but the targets are on the first and the last rank"
    assert str(refusal.value) == f"parallel.schedule={path} {rule}: give it to rank 0 or 2, {NAMES}"


def test_neighbouring_stages_far_apart(tmp_path: Path) -> None:
    """No connection is made between ranks that are no neighbours on the ring."""
    path = file_of(tmp_path, "0F0 5F0 5B0 0B0\n2F0 6F0 6B0 2B0\n1F0 3F0 3B0 1B0\n4F0 7F0 7B0 4B0\n")
    asked = small_config(
        parallel__pp=4, parallel__schedule=path, parallel__stages_per_rank=2, parallel__micro_batches=1, train__global_batch_size=2,
        model__num_layers=8,
    ).parallel  # fmt: skip
    with pytest.raises(ConfigError) as refusal:
        load_schedule(asked)
    rule = "has stages 0 and 1 on ranks 0 and 2, which are no neighbours on the ring of ranks"
    assert str(refusal.value) == f"parallel.schedule={path} {rule}: give them to neighbours, {NAMES}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    with pytest.raises(ConfigError) as refusal:
        load_schedule(parallel(str(path)))
    assert str(refusal.value) == f"parallel.schedule={path} is no file: give the path of one, {NAMES}"
    path.mkdir()
    with pytest.raises(ConfigError) as refusal:
        load_schedule(parallel(str(path)))
    assert str(refusal.value) == f"parallel.schedule={path} cannot be read (Is a directory): give the path of a text file, {NAMES}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = file_of(tmp_path, GOOD)
    os.chmod(path, 0)
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\)"):
        load_schedule(parallel(path))
