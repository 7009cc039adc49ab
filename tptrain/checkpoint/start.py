"""Which checkpoint a run starts from, and which it passes over. Knows no torch.

    auto     the newest one in the run's own folder that is what was written; damaged ones are set aside, in one line each
    PATH     that one, or the start is refused
    never    none

A checkpoint of another model, optimizer or data is refused by the key that differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tptrain.checkpoint.folder import LATEST, STATE_FILE, complete_checkpoints, home_of, read_state, set_aside, step_of
from tptrain.checkpoint.manifest import MANIFEST, DamagedCheckpoint, check_manifest
from tptrain.config import Config, refuse
from tptrain.config_error import as_text
from tptrain.files import write_atomically

_MAY_CHANGE = ("path", "revision")
"""Of a mixture's source and of a tokenizer: text may have moved, and a revision may have been pinned. There must still be as much of it."""
_MUST_EQUAL = {
    "model": (
        "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_size", "max_seq_len",
        "position", "norm", "activation", "bias", "tie_embeddings", "rope_theta", "norm_eps",
    ),
    "optimizer": ("name", "momentum"),
    "data": (
        "source", "seq_len", "name", "subset", "split", "text_column", "vocab_size", "tokenizer", "val_fraction", "mixture",
        "temperature", "streaming", "stream_lanes", "stream_run", "shuffle_buffer", "val_documents",
    ),
}  # fmt: skip


def make_home(config: Config) -> None:
    """Make the folder of `checkpoint.dir`, if there is one, and its path absolute. Raises ConfigError."""
    if config.checkpoint.dir is None:
        return
    home = Path(config.checkpoint.dir).absolute()
    try:
        home.mkdir(parents=True, exist_ok=True)
        write_atomically(home / ".writable", b"")
        (home / ".writable").unlink()
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise refuse("checkpoint.dir", config.checkpoint.dir, rule, "use a folder that you can write") from error
    config.checkpoint.dir = str(home)


def find_start(config: Config, run_dir: Path, damage: dict[Path, str] | None = None) -> Path | None:
    """The checkpoint that a run starts from by `checkpoint.resume`, or None.

    damage: by path what is known to be damaged, each with a line that says how; what is found here is added, and a `latest` that names
    nothing. Nothing is changed on disk. Raises ConfigError where there is none to start from, where it is of another model, optimizer
    or data, or where the run's folder holds later checkpoints, which the run would overwrite.
    """
    damage = {} if damage is None else damage
    home, resume = home_of(config.checkpoint, run_dir), config.checkpoint.resume
    complete = complete_checkpoints(home)
    start: Path | None = None
    if resume == "auto":
        start = _newest_sound(complete, damage)
        if complete and start is None:  # not a new start at step 0 in the folder of a run that has come far
            rule = f"finds no checkpoint that can be used: {damage[complete[-1]]}"
            raise refuse("checkpoint.resume", resume, rule, "use checkpoint.resume=PATH of another, or another hydra.run.dir")
        _check_latest(home, damage)
    elif resume != "never":
        start = Path(resume)
        if not any((start / name).is_file() for name in (STATE_FILE, MANIFEST)):
            remedy = "use auto, never or the path of a checkpoints/step-* folder"
            raise refuse("checkpoint.resume", resume, "is no checkpoint folder", remedy)
        if _newest_sound([start], damage) is None:
            raise refuse("checkpoint.resume", resume, f"cannot be used: {damage[start]}", "use auto, or the path of another")
    if start is not None:
        _check_same_training(config, start)
    if resume != "auto" and complete and step_of(complete[-1]) > (read_state(start)["step"] if start else 0):
        rule = f"would overwrite {complete[-1]}, which is further"
        raise refuse("checkpoint.resume", resume, rule, "use checkpoint.resume=auto, or another hydra.run.dir")
    return start


def pass_over(damage: Mapping[Path, str], start: Path | None) -> list[str]:
    """Set the damaged checkpoints of a folder aside, once it is known that the run can go on. Returns a line for each to be told."""
    lines = []
    if damage and start is not None:
        write_atomically(next(iter(damage)).with_name(LATEST), f"{start.name}\n".encode())
    for path, what in damage.items():
        kept = f"; kept as {set_aside(path).name}" if path.is_dir() else ""
        lines.append(f"{what}{kept}; the run goes on from {start.name if start else 'the beginning'}")
    return lines


def differences(config: Config, folder: Path, groups: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    """Keys of `groups` by which a complete checkpoint is of something else than `config`, with the config's value and its own."""
    saved, asked = read_state(folder)["config"], asdict(config)
    for group in groups:
        for name in _MUST_EQUAL[group]:
            if name in saved[group]:  # an older checkpoint may lack a key
                yield from _differing(f"{group}.{name}", asked[group][name], saved[group][name])


def _newest_sound(checkpoints: list[Path], damage: dict[Path, str]) -> Path | None:
    """The last of these that is not known or found to be damaged. damage: as in `find_start`."""
    for folder in reversed(checkpoints):
        if folder in damage:
            continue
        try:
            check_manifest(folder)
            _check_state(folder)
        except DamagedCheckpoint as error:
            damage[folder] = str(error)
        else:
            return folder
    return None


def _check_state(folder: Path) -> None:
    """Raise DamagedCheckpoint where `state.json` does not say what a start needs, though the manifest agrees: somebody made it so."""
    state = read_state(folder)
    config = state.get("config")
    if type(state.get("step")) is not int or not isinstance(config, dict) or not all(isinstance(config.get(k), dict) for k in _MUST_EQUAL):
        raise DamagedCheckpoint(folder / STATE_FILE, "is no training state")


def _check_latest(home: Path, damage: dict[Path, str]) -> None:
    """Note a `latest` that names no checkpoint. Nothing is found by it: the names of the folders say which is the newest."""
    path = home / LATEST
    try:
        name = path.read_bytes().decode(errors="replace").strip()
    except OSError:
        return
    if home / name not in complete_checkpoints(home):
        damage[path] = f"{path} names {name or 'nothing'}, which is no checkpoint there"


def _check_same_training(config: Config, start: Path) -> None:
    """Refuse a checkpoint whose tensors or sample numbers mean something else under this config."""
    for key, asked, saved in differences(config, start, _MUST_EQUAL):
        rule, remedy = f"differs from {as_text(saved)} of {start}", f"use {key}={as_text(saved)}, or another hydra.run.dir"
        raise refuse(key, asked, rule, remedy)


def _differing(key: str, asked: Any, saved: Any) -> Iterator[tuple[str, Any, Any]]:
    """The keys, of several within `key` where it is a group, whose values differ. A group with other names differs as a whole."""
    if not (isinstance(asked, dict) and isinstance(saved, dict)):
        if asked != saved:
            yield key, asked, saved
    elif asked.keys() != saved.keys():
        yield key, sorted(asked), sorted(saved)
    else:
        for name in asked:
            if name not in _MAY_CHANGE or isinstance(asked[name], dict):  # which would be a source of that name
                yield from _differing(f"{key}.{name}", asked[name], saved[name])
