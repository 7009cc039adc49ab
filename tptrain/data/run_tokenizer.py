"""A run folder's own copy of its tokenizer, with which text can be written when the token store is gone."""

from __future__ import annotations

from pathlib import Path

from tptrain.config_error import refuse
from tptrain.data.hf_tokenizer import CONFIG_FILE, FILE, read_file
from tptrain.data.tokenizers import ByteTokenizer, load_tokenizer
from tptrain.data_config import DataConfig


def keep_tokenizer(data: DataConfig, store_dir: Path, run_dir: Path, start: Path | None) -> None:
    """Put the tokenizer of the store into the run folder, each file whole or not at all; a byte tokenizer has no files.

    start: the checkpoint that the run goes on from, if any.
    Raises ConfigError where that was trained with another tokenizer, and where the folder cannot be written.
    """
    tokenizer = load_tokenizer(data, store_dir)
    if tokenizer is None:
        return
    if start is not None:
        earlier = start.absolute().parents[1]
        if _fingerprint_in(earlier) not in (None, tokenizer.fingerprint()):
            name = earlier / FILE if (earlier / FILE).is_file() else "byte"
            raise refuse("data.tokenizer.name", data.tokenizer.name, f"is not the tokenizer that {start} was trained with",
                         f"use data.tokenizer.name={name} with its data.tokenizer.end_token, or another hydra.run.dir")  # fmt: skip
    try:
        if isinstance(tokenizer, ByteTokenizer):
            for file in (FILE, CONFIG_FILE):
                (run_dir / file).unlink(missing_ok=True)
        tokenizer.save(run_dir)
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise refuse("hydra.run.dir", run_dir, rule, "use hydra.run.dir=FOLDER with one that you can") from error


def _fingerprint_in(run_dir: Path) -> str | None:
    """Of the tokenizer that a run was trained with; None where the folder is no run's."""
    if (run_dir / FILE).is_file():
        return read_file(run_dir / FILE, str(run_dir / FILE), None).fingerprint()
    return ByteTokenizer().fingerprint() if (run_dir / "config.yaml").is_file() else None
