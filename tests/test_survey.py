"""`tptrain data`: its numbers beside a count by hand, its samples, its picture, and stores that are damaged."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.command import command, environment
from tests.data.test_store_damage import flip
from tests.support import small_config
from tptrain import cli
from tptrain.config import Config, ConfigError
from tptrain.data import prepare
from tptrain.data.sampler import epoch_key, permute
from tptrain.data.verify import prepare_verified, verify
from tptrain.monitor.draw_lengths import bin_edges
from tptrain.survey import count as counting
from tptrain.survey.count import Lengths, count_lengths
from tptrain.survey.parts import Part, parts_of
from tptrain.survey.samples import END, sample_text, shown

TEXTS = {f"{number:02}.txt": f"{number}é\n" * number + f"text {number} :smile: [bold]\x1b[31m" for number in range(40)}
TEXTS["empty.txt"] = ""
"""41 documents, one of them empty, with what a terminal might not show as it is."""
PICTURE = "plots/document_lengths.png"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the texts in `notes` and five rows, two alike, in rows.jsonl."""
    (tmp_path / "notes").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "notes" / name).write_text(text)
    rows = ["abc", "abc", "x" * 50, "", "y" * 20]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tptrain"])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def say(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What `tptrain data` prints, inside this process, with the run folder `run`."""
    assert cli._run(["data", "hydra.run.dir=run", "data.seq_len=16", "model.max_seq_len=16", *overrides]) == 0
    return capsys.readouterr().out


def row(said: str, label: str) -> list[str]:
    """The cells of one row of the table."""
    (line,) = [line for line in said.splitlines() if line.startswith(f"│ {label} ")]
    return [cell.strip() for cell in line.split("│")[2:-1]]


def cells(texts: list[str]) -> list[str]:
    """What the table must say of documents in UTF-8 bytes, counted the plain way: documents, tokens, mean, median, longest, ids."""
    encoded = [[*text.encode(), 256] for text in texts]
    lengths = [len(ids) for ids in encoded]
    used = len(set().union(*encoded))
    sizes = [f"{np.mean(lengths):,.1f}", f"{np.median(lengths):,.1f}", f"{max(lengths):,}"]
    return [f"{len(texts)}", f"{sum(lengths):,}", *sizes, f"{used} of 257 ({100 * used / 257:.1f} %)"]


# ---- the command -----------------------------------------------------------------------------------------


def test_the_numbers_of_a_folder_of_text(here: Path, capsys) -> None:
    said = say(capsys, "data=text", "data.path=notes", "data.val_fraction=0", "train.eval_steps=0", "train.max_steps=7")
    tokens = sum(len(text.encode()) + 1 for text in TEXTS.values())
    epochs = 7 * 16 / ((tokens - 1) // 16)
    assert row(said, "text") == [*cells(list(TEXTS.values())), f"{epochs:.3g}"]
    assert "held out" not in said
    assert f"7 steps of 16 sequences of 16 tokens: {epochs:.3g} epochs" in said


def test_a_split_and_what_is_held_out_of_it_are_all_the_text(here: Path, capsys) -> None:
    said = say(capsys, "data=text", "data.path=notes", "data.val_fraction=0.25")
    train, held_out, whole = row(said, "text"), row(said, "text, held out"), cells(list(TEXTS.values()))
    assert [int(train[0]) + int(held_out[0]), int(train[1].replace(",", "")) + int(held_out[1].replace(",", ""))] == [
        int(whole[0]),
        int(whole[1].replace(",", "")),
    ]
    assert int(held_out[0]) == round(0.25 * 41)
    assert held_out[-1] == "", "no epochs of what is not trained on"


def test_five_samples_are_of_the_text_and_safe(here: Path, capsys) -> None:
    said = say(capsys, "data=text", "data.path=notes", "data.val_fraction=0", "train.eval_steps=0")
    samples = [line[12:] for line in said.splitlines() if line.startswith("sample ")]
    stream = [byte for _, text in sorted(TEXTS.items()) for byte in (*text.encode(), 256)]
    windows = (len(stream) - 1) // 16
    for number, sample in enumerate(samples):
        start = 16 * permute(number, windows, epoch_key(1234, 0))
        ids = stream[start : start + 17]
        text = b"".join(b"[end]" if byte == 256 else bytes([byte]) for byte in ids).decode(errors="replace")
        assert sample == repr(text)[1:-1]
    assert len(set(samples)) == 5
    assert "\x1b" not in said


def test_the_picture_is_a_png_in_the_run_folder(here: Path, capsys) -> None:
    said = say(capsys, "data=text", "data.path=notes")
    assert f"picture     {here / 'run' / PICTURE}" in said
    data = (here / "run" / PICTURE).read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert min(struct.unpack(">II", data[16:24])) > 500


def test_a_mixture_with_a_validation_set(here: Path, capsys) -> None:
    mixture = "+data.mixture={mine: {source: text, path: notes, weight: 3}, rows: {source: jsonl, path: rows.jsonl}}"
    sets = "+data.val_sets={own: {source: jsonl, path: rows.jsonl}}"
    said = say(capsys, "data=mixture", mixture, sets, "data.val_fraction=0", "train.max_steps=10")
    rows = cells(["abc", "abc", "x" * 50, "", "y" * 20])
    assert row(said, "val_sets.own") == [*rows, ""]
    assert row(said, "rows")[:-1] == rows
    assert row(said, "mine")[:-1] == cells(list(TEXTS.values()))
    windows = (int(rows[1]) - 1) // 16
    assert row(said, "rows")[-1] == f"{160 / 4 / windows:.3g}", "a quarter of the samples"


def test_a_stream_is_shown_and_not_counted(here: Path, capsys) -> None:
    rows = [f"row {number} of many" for number in range(60)]
    (here / "stream.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    overrides = ["data=jsonl", "data.path=stream.jsonl", "data.streaming=true", "data.val_fraction=0", "data.val_documents=10"]
    said = say(capsys, *overrides, "data.stream_lanes=2", "data.shuffle_buffer=4")
    assert row(said, "first 10, held out") == [*cells(rows[:10]), ""]
    assert sum(line.startswith("│ ") for line in said.splitlines()) == 1
    assert "read while training, and not counted" in said
    samples = [line[12:] for line in said.splitlines() if line.startswith("sample ")]
    assert len(set(samples)) == 5
    for sample in samples:
        first, *_, last = sample.split(END)
        assert any(text.endswith(first) for text in rows[10:])
        assert any(text.startswith(last) for text in rows[10:])


def test_memorize_has_numbers_for_text_and_no_picture(here: Path, capsys) -> None:
    said = say(capsys, "data=memorize", "data.num_sequences=20", "data.vocab_size=50")
    assert row(said, "memorize")[:5] == ["", "321", "", "", ""]
    (first,) = re.findall(r"^sample 0 +([\d ]+)$", said, re.M)
    assert all(0 <= int(number) < 50 for number in first.split())
    assert not (here / "run" / "plots").exists()


REFUSED = {
    "no data": (["data=text", "data.path=/nope"], "data.path=/nope does not exist"),
    "vocabulary": (["data=text", "data.path=notes", "model.vocab_size=100"], "model.vocab_size=100 is below the byte tokenizer's 257 ids"),
    "launcher": (["data=text", "data.path=notes"], "run it without torchrun"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(here: Path, name: str) -> None:
    overrides, message = REFUSED[name]
    outcome = command(here, "data", *overrides, **({"RANK": "0", "WORLD_SIZE": "2"} if name == "launcher" else {}))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("tptrain: ")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err
    assert not list(here.rglob(".hydra"))


def test_a_run_folder_that_cannot_be_written_to_is_refused(here: Path, capsys) -> None:
    (here / "run").mkdir()
    (here / "run" / "plots").write_text("in the way")
    with pytest.raises(SystemExit, match="2"):
        say(capsys, "data=text", "data.path=notes")
    assert "use hydra.run.dir=FOLDER" in capsys.readouterr().err


def test_no_torch(here: Path) -> None:
    script = "import sys; sys.argv = ['tptrain', 'data', 'data=text', 'data.path=notes']\nfrom tptrain.cli import main\n" + (
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=here, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "False")


# ---- damage ----------------------------------------------------------------------------------------------


def config_of(here: Path, **data: object) -> Config:
    values = {"source": "text", "path": str(here / "notes"), "store_dir": str(here / "stores"), "val_fraction": 0.1, **data}
    return small_config(**{f"data__{key}": value for key, value in values.items()})


@pytest.mark.parametrize("file", ["train-00000.tokens", "val.offsets"])
def test_damage_that_a_start_does_not_see_is_named_and_repaired(here: Path, file: str) -> None:
    config, said = config_of(here), list[str]()
    folder = prepare(config, said.append)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "meta.json"}
    flip(folder / file, 20)
    assert prepare(config, said.append) == folder, "sizes and times are the same"
    assert (folder / file).read_bytes() != before[file]
    said.clear()
    assert prepare_verified(config, said.append)[0] == folder
    assert any(line.startswith(f"{folder / file}, bytes 0 to ") and line.endswith("making it anew") for line in said)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "meta.json"} == before
    assert verify(folder) == []


def test_every_store_of_a_run_is_verified(here: Path) -> None:
    from tptrain.data_config import SourceConfig

    config = config_of(here, val_sets={"own": SourceConfig(source="jsonl", path=str(here / "rows.jsonl"))})
    _, stores = prepare_verified(config, lambda line: None)
    flip(stores.val_sets["own"] / "train-00000.tokens", 0)
    said: list[str] = []
    prepare_verified(config, said.append)
    assert any("train-00000.tokens, bytes" in line for line in said)
    assert verify(stores.val_sets["own"]) == []


def test_damage_that_cannot_be_repaired_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder that somebody else owns: the mark cannot be left, so the builder finds nothing."""
    config = config_of(here)
    folder = prepare(config, lambda line: None)
    flip(folder / "train-00000.tokens", 0)

    def refuse_to_write(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse_to_write)
    with pytest.raises(ConfigError, match=r"cannot be made again \(.*train-00000.tokens, bytes .*: use data.store_dir="):
        prepare_verified(config, lambda line: None)


# ---- counting --------------------------------------------------------------------------------------------


def lengths_of(found: Lengths) -> list[int]:
    return np.repeat(found.tokens, found.documents).tolist()


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_lengths_by_pieces_are_all_lengths(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(counting, "_DOCUMENTS_AT_ONCE", at_once)
    generator = np.random.default_rng(at_once)
    for documents in (1, 2, 7, 50, 51):
        lengths = generator.integers(1, 20, documents)
        found = count_lengths(np.concatenate([[0], np.cumsum(lengths)]))
        assert lengths_of(found) == sorted(lengths.tolist())
        assert (found.mean, found.median, found.longest) == (pytest.approx(lengths.mean()), np.median(lengths), lengths.max())


def test_of_nothing() -> None:
    found = count_lengths(np.array([0]))
    assert (found.mean, found.median, found.longest, lengths_of(found)) == (0, 0, 0, [])


def test_ids_by_pieces_are_all_ids(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(here)
    _, stores = prepare_verified(config, lambda line: None)
    whole = parts_of(config.data, stores)
    monkeypatch.setattr(counting, "_IDS_AT_ONCE", 5)
    pieces: list[Part] = parts_of(config.data, stores)
    assert [part.counts.ids_used for part in pieces] == [part.counts.ids_used for part in whole]
    assert whole[0].counts.ids_used > 20


def test_every_length_is_in_one_bin() -> None:
    for shortest in range(1, 40):
        for longest in (shortest, shortest + 1, 100, 12_345):
            if longest >= shortest:
                edges = bin_edges(shortest, longest)
                assert edges[0] < shortest <= longest < edges[-1]
                assert (np.diff(edges) >= 1).all()
                assert (edges % 1 == 0.5).all()


# ---- text ------------------------------------------------------------------------------------------------


def test_ends_of_documents_are_seen() -> None:
    from tptrain.data import ByteTokenizer

    tokenizer = ByteTokenizer()
    assert sample_text(np.array([*b"ab", 256, 256, *"é".encode()]), tokenizer) == f"ab{END}{END}é"
    assert sample_text(np.array([*b"ab", 256]), tokenizer) == f"ab{END}"
    assert sample_text(np.array([3, 1]), None) == "3 1"


def test_a_text_is_shown_without_what_steers_a_terminal() -> None:
    assert shown("a\x1b]0;x\x07\u202eb\u0085\\", 99) == r"a\x1b]0;x\x07\u202eb\x85" + "\\\\"
    assert shown("né日", 99) == "né日"
    assert shown("né日", 99, "latin-1") == r"né\u65e5"
    assert shown("abcdef", 4) == "abcd..."
    assert os.linesep not in shown("\r\n", 9)
