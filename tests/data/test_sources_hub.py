"""Data sets of the hub: what load_dataset is asked for, what its errors become, and a machine that cannot reach the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from tptrain import cli
from tptrain.config_error import ConfigError
from tptrain.data.sources import open_source
from tptrain.data_config import DataConfig, SourceConfig, check_data
from tptrain.typed_config import typed

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict]]:
    """The calls of load_dataset, which gives three rows; the hub answers."""
    calls: list[tuple[tuple, dict]] = []

    def load_dataset(*arguments: Any, **keywords: Any) -> Any:
        calls.append((arguments, keywords))
        rows = datasets.Dataset.from_dict({"id": [1, 2, 3], "text": ["a", "", "c"], "body": ["d", "e", None]})
        return rows.to_iterable_dataset() if keywords.get("streaming") else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *arguments, **keywords: None)
    return calls


@pytest.fixture(scope="module")
def compose_data() -> Iterator[Callable[..., DataConfig]]:
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    from tptrain.job import schema

    ConfigStore.instance().store(name="schema", node=schema())
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        yield lambda *overrides: typed(compose("config", list(overrides))).data


SHIPPED = {
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "validation"),
    "openwebtext": ("Skylion007/openwebtext", None, None),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", None),
    "c4": ("allenai/c4", "en", "validation"),
    "tinystories": ("roneneldan/TinyStories", None, "validation"),
}


def test_every_hub_yaml_is_here() -> None:
    shipped = {path.stem for path in (cli.CONF / "data").glob("*.yaml") if "\nsource: hub\n" in path.read_text()}
    assert shipped == {*SHIPPED, "hub"}


@pytest.mark.parametrize("option", SHIPPED)
@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_a_shipped_config_reaches_load_dataset(
    hub: list, compose_data: Callable[..., DataConfig], tmp_path: Path, option: str, streaming: bool
) -> None:
    name, subset, val_split = SHIPPED[option]
    held_out = ["data.val_fraction=0", "data.val_documents=9"] if streaming and val_split is None else []
    data = compose_data(f"data={option}", f"data.streaming={streaming}", *held_out)
    check_data(data)
    assert (data.val_split, data.tokenizer.name) == (val_split, "gpt2")
    for split in ("train", *([val_split] if val_split else [])):
        source = open_source(data, split=None if split == "train" else split)
        if streaming:
            assert list(source.stream()) == [{"text": "a"}, {"text": ""}, {"text": "c"}]
        else:
            assert source.load(tmp_path).texts(0, 3) == ["a", "", "c"]
        assert hub.pop() == ((name, subset), {"split": split, "revision": None, "streaming": streaming})
    assert not hub


def test_every_key_reaches_load_dataset(hub: list, compose_data: Callable[..., DataConfig], tmp_path: Path) -> None:
    keys = ["name=me/mine", "subset=small", "split='dev[:10]'", "revision=v2", "text_column=id"]
    data = compose_data("data=hub", *(f"data.{key}" for key in keys))
    source = open_source(data)
    assert (source.label, source.column) == ("hub me/mine small dev[:10]", "id")
    message = "data.text_column=id is int64, not text in hub me/mine small dev[:10], row 1 (columns: id, text, body): "
    for read in (lambda: source.load(tmp_path), source.stream):
        with pytest.raises(ConfigError) as caught:
            read()
        assert str(caught.value).startswith(message)
    stored, streamed = hub
    assert stored == (("me/mine", "small"), {"split": "dev[:10]", "revision": "v2", "streaming": False})
    assert streamed == (("me/mine", "small"), {"split": "dev[:10]", "revision": "v2", "streaming": True})


def test_a_null_names_the_row(hub: list, tmp_path: Path) -> None:
    documents = open_source(SourceConfig("hub", name="me/mine", text_column="body"), "data.val_sets.x").load(tmp_path)
    with pytest.raises(ConfigError, match=r"data.val_sets.x.text_column=body is null in hub me/mine, row 3 \(columns: id, text, body\): "):
        documents.texts(0, 3)


@pytest.mark.parametrize("answers", [True, False])
def test_datasets_is_offline_only_where_the_hub_does_not_answer(
    hub: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: bool
) -> None:
    seen, load_dataset = [], datasets.load_dataset

    def dataset_info(*arguments: Any, **keywords: Any) -> None:
        assert keywords["timeout"] <= 20
        if not answers:
            raise OSError("no route")

    def watched(*arguments: Any, **keywords: Any) -> Any:
        seen.append(datasets.config.HF_HUB_OFFLINE)
        return load_dataset(*arguments, **keywords)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", watched)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert open_source(SourceConfig("hub", name="me/mine")).load(tmp_path).texts(0, 1) == ["a"]
    assert seen == [not answers]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_what_is_read_is_part_of_the_fingerprint() -> None:
    parts = [{}, {"subset": "a"}, {"split": "a"}, {"revision": "a"}, {"text_column": "a"}]
    prints = {open_source(SourceConfig("hub", name="me/mine", **part)).fingerprint() for part in parts}
    assert len(prints | {open_source(SourceConfig("hub", name="me/other")).fingerprint()}) == 6
    assert open_source(SourceConfig("hub", name="me/mine"), split="a").fingerprint() in prints


@pytest.mark.parametrize("name", ["", None, "a/b/c", "a b", "../x", "https://huggingface.co/x", "s3://x"])
def test_no_name(name: str | None) -> None:
    with pytest.raises(ConfigError, match=r"is no data set's name on the hub: use data.name=OWNER/NAME"):
        open_source(SourceConfig("hub", name=name))


def test_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"data.name=me/mine is also a file or folder here"):
        open_source(SourceConfig("hub", name="me/mine"))


# ---- what load_dataset says, made by itself from a folder laid out as on the hub ------------------------------

CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: a.jsonl}
- config_name: large
  data_files:
  - {split: train, path: a.jsonl}
---
"""


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_unknown_subset_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    folder, load_dataset = tmp_path / "data", datasets.load_dataset
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *arguments, **keywords: None)
    local = lambda _, *rest, **keywords: load_dataset(str(folder), *rest, cache_dir=str(tmp_path / "cache"), **keywords)  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", local)

    def refusal(**keys: str) -> str:
        split = keys.pop("val_split", None)
        source = open_source(SourceConfig("hub", name="me/mine", **keys), split=split)
        with pytest.raises(ConfigError) as caught:
            _ = source.stream() if streaming else source.load(tmp_path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(": use one of those")
        assert "small" in str(caught.value) or "train" in str(caught.value)
        return str(caught.value)

    assert refusal(subset="tiny").startswith("data.subset=tiny is no configuration of me/mine (")
    assert refusal().startswith("data.subset=null is no configuration of me/mine (")
    assert refusal(subset="small", split="dev").startswith("data.split=dev is no split of me/mine (")
    assert refusal(subset="small", val_split="dev").startswith("data.val_split=dev is no split of me/mine (")
    found = open_source(SourceConfig("hub", name="me/mine", subset="large"))
    assert [row["text"] for row in found.stream()] == ["a"] == found.load(tmp_path).texts(0, 1)


# ---- a hub that refuses, that is not there, and that never answers ---------------------------------------------

SCRIPT = """
import json, sys, time
from pathlib import Path
from tptrain.config_error import ConfigError
from tptrain.data.sources import open_source, hub
from tptrain.data_config import SourceConfig
hub._ANSWER_SECONDS = 2.0
for keys in json.loads(sys.argv[1]):
    stream = keys.pop("stream", False)
    source = open_source(SourceConfig("hub", **keys))
    started = time.perf_counter()
    try:
        print(json.dumps([source.stream() and None if stream else source.load(Path("x")).texts(0, 2), 0]))
    except ConfigError as error:
        print(json.dumps([str(error), time.perf_counter() - started]))
"""


def ask(home: Path, endpoint: str, *keys: dict[str, Any], **variables: str) -> list[tuple[Any, float]]:
    """What opening and reading gives in a process of its own: the texts, or the error and how many seconds it took."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy") and not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), **variables}
    arguments = [sys.executable, "-c", SCRIPT, json.dumps(keys)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, cwd=home)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


class Refusing(BaseHTTPRequestHandler):
    """Answers as the hub does for what is not there, and never for `slow`."""

    gone = threading.Event()

    def do_GET(self) -> None:
        if "slow" in self.path:
            self.gone.wait(60)
            return
        status, code = (403, "GatedRepo") if "gated" in self.path else (404, "RevisionNotFound" if "there" in self.path else "RepoNotFound")
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Refusing.gone.set()
        server.shutdown()


UNREACHABLE = (
    " cannot be reached on the Hugging Face hub and is not in this machine's cache: save it on a machine that reaches the hub, "
    "with save_to_disk, and use {saved}; or set HF_HOME to a filled cache"
)


def test_a_hub_that_refuses(tmp_path: Path, server: str) -> None:
    answers = ask(tmp_path, server, {"name": "no/body"}, {"name": "a/gated"}, {"name": "is/there", "revision": "v9"}, {"name": "a/slow"})
    closed = "is not on the Hugging Face hub, or is closed to you: use a data set's full name, OWNER/NAME; "
    assert answers[0][0].startswith(f"data.name=no/body {closed}")
    assert answers[1][0].startswith(f"data.name=a/gated {closed}")
    assert answers[2][0] == "data.revision=v9 is no revision of is/there: use a branch, a tag or a commit"
    assert answers[3][0] == "data.name=a/slow" + UNREACHABLE.format(saved="data=saved data.path=FOLDER")
    assert all(seconds < 15 for _, seconds in answers)


def test_no_network(tmp_path: Path) -> None:
    options = [{"name": name, "subset": subset} for name, subset, _ in SHIPPED.values()]
    answers = ask(tmp_path, "http://127.0.0.1:9", *options, {"name": "a/b", "stream": True})
    for keys, (text, seconds) in zip([*options, {"name": "a/b"}], answers, strict=True):
        assert text == f"data.name={keys['name']}" + UNREACHABLE.format(saved="data=saved data.path=FOLDER")
        assert seconds < 10
    (text, seconds), *_ = ask(tmp_path, "https://huggingface.co", {"name": "a/b"}, HF_HUB_OFFLINE="1")
    assert text == "data.name=a/b" + UNREACHABLE.format(saved="data=saved data.path=FOLDER")


def test_a_filled_cache_serves_without_network(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["from", "cache"]}).to_parquet(tmp_path / "a.parquet")
    made = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path / "made"))
    folder = Path(made.cache_files[0]["filename"]).parent
    cached = tmp_path / "home" / "datasets" / "me___mine" / "small" / "0.0.0" / COMMIT
    shutil.copytree(folder, cached)
    (cached / "parquet-train.arrow").rename(cached / "mine-train.arrow")
    info = json.loads((cached / "dataset_info.json").read_text())
    info |= {"dataset_name": "mine", "config_name": "small", "builder_name": "parquet"}
    (cached / "dataset_info.json").write_text(json.dumps(info))
    keys = {"name": "me/mine", "subset": "small"}
    asked = [keys, {**keys, "revision": COMMIT[:7]}, {**keys, "revision": "v2"}, {**keys, "subset": "large"}]
    found, by_commit, other_commit, other_subset = ask(tmp_path / "home", "http://127.0.0.1:9", *asked)
    assert found[0] == by_commit[0] == ["from", "cache"]
    assert other_commit[0] == (
        "data.revision=v2 cannot be looked up, since the hub cannot be reached, and this machine's cache holds me/mine at "
        f"{COMMIT}: use data.revision={COMMIT}, if that will do"
    )
    assert other_subset[0].startswith("data.name=me/mine cannot be reached on the Hugging Face hub and is not in this machine's cache (")
    assert "small" in other_subset[0]
