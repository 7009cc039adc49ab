"""Tokenizers of the `tokenizers` library: the library's ids and no others, the end token, what is saved, what is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.tokenizer_kinds import DOCUMENTS, KINDS, SHORT, ids_of, plain
from tptrain.config import Config, ConfigError, DataConfig, TokenizerConfig
from tptrain.data import ByteTokenizer, Split, TokenStore, load_tokenizer, prepare
from tptrain.data.hf_tokenizer import HFTokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make(root / kind) for kind, (make, _) in KINDS.items()}


def load(name: object, folder: Path | None = None, **asked: object) -> HFTokenizer:
    data = DataConfig("text", seq_len=8, tokenizer=TokenizerConfig(str(name), **asked))
    tokenizer = load_tokenizer(data, folder)
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer


def refusal(name: object, folder: Path | None = None, **asked: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(name, folder, **asked)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_library_s(folders: dict[str, Path], kind: str) -> None:
    """Of every document, alone and in a batch, in whichever process."""
    tokenizer, rules = load(folders[kind]), plain(folders[kind])
    expected = [ids_of(rules, text) for text in SHORT.values()]
    batch = tokenizer.encode_batch(list(SHORT.values()))
    for name, text, ids, wanted in zip(SHORT, SHORT.values(), batch, expected, strict=True):
        assert ids.tolist() == tokenizer.encode(text).tolist() == wanted, name
        assert ids.dtype == np.uint16
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.vocab_size == max(rules.get_vocab(with_added_tokens=True).values()) + 1
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(DOCUMENTS["emoji"]).tolist() == expected[list(SHORT).index("emoji")]
    assert (copy.name, copy.vocab_size, copy.end_of_document) == (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_document)
    assert copy.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_holds_them_with_end_tokens_in_place(
    folders: dict[str, Path], kind: str, tmp_path: Path, make_config: Callable[..., Config], documents: Callable[[Split], list[list[int]]]
) -> None:
    texts = DOCUMENTS if kind in ("byte_level", "sentencepiece") else SHORT  # with words, and without: then 5 MB are one word
    for number, text in enumerate(texts.values()):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    config = make_config("text", path=str(tmp_path), val_fraction=0.0, eval_steps=0, tokenizer=TokenizerConfig(str(folders[kind])))
    folder = prepare(config)
    rules = plain(folders[kind])
    end = rules.token_to_id(KINDS[kind][1])
    found = documents(TokenStore.open(folder).train)
    for name, text, ids in zip(texts, texts.values(), found, strict=True):
        assert ids == [*ids_of(rules, text), end], name
    kept = load_tokenizer(DataConfig("text", seq_len=8, tokenizer=TokenizerConfig("gone")), folder)
    assert kept is not None
    assert kept.fingerprint() == load(folders[kind]).fingerprint(), "a store is enough by itself"


def test_a_special_token_beyond_the_size_counts(folders: dict[str, Path], tmp_path: Path, make_config: Callable[..., Config]) -> None:
    """The vocabulary of a tokenizer whose ids have gaps ends at its highest id."""
    last = json.loads((folders["byte_level"] / "tokenizer.json").read_text())["added_tokens"][-1]
    assert load(folders["byte_level"]).vocab_size == last["id"] + 1
    spec = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"text": 0, "</s>": 500}, "unk_token": "text"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert plain(tmp_path).get_vocab_size() == 2
    assert load(tmp_path).vocab_size == 501
    (tmp_path / "a.txt").write_text("text")
    config = make_config("text", path=str(tmp_path / "a.txt"), model_vocab_size=500, tokenizer=TokenizerConfig(str(tmp_path)))
    with pytest.raises(
        ConfigError, match=f"^model.vocab_size=500 is below the {tmp_path} tokenizer's 501 ids: use model.vocab_size=501 or"
    ):
        prepare(config)


def test_many_ids_are_uint32(tmp_path: Path) -> None:
    vocab = {f"w{number}": number for number in range(1 << 16)} | {"</s>": 1 << 16}
    spec = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load(tmp_path / "tokenizer.json")
    ids = tokenizer.encode("w65535 </s> w3")
    assert (ids.dtype, ids.tolist()) == (np.uint32, [65535, 65536, 3])


def test_random_dropping_of_merges_is_off(folders: dict[str, Path], tmp_path: Path) -> None:
    spec = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    spec["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load(tmp_path).encode(DOCUMENTS["english"]).tolist() == ids_of(plain(folders["byte_level"]), DOCUMENTS["english"])


def test_decode(folders: dict[str, Path]) -> None:
    tokenizer = load(folders["byte_level"])
    for name in ("english", "russian", "japanese", "emoji", "crlf", "bom", "blanks"):
        assert tokenizer.decode(tokenizer.encode(DOCUMENTS[name])) == DOCUMENTS[name]
    ids = [tokenizer.end_of_document, *tokenizer.encode("fox"), 99_999, -1, *tokenizer.encode("\u00e9")[:1]]
    assert tokenizer.decode(ids) == "fox\ufffd"


def test_no_utf8_text(folders: dict[str, Path]) -> None:
    for tokenizer in (load(folders["byte_level"]), ByteTokenizer()):
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode("a\udcff")


# ---- the end token -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_end_token(folders: dict[str, Path], kind: str) -> None:
    tokenizer = load(folders[kind])
    assert tokenizer.end_token == KINDS[kind][1]
    assert tokenizer.end_of_document == plain(folders[kind]).token_to_id(KINDS[kind][1])


def test_the_end_token_asked_for_comes_first(folders: dict[str, Path]) -> None:
    plainly, asked = load(folders["byte_level"]), load(folders["byte_level"], end_token="<|tool|>")
    assert asked.end_of_document == plainly.end_of_document + 1
    assert asked.fingerprint() != plainly.fingerprint()
    assert refusal(folders["byte_level"], end_token="</s>") == (
        f"data.tokenizer.end_token=</s> is not in the vocabulary of {folders['byte_level']}: "
        "use one of its special tokens, <|endoftext|> <|tool|>"
    )


def test_the_one_beside_the_file_comes_before_a_common_one(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|tool|>"}))
    assert load(tmp_path).end_token == "<|tool|>"
    assert load(tmp_path / "tokenizer.json").end_token == "<|tool|>"
    for useless in ({"eos_token": "nope"}, {"eos_token": None}, []):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(useless))
        assert load(tmp_path).end_token == "<|endoftext|>"


def test_without_an_end_token(folders: dict[str, Path], tmp_path: Path) -> None:
    spec = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    spec["added_tokens"] = [{**token, "content": f"<{token['id']}>"} for token in spec["added_tokens"]]
    first = spec["added_tokens"][0]["id"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert refusal(tmp_path) == (
        f"data.tokenizer.name={tmp_path} names no token that ends a text: "
        f"use one of its special tokens, <{first}> <{first + 1}>, as data.tokenizer.end_token=..."
    )
    assert load(tmp_path, end_token=f"<{first}>").end_of_document == first
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, "added_tokens": []}))
    assert "it has no special tokens: use one of its tokens, as data.tokenizer.end_token=..." in refusal(tmp_path)


# ---- saved and found -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """What a folder holds comes before what the name stands for, and transformers gives the same ids."""
    tokenizer = load(folders[kind], end_token="[CLS]" if kind == "wordpiece" else None)
    tokenizer.save(tmp_path / "run")
    kept = load("no/such", tmp_path / "run")
    assert kept.fingerprint() == tokenizer.fingerprint()
    assert kept.end_of_document == tokenizer.end_of_document
    assert kept.encode(DOCUMENTS["emoji"]).tolist() == tokenizer.encode(DOCUMENTS["emoji"]).tolist()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_transformers_reads_what_is_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = load(folders["byte_level"])
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert theirs.eos_token_id == tokenizer.end_of_document
    for name in ("english", "japanese", "emoji", "crlf", "blanks"):
        assert theirs.encode(DOCUMENTS[name], add_special_tokens=False) == tokenizer.encode(DOCUMENTS[name]).tolist()


def test_fingerprints_tell_tokenizers_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    spec = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    spec["model"]["merges"][-1:] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    several = [load(folder).fingerprint() for folder in (*folders.values(), tmp_path)]
    assert len({*several, ByteTokenizer().fingerprint()}) == len(KINDS) + 2


def test_a_trained_one_must_be_what_is_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    load(folders["byte_level"]).save(tmp_path)
    size = load(folders["byte_level"]).vocab_size
    assert load("train", tmp_path, vocab_size=size).name == "trained"
    said = refusal("train", tmp_path, vocab_size=size - 1)
    assert said.startswith(f"data.tokenizer.vocab_size={size - 1} is below the {size} ids of {tmp_path}/tokenizer.json: ")
    assert refusal("train", tmp_path / "nowhere").startswith(
        f"data.tokenizer.name=train asks for a tokenizer that is not in {tmp_path}/nowhere: copy tokenizer.json"
    )
    assert "is not trained yet" in refusal("train")


def test_bytes_stay_bytes_whatever_the_folder_holds(folders: dict[str, Path]) -> None:
    data = DataConfig("text", seq_len=8, tokenizer=TokenizerConfig("byte"))
    assert isinstance(load_tokenizer(data, folders["byte_level"]), ByteTokenizer)
    data.tokenizer.end_token = "</s>"
    with pytest.raises(ConfigError, match=r"^data.tokenizer.end_token=</s> names a token, and the byte tokenizer has none"):
        load_tokenizer(data)


# ---- refusals ------------------------------------------------------------------------------------------------


def test_refused_paths(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"data.tokenizer.name={tmp_path} is a folder without a tokenizer.json: save it there with")
    for name in ("./no", "/no/such", "~/no/such", "a/b/c", "no.json"):
        assert refusal(name).startswith(f"data.tokenizer.name={name} does not exist (from {Path.cwd()}): use byte, train, ")
    for content in ("{", "{}", "[]", '{"model": {"type": "Magic"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        assert f"stands for {tmp_path}/tokenizer.json, which is no tokenizer of the tokenizers library (" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    assert "which is no tokenizer of" in refusal(tmp_path)
    assert refusal("bad name!").startswith("data.tokenizer.name=bad name! is no tokenizer's name: use byte, train, ")


SCRIPT = """
import sys, time
from tptrain.config import ConfigError, DataConfig, TokenizerConfig
from tptrain.data import load_tokenizer
try:
    load_tokenizer(DataConfig("text", seq_len=8, tokenizer=TokenizerConfig(sys.argv[1], revision=sys.argv[2] if sys.argv[2:] else None)))
    print("loaded")
except ConfigError as error:
    print(error)
"""


def in_another_process(*arguments: str, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | variables
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    assert time.monotonic() - began < 30
    return ended.stdout.rstrip("\n")


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "HF_HUB_OFFLINE"])
def test_without_a_network(tmp_path: Path, folders: dict[str, Path], variable: str) -> None:
    """One line, soon, and nothing else on the terminal; a tokenizer that was downloaded before is found in the cache."""
    variables = {"HF_HOME": str(tmp_path), variable: {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}[variable]}
    assert in_another_process("owner/name", **variables) == (
        "data.tokenizer.name=owner/name is no folder here, cannot be reached on the Hugging Face hub and is not in this machine's cache: "
        "copy its tokenizer.json and tokenizer_config.json to this machine and use data.tokenizer.name=FOLDER; or use train or byte"
    )
    assert "not in this machine's cache at v2: copy" in in_another_process("owner/name", "v2", **variables)
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    os.symlink(folders["sentencepiece"], cached / "snapshots" / commit)
    assert in_another_process("owner/name", **variables) == "loaded"


class Hub:
    """Stands in for the hub: its answers to the two calls that are made of it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, files: list[str], folder: Path | None = None, error: Exception | None = None
    ) -> None:
        import huggingface_hub

        self.asked: list[tuple[object, ...]] = []

        def model_info(api: object, name: str, revision: str | None, timeout: float) -> object:
            self.asked.append((name, revision))
            if error is not None:
                raise error
            siblings = [huggingface_hub.hf_api.RepoSibling(rfilename=file) for file in files]
            return type("Info", (), {"siblings": siblings, "sha": "abc"})

        def download(name: str, file: str, revision: str | None, local_files_only: bool) -> str:
            self.asked.append((name, file, revision, local_files_only))
            return str(folder / file) if folder else ""

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_a_hub_name(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    """Of one revision, both files: the name of the end token is in the other."""
    hub = Hub(monkeypatch, ["model.safetensors", "tokenizer.json", "tokenizer_config.json"], folders["sentencepiece"])
    tokenizer = load("owner/name", revision="v1")
    assert (tokenizer.name, tokenizer.end_token) == ("owner/name", "</s>")
    assert hub.asked == [
        ("owner/name", "v1"),
        ("owner/name", "tokenizer_config.json", "abc", False),
        ("owner/name", "tokenizer.json", "abc", False),
    ]
    hub = Hub(monkeypatch, ["tokenizer.json"], folders["byte_level"])
    assert load("gpt2").end_token == "<|endoftext|>"
    assert hub.asked == [("gpt2", None), ("gpt2", "tokenizer.json", "abc", False)]
    Hub(monkeypatch, ["tokenizer.model"])
    assert refusal("owner/name").startswith(
        "data.tokenizer.name=owner/name has no tokenizer.json on the hub: "
        'convert it with transformers: AutoTokenizer.from_pretrained("owner/name").save_pretrained(FOLDER)'
    )


def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    for kind, said in (
        ("RepositoryNotFoundError", "data.tokenizer.name=x is not on the Hugging Face hub, or is closed to you: use byte, train, "),
        ("GatedRepoError", "data.tokenizer.name=x is not on the Hugging Face hub, or is closed to you: use byte, train, "),
        ("RevisionNotFoundError", "data.tokenizer.revision=v9 is no revision of x: use a branch, a tag or a commit"),
    ):
        error = getattr(errors, kind)
        Hub(monkeypatch, [], error=error.__new__(error))
        assert refusal("x", revision="v9").startswith(said)


# ---- processes -----------------------------------------------------------------------------------------------

FORKING = """
import os, pickle, sys
from pathlib import Path
from tptrain import environment
from tests.support import small_config
environment.set_up(small_config(), None)
from tptrain.config import DataConfig, TokenizerConfig
from tptrain.data import load_tokenizer
tokenizer = load_tokenizer(DataConfig("text", seq_len=8, tokenizer=TokenizerConfig(sys.argv[1])))
texts = ["the quick brown fox"] * 100
before = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
child = os.fork()
if not child:
    os._exit(int([ids.tolist() for ids in tokenizer.encode_batch(texts)] != before))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(os.listdir("/proc/self/task")))
"""


def test_a_forked_process_neither_hangs_nor_warns(folders: dict[str, Path]) -> None:
    """And the library starts no threads of its own: texts are split among processes."""
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"} | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORKING, str(folders["byte_level"])]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("0 1\n", "")
