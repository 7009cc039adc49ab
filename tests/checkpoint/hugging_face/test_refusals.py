"""What cannot be started from or exported: one line that names it, before a rank starts and before torch is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.hugging_face.models import keys_of, their_model
from tests.support import small_config
from tptrain.checkpoint.folder import STATE_FILE
from tptrain.checkpoint.hugging_face.folder import check_folder
from tptrain.config import ConfigError
from tptrain.export import export
from tptrain.export_config import ExportConfig
from tptrain.generate_config import GenerateCheckpointConfig
from tptrain.job import Job


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 in several files, one in a single file, and a Llama."""
    folder = tmp_path_factory.mktemp("saved")
    their_model("gpt2", True).save_pretrained(folder / "gpt2", max_shard_size="30KB")
    their_model("gpt2", True).save_pretrained(folder / "one")
    their_model("llama", False).save_pretrained(folder / "llama")
    return folder


def said_of(path: Path, family: str, tied: bool, **more: Any) -> str:
    with pytest.raises(ConfigError) as refusal:
        check_folder(str(path), small_config(**keys_of(family, tied, **more)).model)
    said = str(refusal.value)
    assert "\n" not in said
    assert said.startswith(f"train.init_from={path} ")
    return said.removeprefix(f"train.init_from={path} ")


def test_folders_that_fit(saved: Path, tmp_path: Path) -> None:
    for name in ("gpt2", "one"):
        check_folder(str(saved / name), small_config(**keys_of("gpt2", True)).model)
    check_folder(str(saved / "llama"), small_config(**keys_of("llama", False)).model)
    check_folder(str(saved / "llama"), small_config(**keys_of("llama", False, max_seq_len=99)).model)  # it has no weights for positions
    their_model("gpt2", True).transformer.save_pretrained(tmp_path)  # without a head, whose names have no prefix
    check_folder(str(tmp_path), small_config(**keys_of("gpt2", True)).model)


@pytest.mark.parametrize(
    ("name", "family", "tied", "more", "message"),
    [
        ("gpt2", "gpt2", True, {"vocab_size": 257},
         "holds another model: transformer.wte.weight is [259, 32], and this model has [257, 32]: use model.vocab_size=259"),
        ("gpt2", "gpt2", True, {"ffn_hidden_size": 128, "num_layers": 2},
         "holds another model: transformer.h.0.mlp.c_fc.weight is [32, 64], and this model has [32, 128]: "
         "use model.num_layers=4 model.ffn_hidden_size=64"),
        ("gpt2", "gpt2", True, {"max_seq_len": 32}, "holds another model: transformer.wpe.weight is [16, 32], and this model has [32, 32]: "
         "use model.max_seq_len=16"),
        ("gpt2", "gpt2", True, {"num_heads": 8}, "holds another model: its num_heads is 4, and this model's is 8: use model.num_heads=4 "
         "model.num_kv_heads=4"),
        ("gpt2", "gpt2", False, {},
         "holds another model: its tie_embeddings is true, and this model's is false: use model.tie_embeddings=true"),
        ("llama", "llama", False, {"norm_eps": 1e-6}, "holds another model: its norm_eps is 0.001, and this model's is 1e-06: "
         "use model.norm_eps=0.001"),
        ("llama", "llama", False, {"num_kv_heads": 1}, "holds another model: model.layers.0.self_attn.k_proj.weight is [16, 32], and this "
         "model has [8, 32]: use model.num_kv_heads=2"),
        ("llama", "gpt2", False, {}, "is a llama (model.embed_tokens.weight [259, 32]): its position is rope, and this model's is learned: "
         "use model.position=rope model.norm=rmsnorm model.activation=swiglu "),
        ("gpt2", "llama", True, {"norm_eps": 1e-5}, "is a gpt2 (transformer.wte.weight [259, 32]): its position is learned, and this "
         "model's is rope: use model.position=learned model.norm=layernorm model.activation=gelu model.bias=true model.num_kv_heads=4"),
    ],
    ids=str,
)  # fmt: skip
def test_another_model_is_named_with_the_keys_that_fit(
    saved: Path, name: str, family: str, tied: bool, more: dict[str, Any], message: str
) -> None:
    said = said_of(saved / name, family, tied, **more)
    assert said.startswith(message) if message.endswith(" ") else said == message


def edit_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return edit


def swap_two(index: dict[str, Any]) -> None:
    """Say of two tensors that each is in the other's file."""
    names = index["weight_map"]
    first, last = min(names, key=names.get), max(names, key=names.get)
    names[first], names[last] = names[last], names[first]


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no folder": ("one", lambda folder: shutil.rmtree(folder), "is no folder: use a folder that save_pretrained"),
    "no config": ("one", lambda folder: (folder / "config.json").unlink(), "has no config.json: use"),
    "no JSON": ("one", lambda folder: (folder / "config.json").write_text("{"), "is damaged: config.json cannot be read (Expecting"),
    "a list": ("one", lambda folder: (folder / "config.json").write_text("[]"), "is damaged: config.json holds no object"),
    "other model": ("one", edit_json("config.json", lambda c: c.update(model_type="bert")),
                    "is a model that tptrain has not (model_type=bert"),
    "other option": ("one", edit_json("config.json", lambda c: c.update(activation_function="relu")),
                     "is a model that tptrain has not (activation_function=relu): use"),
    "no size": ("one", edit_json("config.json", lambda c: c.pop("n_embd")), "is a model that tptrain has not (no n_embd)"),
    "no weights": ("one", lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
                   "has neither model.safetensors nor model.safetensors.index.json: save it again"),
    "cut": ("one", lambda folder: cut(folder / "model.safetensors"), "is damaged: model.safetensors cannot be read ("),
    "no tensor": ("one", edit_tensors(lambda t: t.pop("transformer.h.2.ln_1.bias")),
                  "is damaged: no file has transformer.h.2.ln_1.bias [32]"),
    "other shape": ("one", edit_tensors(lambda t: t.update({"transformer.h.2.ln_1.bias": torch.zeros(31)})),
                    "is damaged: transformer.h.2.ln_1.bias is [31], but config.json makes it [32]"),
    "integers": ("one", edit_tensors(lambda t: t.update({"transformer.h.2.ln_1.bias": torch.zeros(32, dtype=torch.int8)})),
                 "is damaged: transformer.h.2.ln_1.bias is of type I8"),
    "more": ("one", edit_tensors(lambda t: t.update({"transformer.h.2.gate.weight": torch.zeros(3)})),
             "is damaged: transformer.h.2.gate.weight [3] has no place in a gpt2"),
    "no file": ("gpt2", lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "is damaged: model-00002-of-000"),
    "no map": ("gpt2", edit_json("model.safetensors.index.json", lambda c: c.pop("weight_map")),
               "is damaged: model.safetensors.index.json has no weight_map"),
    "wrong map": ("gpt2", edit_json("model.safetensors.index.json", swap_two), "is damaged: no file has transformer."),
    "elsewhere": ("gpt2", edit_json("model.safetensors.index.json", lambda c: c.update(weight_map={"a": "../one/model.safetensors"})),
                  "is damaged: model.safetensors.index.json has no weight_map from tensors to files beside it"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder(saved: Path, tmp_path: Path, name: str) -> None:
    source, damage, message = DAMAGE[name]
    folder = tmp_path / "copy"
    shutil.copytree(saved / source, folder)
    check_folder(str(folder), small_config(**keys_of("gpt2", True)).model)
    damage(folder)
    assert said_of(folder, "gpt2", True).startswith(message)


def test_constants_among_the_weights_are_let_be(saved: Path, tmp_path: Path) -> None:
    """Masks, which earlier versions of transformers saved."""
    folder = tmp_path / "copy"
    shutil.copytree(saved / "one", folder)
    more = {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16), "transformer.h.0.attn.masked_bias": torch.zeros(1)}
    edit_tensors(lambda tensors: tensors.update(more))(folder)
    check_folder(str(folder), small_config(**keys_of("gpt2", True)).model)


# ---- export ------------------------------------------------------------------------------------------------


def a_run(folder: Path, **keys: Any) -> Path:
    """A run folder whose checkpoint is complete by name alone."""
    run_dir = folder / "run"
    config = small_config(**keys)
    checkpoint = run_dir / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE_FILE).write_text(json.dumps({"config": {"model": {}}}))
    Job("train", config, run_dir, run_dir).save()
    return run_dir


def ask(run_dir: Path, to: Path, load: str = "latest", size: int = 100) -> str:
    with pytest.raises(ConfigError) as refusal:
        export(ExportConfig(str(run_dir), str(to), size, GenerateCheckpointConfig(load)))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_refused_exports(tmp_path: Path) -> None:
    run_dir, to = a_run(tmp_path, **keys_of("gpt2", True)), tmp_path / "to"
    assert ask(tmp_path / "nope", to).startswith(f"run={tmp_path / 'nope'} is no folder: use a run folder")
    assert ask(run_dir, to, size=0).startswith("max_shard_bytes=0 is below 1")
    assert ask(run_dir, to, load="step-00000009").startswith(
        "checkpoint=step-00000009 is no complete checkpoint: use latest, step-00000003"
    )
    assert ask(run_dir, Path("/proc/nope/to")).startswith("to=/proc/nope/to cannot be made (")
    (tmp_path / "file").touch()
    assert ask(run_dir, tmp_path / "file").startswith(f"to={tmp_path / 'file'} is a file: use")
    assert ask(run_dir, run_dir).startswith(f"to={run_dir} is not empty: use")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "file"}


@pytest.mark.parametrize(
    ("keys", "own"),
    [
        ({"model__norm": "rmsnorm"}, "position=learned norm=rmsnorm activation=gelu bias=true"),
        ({"model__num_kv_heads": 2}, "position=learned norm=layernorm activation=gelu bias=true num_kv_heads=2"),
    ],
)
def test_a_model_of_neither_family_is_not_exported(tmp_path: Path, keys: dict[str, Any], own: str) -> None:
    run_dir = a_run(tmp_path, **keys)
    said = ask(run_dir, tmp_path / "to")
    assert said.startswith(f"run={run_dir} has a model ({own}) that is neither transformers' GPT-2 nor its Llama: train one with")


def test_refusals_import_no_torch(saved: Path, tmp_path: Path) -> None:
    run_dir = a_run(tmp_path, **{"model__norm": "rmsnorm"})
    script = f"""
import sys
from tests.support import small_config
from tptrain.config import ConfigError
from tptrain.checkpoint.hugging_face.folder import check_folder
from tptrain.export import export
from tptrain.export_config import ExportConfig
from tptrain.generate_config import GenerateCheckpointConfig
asked = ExportConfig({str(run_dir)!r}, "to", 100, GenerateCheckpointConfig("latest"))
for call in (lambda: check_folder({str(saved / "gpt2")!r}, small_config().model), lambda: export(asked)):
    try:
        call()
    except ConfigError as error:
        print(error)
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 3
    assert done.stdout.endswith("False False\n")
