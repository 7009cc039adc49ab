"""The weights of a Hugging Face folder: into a rank's parameters, and out of a checkpoint. All of them fp32 here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tptrain.checkpoint.hugging_face.folder import INDEX_FILE, ONE_FILE, open_folder
from tptrain.checkpoint.hugging_face.mapping import Place, places, tensor_shapes
from tptrain.checkpoint.sharded import check_whole, load_whole
from tptrain.config import ModelConfig
from tptrain.files import write_atomically
from tptrain.tensor_parallel.parameter import local_part

_FP32_BYTES = 4


@torch.no_grad()
def load_weights(path: str, model: ModelConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Fill this rank's parameters from a folder that `check_folder` has passed, reading no more than the rank holds.

    parameters: DTensors of any layout by their names in the whole model, of which one may come twice.
    """
    folder, table = open_folder(path), places(model)
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for name, parameter in parameters:
            place = table[name]
            tensor = folder.name_of(place.tensor)
            file = folder.files[tensor]
            if file not in files:
                files[file] = stack.enter_context(safe_open(file, framework="pt"))
            assert isinstance(parameter, DTensor), f"{name} has no label"
            (own,) = parameter.__create_chunk_list__()  # offsets and sizes of the local part
            if 0 in own.sizes:
                continue  # more ranks than rows
            values = files[file].get_slice(tensor)[place.region(own.offsets, own.sizes)]
            local_part(parameter).copy_(values.T if place.transposed else values)


def write_weights(checkpoint: Path, model: ModelConfig, folder: Path, max_shard_bytes: int) -> int:
    """Write the weights of a checkpoint of any layout as safetensors, one file or several with an index. Returns their bytes.

    One process does it alone, and holds one file's tensors at a time, twice. A tensor larger than max_shard_bytes is a file by itself.
    """
    check_whole(checkpoint)
    parts: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places(model).items():
        parts.setdefault(place.tensor, []).append((name, place))
    sizes = {tensor: _FP32_BYTES * torch.Size(shape).numel() for tensor, shape in tensor_shapes(model).items()}
    shards = split(sizes, max_shard_bytes)
    files = [ONE_FILE] if len(shards) == 1 else [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        own = {name: torch.empty(place.shape) for tensor in tensors for name, place in parts[tensor]}
        load_whole(checkpoint, own)
        save_file({tensor: _assemble(parts[tensor], own) for tensor in tensors}, folder / file, metadata={"format": "pt"})
        _sync(folder / file)
    if len(files) > 1:
        names = {tensor: file for file, tensors in zip(files, shards, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": names}
        write_atomically(folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
    return sum(sizes.values())


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in runs whose sizes sum to at most `limit`, as long as no single one is above it.

    >>> split({"a": 3, "b": 2, "c": 9, "d": 1}, 5)
    [['a', 'b'], ['c'], ['d']]
    """
    runs: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not runs or used + size > limit:
            runs.append([])
            used = 0
        runs[-1].append(name)
        used += size
    return runs


def _assemble(parts: list[tuple[str, Place]], own: Mapping[str, Tensor]) -> Tensor:
    """The tensor that parameters lie in."""
    ordered = [own[name] for name, place in sorted(parts, key=lambda part: part[1].start)]
    whole = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
    return whole.T.contiguous() if parts[0][1].transposed else whole


def _sync(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
