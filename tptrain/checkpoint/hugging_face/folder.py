"""A folder that `transformers` saved: its config.json and the headers of its safetensors, compared with a model. Knows no torch.

Nothing is unpickled, and no weight is read here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.checkpoint.hugging_face.mapping import PREFIXES, tensor_shapes
from tptrain.checkpoint.hugging_face.model_config import UnsupportedConfig, from_hugging_face
from tptrain.config import ConfigError, ModelConfig, refuse
from tptrain.config_error import as_text

KEY = "train.init_from"
CONFIG_FILE, ONE_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_NO_WEIGHTS = re.compile(r".*(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)")
"""Constants that earlier versions saved among the weights."""


@dataclass(frozen=True)
class HFFolder:
    """What a folder says of itself."""

    path: Path
    config: dict[str, Any]
    """Its config.json."""
    files: dict[str, Path]
    """The file of each tensor."""

    @property
    def family(self) -> str:
        """Its `model_type`."""
        return str(self.config.get("model_type"))

    def name_of(self, tensor: str) -> str:
        """What a tensor of `mapping` is called here."""
        short = tensor.removeprefix(PREFIXES[self.family])
        return short if tensor not in self.files and short in self.files else tensor


def open_folder(path: str) -> HFFolder:
    """The folder, with neither its sizes nor its weights looked at. Raises ConfigError where it is none that can be read."""
    folder = Path(path).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        rule = f"has no {CONFIG_FILE}" if folder.is_dir() else "is no folder"
        raise refuse(KEY, path, rule, "use a folder that save_pretrained of transformers wrote, or null")
    config = _read_json(folder / CONFIG_FILE, path)
    if (folder / ONE_FILE).is_file():
        return HFFolder(folder, config, dict.fromkeys(_headers(folder / ONE_FILE, path), folder / ONE_FILE))
    if not (folder / INDEX_FILE).is_file():
        remedy = "save it again with save_pretrained of transformers 4.35 or later"
        raise refuse(KEY, path, f"has neither {ONE_FILE} nor {INDEX_FILE}", remedy)
    names = _read_json(folder / INDEX_FILE, path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) and Path(name).name == name for name in names.values()):
        raise _damaged(path, f"{INDEX_FILE} has no weight_map from tensors to files beside it")
    return HFFolder(folder, config, {tensor: folder / name for tensor, name in names.items()})


def check_folder(path: str, model: ModelConfig) -> None:
    """Whether a model can start from a folder's weights, by config.json and the files' headers. Raises ConfigError.

    The line names a tensor with both shapes, and the keys of `model` that would fit.
    """
    folder = open_folder(path)
    try:
        wanted = from_hugging_face(folder.config)
    except UnsupportedConfig as error:
        rule = f"is a model that tptrain has not ({error})"
        raise refuse(KEY, path, rule, "use a GPT-2 or a Llama without such options") from error
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(set(folder.files.values())):
        found |= {name: header for name, header in _headers(file, path).items() if folder.files.get(name) == file}
    differing = {key: value for key, value in wanted.items() if _own(model, key) != value}
    if differing:
        remedy = " ".join(f"model.{key}={as_text(value)}" for key, value in differing.items())
        raise refuse(KEY, path, _difference(folder, model, found, differing), f"use {remedy}")
    _check_tensors(folder, model, found, path)


def _own(model: ModelConfig, key: str) -> object:
    return model.kv_heads if key == "num_kv_heads" else getattr(model, key)


def _difference(folder: HFFolder, model: ModelConfig, found: dict[str, tuple[str, tuple[int, ...]]], differing: dict[str, Any]) -> str:
    """What is said of a model with other keys: of the first tensor that has another shape, else of the first key."""
    family = {key for key in ("position", "norm", "activation", "bias") if key in differing}
    if not family:
        for tensor, shape in tensor_shapes(model).items():
            _, theirs = found.get(folder.name_of(tensor), ("", shape))
            if theirs != shape:
                return f"holds another model: {tensor} is {list(theirs)}, and this model has {list(shape)}"
    key, value = next(iter(differing.items()))
    embedding = folder.name_of({"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}[folder.family])
    _, shape = found.get(embedding, ("", ()))
    kind = f"is a {folder.family} ({embedding} {list(shape)})" if family else "holds another model"
    return f"{kind}: its {key} is {as_text(value)}, and this model's is {as_text(_own(model, key))}"


def _check_tensors(folder: HFFolder, model: ModelConfig, found: dict[str, tuple[str, tuple[int, ...]]], path: str) -> None:
    """Whether the files hold what config.json says, and nothing else."""
    shapes = {folder.name_of(tensor): shape for tensor, shape in tensor_shapes(model).items()}
    for name, shape in shapes.items():
        if name not in found:
            raise _damaged(path, f"no file has {name} {list(shape)}")
        dtype, theirs = found[name]
        if theirs != shape:
            raise _damaged(path, f"{name} is {list(theirs)}, but {CONFIG_FILE} makes it {list(shape)}")
        if dtype not in _DTYPES:
            raise _damaged(path, f"{name} is of type {dtype}, not one of {', '.join(_DTYPES)}")
    tied = {"lm_head.weight"} if model.tie_embeddings else set()
    more = [name for name in found if name not in shapes and name not in tied and not _NO_WEIGHTS.fullmatch(f".{name}")]
    if more:
        raise _damaged(path, f"{more[0]} {list(found[more[0]][1])} has no place in a {folder.family}")


def _headers(file: Path, path: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of the tensors of a file. Raises ConfigError where it cannot be read, also where it is cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, f"{file.name} cannot be read ({' '.join(str(error).split())})") from error


def _read_json(file: Path, path: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{file.name} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"{file.name} holds no object")
    return content


def _damaged(path: str, what: str) -> ConfigError:
    return refuse(KEY, path, f"is damaged: {what}", "save it again with save_pretrained")
