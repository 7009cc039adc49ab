"""The verb `export`: from a run folder to a folder that Hugging Face's `transformers` loads, complete or absent.

    TO/config.json                                   the model's sizes, in transformers' words
    TO/model.safetensors                             the weights; if they are several files, with model.safetensors.index.json
    TO/tokenizer.json, tokenizer_config.json         the run's tokenizer; a byte tokenizer has no files
    TO/README.md                                     what this is: a model card

One process does it, and no rank is started; it needs memory for twice one file of weights.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tptrain import interrupt
from tptrain.answer import find_checkpoint, read_run
from tptrain.checkpoint.folder import read_state
from tptrain.checkpoint.hugging_face.folder import CONFIG_FILE
from tptrain.checkpoint.hugging_face.mapping import FAMILIES, family_of
from tptrain.checkpoint.hugging_face.model_config import to_hugging_face
from tptrain.config import Config, refuse
from tptrain.config_error import as_text
from tptrain.data.tokenizers import Tokenizer, load_tokenizer
from tptrain.export_config import ExportConfig, refuse_bad_values
from tptrain.files import sync_folder, write_atomically


def export(config: ExportConfig) -> None:
    """Write the model and print its folder. config: typed. Raises ConfigError before anything is written, Stopped on a signal."""
    refuse_bad_values(config)
    run_dir = Path(config.run)
    trained = read_run(run_dir)
    refuse_other_families(config, trained)
    checkpoint = find_checkpoint(config.checkpoint.load, run_dir, trained)
    tokenizer = load_tokenizer(trained.data, run_dir)
    with interrupt.signals_stop():
        written = _complete_or_absent(config, lambda folder: _write(config, trained, checkpoint, tokenizer, folder))
    print(config.to)
    sys.stderr.write(f"tptrain: {written / 1e6:,.1f} MB of weights, by {checkpoint}\n")


def refuse_other_families(config: ExportConfig, trained: Config) -> None:
    """Whether a class of transformers expresses the run's model. Raises ConfigError."""
    model = trained.model
    if family_of(model) is not None:
        return
    keys = ("position", "norm", "activation", "bias", *["num_kv_heads"] * (model.num_kv_heads not in (None, model.num_heads)))
    own = " ".join(f"{key}={as_text(getattr(model, key))}" for key in keys)
    families = "; or ".join(" ".join(f"model.{key}={as_text(value)}" for key, value in FAMILIES[name].items()) for name in FAMILIES)
    rule = f"has a model ({own}) that is neither transformers' GPT-2 nor its Llama"
    raise refuse("run", config.run, rule, f"train one with {families}; key/value heads are fewer in a Llama alone")


def _complete_or_absent(config: ExportConfig, write: Callable[[Path], int]) -> int:
    """Let `write` fill a folder beside the one asked for, and rename it. Raises ConfigError where there can be none."""
    partial = config.folder.with_name(f".{config.folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        rule = f"cannot be made ({error.strerror})"
        raise refuse("to", config.to, rule, "use to=FOLDER with one that you may write to") from error
    try:
        written = write(partial)
        sync_folder(partial)
        partial.rename(config.folder)  # over an empty one, if there is one
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(config.folder.parent)
    return written


def _write(config: ExportConfig, trained: Config, checkpoint: Path, tokenizer: Tokenizer | None, folder: Path) -> int:
    """All files. Returns the bytes of the weights."""
    from tptrain.checkpoint.hugging_face.weights import write_weights

    values = to_hugging_face(trained.model, tokenizer.end_of_document if tokenizer else None)
    write_atomically(folder / CONFIG_FILE, (json.dumps(values, indent=2) + "\n").encode())
    if tokenizer is not None:
        tokenizer.save(folder)
    written = write_weights(checkpoint, trained.model, folder, config.max_shard_bytes)
    state = read_state(checkpoint)
    card = model_card(trained, tokenizer, values["architectures"][0], written // 4, state["step"], state["samples"])
    write_atomically(folder / "README.md", card.encode())
    return written


def model_card(trained: Config, tokenizer: Tokenizer | None, architecture: str, parameters: int, steps: int, samples: int) -> str:
    """README.md: what the model is, what it learned from, and how to load it."""
    model, data = trained.model, trained.data
    kv_heads = f", {model.kv_heads} key/value heads" * (model.kv_heads != model.num_heads)
    tied = ", head tied to the embedding" * model.tie_embeddings
    tokens = samples * data.seq_len
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {model.name}

A {architecture} of {parameters:,} parameters in fp32, trained with tptrain and exported from its checkpoint of step {steps:,}.

- model: {model.num_layers} layers, hidden size {model.hidden_size}, {model.num_heads} heads{kv_heads}, MLP size {model.ffn_hidden_size}, \
context {model.max_seq_len}, vocabulary {model.vocab_size}{tied}
- training: {samples:,} sequences of {data.seq_len:,} tokens ({tokens:,} tokens), {trained.optimizer.name}, peak learning rate \
{trained.optimizer.lr:g}, seed {trained.seed}
- data: {_described_data(trained)}

## Load it

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("FOLDER")

## Tokens

{_described_tokens(tokenizer, model.vocab_size)}
"""


def _described_data(trained: Config) -> str:
    data = trained.data
    if data.source == "mixture":
        return f"a mixture of {', '.join(sorted(data.mixture))}"
    return " ".join([data.source, *(str(part) for part in (data.name, data.subset) if part)])


def _described_tokens(tokenizer: Tokenizer | None, vocab_size: int) -> str:
    """What ids mean."""
    if tokenizer is None:
        return "The model learned random sequences; its ids stand for no text."
    if tokenizer.name == "byte":
        rest = f" Ids from 257 to {vocab_size - 1} are never used." * (vocab_size > 257)
        return f"""Ids are the bytes of UTF-8 text; 256 begins and ends a document.{rest} There is no tokenizer to load:

    ids = [256, *"a text".encode()]
    text = bytes(i for i in ids if i < 256).decode(errors="replace")"""
    return f"""The tokenizer is in this folder; id {tokenizer.end_of_document} begins and ends a document:

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""
