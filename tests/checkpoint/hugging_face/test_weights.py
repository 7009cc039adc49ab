"""Weights from a folder of transformers under every kind of layout, and back: the same bits, the same logits, no more read than held."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from tests.checkpoint.hugging_face.models import VOCAB, keys_of, tensors_of, their_model
from tests.ranks import run_ranks
from tests.saving import save_now, start_from
from tests.support import skewed_tokens, small_config
from tptrain.config import Config
from tptrain.export import export
from tptrain.export_config import ExportConfig
from tptrain.generate_config import GenerateCheckpointConfig
from tptrain.job import Job
from tptrain.mesh import build_mesh
from tptrain.trained_stage import load_stage

LAYOUTS: list[dict[str, Any]] = [
    {"tp": 2, "pp": 2}, {"dp": 4}, {"tp": 4}, {"pp": 2, "dp": 2, "schedule": "interleaved"},
    {"tp": 2, "dp": 2},
]  # fmt: skip
BOTH = [("gpt2", True), ("llama", False)]
ALL = [("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False)]
CPU = torch.device("cpu")


def save_theirs(folder: Path, family: str, tied: bool, **more: Any) -> Path:
    """A folder of several files."""
    path = folder / f"{family}-{tied}"
    their_model(family, tied, **more).save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


def trainer_of(config: Config) -> Any:
    from tptrain.data.dataset import Data
    from tptrain.trainer import Trainer

    return Trainer(config, build_mesh(config.parallel, CPU, 60), Data.of_tokens(config, skewed_tokens(2000, VOCAB)))


def parallel_keys(layout: dict[str, Any]) -> dict[str, Any]:
    return {f"parallel__{key}": value for key, value in layout.items()}


class Counting:
    """`safe_open` that lends slices alone, and counts their elements."""

    elements = 0

    def __init__(self, file: Path, framework: str) -> None:
        import safetensors

        self.opened = safetensors.safe_open(file, framework=framework)

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def get_slice(self, name: str) -> Counting:
        lent = Counting.__new__(Counting)
        lent.slice = self.opened.get_slice(name)
        return lent

    def __getitem__(self, region: Any) -> torch.Tensor:
        values: torch.Tensor = self.slice[region]
        Counting.elements += values.numel()
        return values


def read_under_layouts(rank: int, folder: Path) -> None:
    """Every parameter under every layout is the right part of the right tensor, and no rank reads more than it holds."""
    from safetensors import safe_open

    from tptrain.checkpoint.hugging_face import weights
    from tptrain.checkpoint.hugging_face.mapping import places

    for family, tied in BOTH:
        path = folder / f"{family}-{tied}"
        whole = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                whole |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for layout in LAYOUTS:
            config = small_config(**keys_of(family, tied), **parallel_keys(layout))
            trainer = trainer_of(config)
            table = places(config.model)
            Counting.elements = 0
            with mock.patch.object(weights, "safe_open", Counting):
                weights.load_weights(str(path), config.model, trainer.share.named_parameters())
            held = 0
            for name, parameter in trainer.share.named_parameters():
                held += parameter.to_local().numel()
                place = table[name]
                tensor = whole[place.tensor]
                tensor = tensor.T if place.transposed else tensor
                expected = tensor[place.start : place.start + place.shape[0]]
                assert torch.equal(parameter.detach().full_tensor(), expected), (family, layout, name)
            assert Counting.elements == held, (family, layout)


def test_any_layout_starts_from_a_folder_reading_what_it_holds(tmp_path: Path) -> None:
    for family, tied in BOTH:
        save_theirs(tmp_path, family, tied)
    run_ranks(4, read_under_layouts, tmp_path)


def start_and_save(rank: int, folder: Path) -> None:
    """From each folder, under tp2_pp2: a checkpoint at once, and one after two steps."""

    for family, tied in ALL:
        config = small_config(**keys_of(family, tied), **parallel_keys(LAYOUTS[0]), train__init_from=str(folder / f"{family}-{tied}"))
        trainer = trainer_of(config)
        run_dir = folder / f"{family}-{tied}-run"
        start_from(trainer, run_dir)
        save_now(trainer, run_dir)
        trainer.step()
        trainer.step()
        save_now(trainer, run_dir)
        if rank == 0:
            Job("train", config, run_dir, run_dir).save()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all four models, and the run that started from each."""
    folder = tmp_path_factory.mktemp("runs")
    for family, tied in ALL:
        save_theirs(folder, family, tied)
    run_ranks(4, start_and_save, folder)
    return folder


def exported(runs: Path, family: str, tied: bool, step: int, to: Path, max_shard_bytes: int = 30_000) -> Path:
    checkpoint = GenerateCheckpointConfig(f"step-{step:08d}")
    export(ExportConfig(str(runs / f"{family}-{tied}-run"), str(to), max_shard_bytes, checkpoint))
    return to


@pytest.mark.parametrize(("family", "tied"), ALL)
def test_in_and_out_again_are_the_same_bytes(runs: Path, family: str, tied: bool, tmp_path: Path) -> None:
    again = exported(runs, family, tied, 0, tmp_path / "again")
    assert tensors_of(again) == tensors_of(runs / f"{family}-{tied}")
    index = json.loads((again / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(path.name for path in again.glob("*.safetensors"))
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors_of(again).values())
    for file in files:  # a single tensor may be larger
        assert (again / file).stat().st_size < 30_000 + 2_000 or list(index["weight_map"].values()).count(file) == 1

    alone = exported(runs, family, tied, 0, tmp_path / "alone", 10**9)
    assert [path.name for path in alone.glob("*.safetensors*")] == ["model.safetensors"]
    assert tensors_of(alone) == tensors_of(again)


@pytest.mark.parametrize(("family", "tied"), ALL)
def test_logits_of_transformers_equal_ours(runs: Path, family: str, tied: bool, tmp_path: Path) -> None:
    """After two steps, so that no tensor is what it was in the folder that the run started from."""
    from transformers import AutoModelForCausalLM

    folder = exported(runs, family, tied, 2, tmp_path / "model")
    before = tensors_of(runs / f"{family}-{tied}")
    assert not [name for name, values in tensors_of(folder).items() if values == before[name]]
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}
    run_dir = runs / f"{family}-{tied}-run"
    config: Config = Job.load("train", run_dir, run_dir).config
    tokens = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(1))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = build_mesh(replace(config.parallel, tp=1, pp=1), CPU, 60)
        stage = load_stage(config, run_dir / "checkpoints" / "step-00000002", mesh)
        with torch.no_grad():
            assert_close(theirs.eval()(tokens).logits, stage(tokens), rtol=0, atol=1e-4)
    finally:
        dist.destroy_process_group()
