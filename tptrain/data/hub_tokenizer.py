"""The tokenizer.json of a tokenizer on the Hugging Face hub, in Hugging Face's own cache; no code of it is run.

The hub is asked once, for some seconds: a download by itself tries again and again. Where it does not answer, the cache serves.
"""

from __future__ import annotations

from pathlib import Path

from tptrain.config_error import ConfigError, refuse
from tptrain.data.hf_tokenizer import CONFIG_FILE, FILE

_KEY = "data.tokenizer.name"
_ANSWER_SECONDS = 10.0
"""How long the hub may take to answer."""


def fetch(name: str, revision: str | None) -> Path:
    """The file of the tokenizer `name`, with its tokenizer_config.json beside it if it has one.

    revision: branch, tag or commit; None means the newest. Raises ConfigError.
    """
    from huggingface_hub import HfApi, errors

    try:
        found = HfApi().model_info(name, revision=revision, timeout=_ANSWER_SECONDS)
    except errors.HFValidationError as error:
        remedy = f"use byte, train, a folder with a {FILE}, such a file or a hub name, OWNER/NAME"
        raise refuse(_KEY, name, "is no tokenizer's name", remedy) from error
    except errors.RevisionNotFoundError as error:
        raise refuse("data.tokenizer.revision", revision, f"is no revision of {name}", "use a branch, a tag or a commit") from error
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        remedy = f"use byte, train, a folder with a {FILE} or a full hub name, OWNER/NAME; for a private or gated one, hf auth login"
        raise refuse(_KEY, name, "is not on the Hugging Face hub, or is closed to you", remedy) from error
    except Exception:  # of the HTTP library, which differs by version, or offline mode
        return _from_cache(name, revision)
    files = {file.rfilename for file in found.siblings or ()}
    if FILE not in files:
        raise _no_file(name)
    try:
        if CONFIG_FILE in files:
            _download(name, CONFIG_FILE, found.sha)
        return _download(name, FILE, found.sha)
    except Exception as error:
        rule = f"cannot be downloaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise refuse(_KEY, name, rule, "try again, or use a folder that holds it") from error


def _download(name: str, file: str, revision: str | None, local_only: bool = False) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file, revision=revision, local_files_only=local_only))


def _from_cache(name: str, revision: str | None) -> Path:
    """What an earlier download left."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _download(name, FILE, revision, local_only=True)
    except (EntryNotFoundError, OSError) as error:
        at = f" at {revision}" if revision is not None else ""
        raise refuse(
            _KEY, name, f"is no folder here, cannot be reached on the Hugging Face hub and is not in this machine's cache{at}",
            f"copy its {FILE} and {CONFIG_FILE} to this machine and use {_KEY}=FOLDER; or use train or byte",
        ) from error  # fmt: skip


def _no_file(name: str) -> ConfigError:
    remedy = f'convert it with transformers: AutoTokenizer.from_pretrained("{name}").save_pretrained(FOLDER), and use {_KEY}=FOLDER'
    return refuse(_KEY, name, f"has no {FILE} on the hub", remedy)
