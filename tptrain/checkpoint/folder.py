"""Names and life-cycle of checkpoint folders. Knows no torch.

checkpoints/step-00000100/           complete: it got this name by a rename, after all of it was on disk
checkpoints/step-00000200.partial/   being written, or left by a run that was killed
checkpoints/step-00000150.damaged/   was complete, and is not what was written any more: a run went on from an older one
checkpoints/latest                   the name of the newest complete one
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tptrain.checkpoint.manifest import MANIFEST, DamageError, FileNote, check_sizes, note_of, write_manifest
from tptrain.config import Config, refuse
from tptrain.config_error import as_text
from tptrain.files import sync_folder, write_atomically

_COMPLETE = re.compile(r"step-(\d{8})")
STATE_FILE = "state.json"
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


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the complete checkpoint of a step stands."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def partial_folder(final: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return final.with_name(final.name + ".partial")


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    return sorted(path for path in folder.iterdir() if _COMPLETE.fullmatch(path.name)) if folder.is_dir() else []


def find_start(config: Config, run_dir: Path, damage: dict[Path, str] | None = None) -> Path | None:
    """The checkpoint that a run starts from by `checkpoint.resume`, or None. What is damaged is passed over with `auto`.

    damage: checkpoints known to be damaged, each with a line that says how; those found here are added, and a `latest` that names nothing.
    Files are checked quickly: see `check_sizes`. Raises ConfigError where there is none to start from, where it is of another model,
    optimizer or data, or where the run folder holds later checkpoints, which the run would overwrite.
    """
    damage = {} if damage is None else damage
    resume, complete = config.checkpoint.resume, complete_checkpoints(run_dir)
    start: Path | None = None
    if resume == "auto":
        start = newest_sound(complete, damage)
        if complete and start is None:
            rule = f"finds no checkpoint that can be used: {damage[complete[-1]]}"
            raise refuse("checkpoint.resume", resume, rule, "use checkpoint.resume=PATH of another, or another hydra.run.dir")
        _check_latest(run_dir, damage)
    elif resume != "never":
        start = Path(resume)
        if not (start / STATE_FILE).is_file() and not (start / MANIFEST).is_file():
            remedy = "use auto, never or the path of a checkpoints/step-* folder"
            raise refuse("checkpoint.resume", resume, "is no checkpoint folder", remedy)
        if newest_sound([start], damage) is None:
            raise refuse("checkpoint.resume", resume, f"cannot be used: {damage[start]}", "use the path of another, or auto")
    if start is not None:
        _check_same_training(config, start)
    if resume != "auto" and complete and _step(complete[-1]) > (read_state(start)["step"] if start else 0):
        rule = f"would overwrite {complete[-1]}, which is further"
        raise refuse("checkpoint.resume", resume, rule, "use checkpoint.resume=auto, or another hydra.run.dir")
    return start


def newest_sound(complete: Sequence[Path], damage: dict[Path, str]) -> Path | None:
    """The last of these checkpoints that is not known or found to be damaged. damage: as in `find_start`."""
    for folder in reversed(complete):
        if folder in damage:
            continue
        try:
            check_sizes(folder)
        except DamageError as error:
            damage[folder] = str(error)
        else:
            return folder
    return None


def set_aside(damaged: Path) -> Path:
    """Rename a damaged checkpoint, so that it counts no more. It stays until somebody deletes it."""
    aside = damaged.with_name(damaged.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    damaged.rename(aside)
    sync_folder(aside.parent)
    return aside


def _check_latest(run_dir: Path, damage: dict[Path, str]) -> None:
    """Note a `latest` that names no checkpoint. Nothing is found by it: the names of the folders say which is the newest."""
    path = run_dir / "checkpoints" / "latest"
    try:
        name = path.read_bytes().decode(errors="replace").strip()
    except OSError:
        return
    if not (_COMPLETE.fullmatch(name) and (path.parent / name).is_dir()):
        damage[path] = f"{path} names {name or 'nothing'}, which is no checkpoint here"


def _step(complete: Path) -> int:
    found = _COMPLETE.fullmatch(complete.name)
    assert found is not None
    return int(found[1])


def _check_same_training(config: Config, start: Path) -> None:
    """Refuse a checkpoint whose tensors or sample numbers mean something else under this config."""
    for key, asked, saved in differences(config, start, _MUST_EQUAL):
        rule, remedy = f"differs from {as_text(saved)} of {start}", f"use {key}={as_text(saved)}, or another hydra.run.dir"
        raise refuse(key, asked, rule, remedy)


def differences(config: Config, folder: Path, groups: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    """Keys of `groups` by which a complete checkpoint is of something else than `config`, with the config's value and its own."""
    saved, asked = read_state(folder)["config"], asdict(config)
    for group in groups:
        for name in _MUST_EQUAL[group]:
            if name in saved[group]:  # an older checkpoint may lack a key
                yield from _differing(f"{group}.{name}", asked[group][name], saved[group][name])


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


def publish(partial: Path, state: dict[str, Any], files: Mapping[str, FileNote] | None = None) -> Path:
    """Make a fully written partial folder the newest complete checkpoint. Returns its final path.

    files: notes of those that are in it and on disk; those without are read. The manifest, and then the name, make it complete.
    """
    final = partial.with_name(partial.name.removesuffix(".partial"))
    write_atomically(partial / STATE_FILE, (json.dumps(state, indent=2) + "\n").encode())
    known = dict(files or {})
    write_manifest(partial, {path.name: known.get(path.name) or note_of(path) for path in partial.iterdir()})
    doomed = final.with_name(final.name + ".deleted")
    if final.exists():
        shutil.rmtree(doomed, ignore_errors=True)
        final.rename(doomed)
    partial.rename(final)
    sync_folder(final.parent)
    write_atomically(final.parent / "latest", f"{final.name}\n".encode())
    shutil.rmtree(doomed, ignore_errors=True)
    return final


def read_state(folder: Path) -> dict[str, Any]:
    """What `publish` was given."""
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    return state


def rotate(run_dir: Path, keep: int, keep_every: int | None = None) -> None:
    """Delete all but the `keep` newest complete checkpoints and those of every `keep_every`th step, and what killed runs left."""
    for path in complete_checkpoints(run_dir)[:-keep]:
        if keep_every is None or _step(path) % keep_every:
            _delete(path)
    for ending in ("partial", "deleted"):
        for leftover in (run_dir / "checkpoints").glob(f"step-*.{ending}"):
            shutil.rmtree(leftover, ignore_errors=True)


def _delete(complete: Path) -> None:
    """Delete a complete checkpoint. Renamed first, so that no half-deleted folder bears a complete one's name."""
    doomed = complete.with_name(complete.name + ".deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    complete.rename(doomed)
    shutil.rmtree(doomed)
