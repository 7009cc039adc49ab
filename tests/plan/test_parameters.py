"""Parameters of a rank by formula, against the modules themselves, built without memory: every shipped model under every shipped layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support import small_config
from tptrain.cli import CONF
from tptrain.config import Config, ConfigError, ModelConfig, ParallelConfig, resolve
from tptrain.data_parallel import DataParallel, dp_dimension
from tptrain.mesh import Mesh, build_mesh
from tptrain.model.gpt import GPTStage
from tptrain.pipeline.actions import placement
from tptrain.plan.parameters import rank_parameters
from tptrain.plan.pipeline import schedule_of, stage_layers
from tptrain.tensor_parallel.parameter import local_part

META = torch.device("meta")
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
LAYOUTS = sorted(path.stem for path in (CONF / "parallel").glob("*.yaml"))
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"dp": 2}, {"dp": 3}, {"schedule": "interleaved"}, {"schedule": "zb_v", "dp": 2})
"""Each layout as it is shipped, and changed."""


@contextmanager
def without_peers(rank: int, world: int) -> Iterator[None]:
    """This process as one rank of many, of which there are no others."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def read(group: str, name: str) -> dict[str, Any]:
    """The values of a shipped file, with those that it starts from."""
    values = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
    based = [other for other in values.pop("defaults", []) if other != "_self_"]
    return {key: value for other in based for key, value in read(group, other).items()} | values


def admitted(model: str, tp: int) -> Iterator[tuple[Config, list[tuple[int, int]]]]:
    """The model under every layout of `tp` that it can have, with the layers of each stage."""
    base = replace(small_config(), model=ModelConfig(**read("model", model)))
    base.train.global_batch_size = None
    for values in (read("parallel", name) for name in LAYOUTS):
        for change in VARIANTS if values["tp"] == tp else ():
            parallel = ParallelConfig(**values | {"micro_batches": values["pp"]} | change)
            try:
                config = resolve(replace(base, parallel=parallel))
            except ConfigError:
                continue
            yield config, stage_layers(config, placement(schedule_of(config)))


Alike = list[tuple[nn.Parameter, int]]
"""One of the parameters that are alike, and how many they are."""


def alike(module: nn.Module) -> Alike:
    """A module's parameters, whole, by shape and split."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        assert isinstance(parameter, DTensor)
        groups.setdefault((tuple(parameter.shape), parameter.placements), []).append(parameter)
    return [(group[0], len(group)) for group in groups.values()]


def kept(parameters: Alike, dp: int, dp_rank: int) -> int:
    """Elements of parameters on one rank of dp: parts as `fully_shard` cuts them."""
    elements = 0
    for parameter, count in parameters:
        parts = local_part(parameter).chunk(dp, dp_dimension(parameter, dp))
        elements += count * parts[dp_rank].numel() if dp_rank < len(parts) else 0
    return elements


def ranks_that_differ(model: ModelConfig, tp: int) -> set[int]:
    """All of a small model; of a large one the first, and the last where a size does not divide."""
    if model.name.endswith("tiny"):
        return set(range(tp))
    return {0} if model.vocab_size % tp == model.kv_heads % tp == 0 else {0, tp - 1}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_shipped_model_under_every_shipped_layout(tp: int) -> None:
    """The counts of equal stages are taken once."""
    wanted = {model: list(admitted(model, tp)) for model in MODELS}
    compared = set()
    for tp_rank in range(tp):
        with without_peers(tp_rank, tp):
            mesh = DeviceMesh("cpu", list(range(tp)))
            for model, configs in wanted.items():
                built: dict[tuple[int, bool, bool], Alike] = {}
                for config, stages in configs:
                    for first, last in stages if tp_rank in ranks_that_differ(config.model, tp) else ():
                        like, dp = (last - first, first == 0, last == config.model.num_layers), int(config.parallel.dp)
                        if (case := (model, tp_rank, like, dp)) not in compared:
                            compared.add(case)
                            if like not in built:
                                built[like] = alike(GPTStage(config.model, first, last, mesh, META))
                            for dp_rank in {0, dp - 1}:
                                found = rank_parameters(config, first, last, tp_rank, dp_rank)
                                assert found == kept(built[like], dp, dp_rank), case
    assert {model for model, *_ in compared} == {model for model in MODELS if read("model", model)["num_heads"] % tp == 0}
    assert {dp for *_, dp in compared} >= {1, 2, 3}


SMALL: dict[str, ModelConfig] = {
    "gpt": small_config(model__num_layers=2).model,
    "untied": small_config(model__num_layers=2, model__tie_embeddings=False, model__bias=False, model__hidden_size=36).model,
    "llama": small_config(
        model__num_layers=2, model__num_kv_heads=2, model__norm="rmsnorm", model__activation="swiglu", model__position="rope",
        model__bias=False,
    ).model,
}  # fmt: skip


@pytest.mark.parametrize(("tp", "dp"), [(1, 2), (1, 3), (2, 2), (4, 3), (4, 8)])
def test_as_fully_shard_cuts_them(tp: int, dp: int) -> None:
    """Of odd sizes: 257 rows, and dp that divides nothing."""
    for rank in (0, tp - 1, tp * (dp - 1), tp * dp - 1):
        with without_peers(rank, tp * dp):
            config = small_config(parallel__tp=tp, parallel__dp=dp, parallel__micro_batch_size=1, train__global_batch_size=None)
            mesh: Mesh = build_mesh(config.parallel, torch.device("cpu"), 60)
            for model in SMALL.values():
                stage = GPTStage(model, 0, model.num_layers, mesh.tp, torch.device("cpu"))
                DataParallel(stage, list(stage.layers.values()), mesh, torch.float32)
                held = sum(local_part(parameter).numel() for parameter in stage.parameters())
                assert rank_parameters(replace(config, model=model), 0, model.num_layers, rank % tp, rank // tp) == held
