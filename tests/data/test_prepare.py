"""Refusals, finding a finished store, and what the parent process touches."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tptrain.data.build
from tptrain.config import Config, ConfigError
from tptrain.data import Split, TokenStore, prepare


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with ten documents of 20 bytes."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"{number}" * 20)
    return folder


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- refusals --------------------------------------------------------------------------------------------


def test_no_path(make_config: Callable[..., Config]) -> None:
    assert refusal(make_config("text")) == "data.path=null names no text: use data.path=FILE, FOLDER or 'GLOB'"


def test_missing_path(make_config: Callable[..., Config]) -> None:
    expected = f"data.path=/no/such.txt does not exist (from {Path.cwd()}): use a file, a folder or a glob of text files"
    assert refusal(make_config("text", path="/no/such.txt")) == expected


def test_glob_without_a_match(make_config: Callable[..., Config], text: Path) -> None:
    expected = f"data.path={text}/*.rst matches no file (from {Path.cwd()}): use a glob that matches text files"
    assert refusal(make_config("text", path=f"{text}/*.rst")) == expected


def test_folder_without_text(make_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x")
    expected = f"data.path={tmp_path} holds no .txt or .md file: name other files by a glob: data.path='{tmp_path}/**/*'"
    assert refusal(make_config("text", path=str(tmp_path))) == expected


def test_not_a_regular_file(make_config: Callable[..., Config], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    expected = f"data.path={tmp_path}/pipe is no regular file: use a file, a folder or a glob of text files"
    assert refusal(make_config("text", path=str(tmp_path / "pipe"))) == expected


@pytest.mark.parametrize(
    ("content", "position"),
    [
        (b"\xff", 0),
        (b"ab\xe9cd", 2),
        (b"a" * (1 << 20) + b"\xc3(", 1 << 20),
        (b"a" * ((1 << 20) - 1) + b"\xc3(", (1 << 20) - 1),
        (b"abc\xe2\x82", 3),
    ],
)
def test_not_utf8_names_the_file_and_the_byte(make_config: Callable[..., Config], text: Path, content: bytes, position: int) -> None:
    (text / "bad.txt").write_bytes(content)
    assert refusal(make_config("text", path=str(text))) == (
        f"data.path={text} names {text}/bad.txt, which is not UTF-8 text at byte {position}: "
        "make it readable UTF-8 text, or use a data.path that leaves it out"
    )


def test_unreadable_file_is_named(make_config: Callable[..., Config], text: Path) -> None:
    (text / "bad.txt").symlink_to("/proc/self/mem")  # opens, and fails to read, for root as well
    assert refusal(make_config("text", path=f"{text}/*.txt")) == (
        f"data.path={text}/*.txt names {text}/bad.txt, which cannot be read (Input/output error): "
        "make it readable UTF-8 text, or use a data.path that leaves it out"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folder_without_permission(make_config: Callable[..., Config], text: Path) -> None:
    text.chmod(0)
    try:
        assert refusal(make_config("text", path=str(text))).startswith(f"data.path={text} cannot be read (Permission denied)")
    finally:
        text.chmod(0o755)


def test_a_refused_build_leaves_nothing(make_config: Callable[..., Config], text: Path, tmp_path: Path) -> None:
    (text / "bad.txt").write_bytes(b"\xff")
    refusal(make_config("text", path=str(text)))
    assert list((tmp_path / "stores").iterdir()) == []


def test_vocabulary_below_the_tokenizer_s(make_config: Callable[..., Config], text: Path) -> None:
    expected = "model.vocab_size=200 is below the byte tokenizer's 257 ids: use model.vocab_size=257 or more"
    assert refusal(make_config("text", path=str(text), model_vocab_size=200)) == expected
    assert refusal(make_config("python_docs", model_vocab_size=200)) == expected
    prepare(make_config("text", path=str(text), model_vocab_size=257))


def test_vocabulary_below_memorize_s(make_config: Callable[..., Config]) -> None:
    expected = "data.vocab_size=513 is above model.vocab_size=512: use data.vocab_size=512 or less, or model.vocab_size=513 or more"
    assert refusal(make_config("memorize", vocab_size=513)) == expected
    prepare(make_config("memorize", vocab_size=512))


def test_train_too_short(make_config: Callable[..., Config], text: Path) -> None:
    # 10 documents, 1 held out: 9 x (20 bytes + end) = 189 tokens
    assert refusal(make_config("text", path=str(text), seq_len=189)) == (
        "data.seq_len=189 is too long for the train split: a sequence needs data.seq_len + 1 = 190 tokens, and it has 189: "
        "use data.seq_len=188 or less, or more text"
    )
    prepare(make_config("text", path=str(text), seq_len=188, eval_steps=0))


def test_train_with_nothing_at_all(make_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert refusal(make_config("text", path=str(tmp_path / "empty.txt"))) == (
        "data.seq_len=1 is too long for the train split: a sequence needs data.seq_len + 1 = 2 tokens, and it has 1: use more text"
    )


def test_val_too_short(make_config: Callable[..., Config], text: Path) -> None:
    assert refusal(make_config("text", path=str(text), seq_len=21)) == (
        "data.val_fraction=0.05 leaves the val split 21 tokens, but a sequence needs data.seq_len + 1 = 22: "
        "use a larger data.val_fraction, data.seq_len=20 or less, more text, or train.eval_steps=0"
    )
    assert refusal(make_config("text", path=str(text), seq_len=21, val_fraction=0.0)).startswith(
        "data.val_fraction=0.0 leaves the val split 0 tokens, but a sequence needs data.seq_len + 1 = 22: "
    )
    for config in (
        {"seq_len": 20},
        {"seq_len": 21, "eval_steps": 0},
        {"seq_len": 21, "val_fraction": 0.0, "eval_steps": 0},
        {"seq_len": 21, "val_fraction": 0.2},
    ):
        prepare(make_config("text", path=str(text), **config))


def test_store_dir_that_cannot_be_made(make_config: Callable[..., Config], text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert refusal(make_config("text", path=str(text), store_dir=f"{tmp_path}/file/stores")) == (
        f"data.store_dir={tmp_path}/file/stores cannot hold a token store (Not a directory): "
        "use data.store_dir=FOLDER with one that you can write to"
    )


def test_a_stream_has_no_store_and_yet_a_folder(make_config: Callable[..., Config], text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    config = {"streaming": True, "val_fraction": 0.0, "eval_steps": 0, "store_dir": f"{tmp_path}/file/stores"}
    assert re.fullmatch(
        rf"data.store_dir={tmp_path}/file/stores cannot hold a token store \(Not a directory.*\): "
        "use data.store_dir=FOLDER with one that you can write to",
        refusal(make_config("text", path=str(text), **config)),
    )


# ---- finding a store -------------------------------------------------------------------------------------


def test_a_finished_store_is_found_not_built(make_config: Callable[..., Config], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("text", path=str(text))
    folder = prepare(config)
    monkeypatch.setattr(tptrain.data.build, "locked", None)  # building would fail
    lines: list[str] = []
    assert prepare(config, lines.append) == folder
    assert lines == [f"text: 210 tokens in {folder}"]


def test_what_the_ids_follow_from_changes_the_folder(make_config: Callable[..., Config], text: Path) -> None:
    config = make_config("text", path=str(text))
    folders = [prepare(config)]
    assert prepare(make_config("text", path=str(text), seq_len=5, seed=7)) == folders[0]  # neither is in the store
    folders.append(prepare(make_config("text", path=str(text), val_fraction=0.2)))
    (text / "0.txt").write_text("another size")
    folders.append(prepare(config))
    os.utime(text / "0.txt", ns=(1, 1))
    folders.append(prepare(config))
    (text / "0.txt").rename(text / "00.txt")
    folders.append(prepare(config))
    (text / "new.txt").write_text("x" * 20)
    folders.append(prepare(config))
    assert len(set(folders)) == 6
    assert TokenStore.open(folders[-1]).train.num_documents + TokenStore.open(folders[-1]).val.num_documents == 11


def test_a_store_is_named_by_its_fingerprint(make_config: Callable[..., Config], text: Path) -> None:
    folder = prepare(make_config("text", path=str(text)))
    store = TokenStore.open(folder)
    assert folder.is_absolute()
    assert re.fullmatch("[0-9a-f]{64}", store.fingerprint)
    assert folder.name == f"text-{store.fingerprint[:16]}"
    data = ["train-00000.tokens", "train.offsets", "val-00000.tokens", "val.offsets"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["meta.json", *data, *(f"{name}.sums" for name in data)])


@pytest.mark.parametrize("damage", ["truncate", "remove meta", "remove tokens", "format", "fingerprint", "no json"])
def test_a_damaged_store_is_built_anew(
    make_config: Callable[..., Config], text: Path, damage: str, documents: Callable[[Split], list[list[int]]]
) -> None:
    config = make_config("text", path=str(text))
    folder = prepare(config)
    meta = json.loads((folder / "meta.json").read_text())
    if damage == "truncate":
        os.truncate(folder / "train-00000.tokens", 100)
    elif damage == "remove meta":
        (folder / "meta.json").unlink()
    elif damage == "remove tokens":
        (folder / "val-00000.tokens").unlink()
    elif damage == "no json":
        (folder / "meta.json").write_text("[")
    else:
        (folder / "meta.json").write_text(json.dumps({**meta, damage: 0}))
    store = TokenStore.open(prepare(config))
    assert sorted(documents(store.train) + documents(store.val)) == sorted([*(f"{number}" * 20).encode(), 256] for number in range(10))
    assert (store.folder, store.fingerprint) == (folder, meta["fingerprint"])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_relative_folders_and_home(make_config: Callable[..., Config], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert prepare(make_config("text", path="text", store_dir="here/stores")).parent == tmp_path / "here" / "stores"
    assert prepare(make_config("text", path="text", store_dir="~/stores")).parent == tmp_path / "home" / "stores"


# ---- the process -----------------------------------------------------------------------------------------

SCRIPT = """
import sys
from types import SimpleNamespace
from tptrain.config import ConfigError, DataConfig
from tptrain.data import prepare
path, store_dir = sys.argv[1:]
data = DataConfig("text", seq_len=8, path=path, store_dir=store_dir)
try:
    prepare(SimpleNamespace(data=data, model=SimpleNamespace(vocab_size=512), train=SimpleNamespace(eval_steps=1)))
except ConfigError as error:
    print("refused")
print(*(name for name in ("torch", "datasets") if name in sys.modules))
"""


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=True, timeout=60
    )


def test_building_writes_only_the_store_and_prints_only_the_report(text: Path, tmp_path: Path) -> None:
    home, stores = tmp_path / "home", tmp_path / "stores"
    home.mkdir()
    built = run(home, str(text), str(stores))
    (folder,) = stores.iterdir()
    first, second, imported = built.stdout.splitlines()
    assert first == f"tokenising text {text}: 10 documents"
    assert re.fullmatch(rf"210 tokens in \d+\.\d s -> {re.escape(str(folder))}", second)
    assert imported == "datasets"
    assert built.stderr == ""
    assert list(home.iterdir()) == []
    assert run(home, str(text), str(stores)).stdout.splitlines() == [f"text: 210 tokens in {folder}", ""]  # nothing slow imported


def test_a_refusal_imports_nothing_slow(text: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "/no/such", str(tmp_path / "stores")).stdout.splitlines() == ["refused", ""]
    (text / "bad.txt").write_bytes(b"\xff")
    assert run(tmp_path, str(text), str(tmp_path / "stores")).stdout.splitlines() == ["refused", ""]
