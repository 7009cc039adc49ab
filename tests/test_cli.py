"""The command line: what is refused and how, what is quick, and that every shipped YAML is sound."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command import command, environment
from tptrain import cli
from tptrain.config import ConfigError, resolve
from tptrain.typed_config import typed

OPTIONS = {group.name: sorted(path.stem for path in group.glob("*.yaml")) for group in cli.CONF.iterdir() if group.is_dir()}

REFUSED = {
    "tp": (["parallel.tp=3"], "parallel.tp=3", "use 1, 2 or 4"),
    "pp": (["model.num_layers=1", "parallel.pp=2"], "parallel.pp=2", "use parallel.pp=1"),
    "unknown key": (["optimizer.lrr=1"], "optimizer.lrr=1", "use optimizer.lr "),
    "unknown option": (["model=gpt_9b"], "model=gpt_9b", "use gpt_1b, "),
    "no data": (["data=text", "data.path=/nope.txt"], "data.path=/nope.txt", "use "),
    "sequence": (["data.seq_len=999"], "data.seq_len=999", "use data.seq_len=128 or less"),
    "sign": (["optimizer.lr=-1"], "optimizer.lr=-1", "use 0 or more"),
    "folder": (["hydra.run.dir=/proc/nope"], "hydra.run.dir=/proc/nope", "use hydra.run.dir=FOLDER"),
    "type": (["optimizer.lr=abc"], "optimizer.lr=abc", "use a number"),
    "flag": (["--foo"], "--foo", "see tptrain --hydra-help"),
    "verb": (["trian", "seed=1"], "trian", "use train"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str, tmp_path: Path):
    arguments, key, remedy = REFUSED[name]
    outcome = command(tmp_path, *arguments)
    print(f"{outcome.seconds:.2f} s {outcome.err}")
    _check_refusal(outcome.err, key, remedy)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.seconds < 20  # 0.4 s alone on the machine
    assert not list(tmp_path.rglob("*.log"))
    assert not list(tmp_path.rglob(".hydra"))


def _check_refusal(err: str, key: str, remedy: str) -> None:
    assert err.startswith("tptrain: ")
    assert err.count("\n") == 1
    assert key in err
    assert remedy in err


@pytest.mark.parametrize("rank", [0, 3])
def test_refused_under_torchrun_variables(rank: int, tmp_path: Path):
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    outcome = command(tmp_path, "parallel.tp=2", "parallel.dp=3", **variables)
    assert outcome.code == 2
    line = "tptrain: parallel.dp=3 gives tp 2 x pp 1 x dp 3 = 6 processes, but 4 were started: use parallel.dp=2\n"
    assert outcome.err == (line if rank == 0 else "")
    assert not list(tmp_path.rglob(".hydra"))


def test_refused_under_torchrun(tmp_path: Path):
    outcome = command(tmp_path, "parallel.tp=2", "parallel.dp=3", torchrun=4)
    assert outcome.code != 0
    assert outcome.err.count("tptrain: parallel.dp=3 gives") == 1
    assert "use parallel.dp=2" in outcome.err
    assert not list(tmp_path.rglob(".hydra"))


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command inside this process: fast, and errors come as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["tptrain"])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return lambda *arguments: cli._run(list(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("modle=gpt_1b", "modle=gpt_1b is an unknown key: use model"),
        ("max_steps=3", "max_steps=3 is an unknown key: use train.max_steps"),
        ("parallel.tp=two", "parallel.tp=two is not an integer: use 1, 2, ..."),
        ("parallel.dp=2.5", "parallel.dp=2.5 is not an integer or auto: use 1, 2, ... or auto"),
        ("model.num_layers=1e9", "model.num_layers=1e9 is not an integer: use"),
        ("train.compile=maybe", "train.compile=maybe is not true or false: use"),
        ("optimizer.betas=[a,b]", "optimizer.betas=[a,b] is not a list of numbers: use"),
        ("train=3", "train=3 is not a group of keys: use train.KEY=VALUE"),
        ("optimizer.lr=[", "optimizer.lr=[ cannot be read"),
        ("seed=1 train", "train cannot be read"),
        ("seed=1,2", "seed=1,2 has several values: use tptrain -m"),
        ("hydra.foo=1", "hydra.foo=1 is an unknown key: see tptrain --cfg hydra"),
        ("hydra.run.dir=${nope}", "hydra.run.dir=${nope} cannot be resolved"),
        ("hydra/launcher=basi", "hydra/launcher=basi is unknown: use basic"),
        ("--config-dir /nope", "/nope"),
        ("--cfg nope", "invalid choice: 'nope'"),
    ],
)
def test_hydra_errors_become_refusals(run_here, arguments: str, message: str):
    with pytest.raises(ConfigError) as refusal:
        run_here(*arguments.split())
    text = str(refusal.value)
    assert message in text
    assert ": " in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+optimizer.lrr=1", "optimizer.lrr=1 is an unknown key: use optimizer.lr"),
        ("+foo=1", "foo=1 is an unknown key: see"),
        ("~model", "model.name=??? has no value: use model.name=VALUE"),
        ("data.path=${nope}", "data.path=${nope} cannot be resolved"),
    ],
)
def test_refused_after_composing(run_here, capsys, tmp_path: Path, override: str, message: str):
    with pytest.raises(SystemExit) as leaving:
        run_here(override)
    assert leaving.value.code == 2
    _check_refusal(capsys.readouterr().err, message, ": ")
    assert not list((tmp_path / "outputs").iterdir())


def test_a_bad_key_in_a_yaml_names_the_file(run_here, tmp_path: Path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "bad.yaml").write_text("# @package _global_\noptimizer:\n  lr: abc\n")
    with pytest.raises(ConfigError, match=r"experiment/bad.yaml: optimizer.lr=abc is not a number"):
        run_here("--config-dir", str(tmp_path / "mine"), "experiment=bad")


def test_a_refused_run_keeps_a_folder_that_has_more_in_it(run_here, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(SystemExit):
        run_here("optimizer.lr=-1", "hydra.run.dir=mine")
    assert (tmp_path / "mine" / "notes").read_text() == "mine"


def test_an_unmakeable_sweep_folder(run_here):
    with pytest.raises(ConfigError, match=r"hydra.sweep.dir=/proc/nope cannot be made .*: use hydra.sweep.dir="):
        run_here("-m", "seed=1,2", "hydra.sweep.dir=/proc/nope")


def test_a_sweep_names_the_refused_job_and_exits_2(run_here, capsys):
    assert run_here("-m", "optimizer.lr=-1,-2") == 2
    err = capsys.readouterr().err
    assert "tptrain: job 0 (optimizer.lr=-1): optimizer.lr=-1.0 is below 0" in err
    assert "tptrain: job 1 (optimizer.lr=-2): optimizer.lr=-2.0 is below 0" in err


def test_the_jobs_of_a_sweep_are_one_group_in_wandb(run_here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    groups = []
    monkeypatch.setattr("tptrain.launch.start", lambda config, run_dir, place, apart=False: groups.append(config.wandb.group))
    run_here("-m", "seed=1,2")
    (folder,) = (path.parent for path in tmp_path.glob("outputs/multirun/*/*/0"))
    assert groups == [str(folder.relative_to(tmp_path))] * 2
    groups.clear()
    run_here("-m", "seed=1,2", "wandb.group=mine")
    run_here("seed=1")
    assert groups == ["mine", "mine", None]


def test_a_sweep_is_refused_under_torchrun(run_here, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"-m .* use tptrain -m seed=1,2, without torchrun"):
        run_here("seed=1,2", "-m")


def test_flags_may_stand_anywhere(run_here, capsys):
    run_here("train", "model=gpt_1b", "--cfg", "job", "parallel=tp4_pp2")
    shown = capsys.readouterr().out
    assert "name: gpt_1b" in shown
    assert "tp: 4" in shown


def test_completion_knows_overrides_also_after_a_verb(run_here, capsys, monkeypatch: pytest.MonkeyPatch):
    for line in ("tptrain model=gpt_12", "tptrain train model=gpt_12"):
        monkeypatch.setenv("COMP_LINE", line)
        run_here("-sc", "query=bash")
        assert capsys.readouterr().out.split() == ["model=gpt_125m"]
    monkeypatch.setenv("COMP_LINE", "tptrain generate temp")
    run_here("-sc", "query=bash")
    assert capsys.readouterr().out.split() == ["temperature="]


def test_what_needs_no_torch_imports_none(tmp_path: Path):
    heavy = ("torch", "datasets", "wandb", "rich", "numpy", "matplotlib")
    script = f"""
import json, sys
from tptrain.cli import main
sys.argv = ["tptrain", *json.loads(sys.argv[1])]
try:
    main()
finally:
    print(json.dumps([name for name in {heavy} if name in sys.modules]), file=sys.stderr)
"""
    other_verbs = ["generate", "--cfg", "job"], ["plot", "--help"], ["export", "--help"], ["eval", "--cfg", "job"]
    for arguments in (["--cfg", "job", "model=gpt_1b", "parallel=tp4_pp2"], ["--help"], ["parallel.tp=3"], *other_verbs):
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(arguments)], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == (2 if arguments == ["parallel.tp=3"] else 0)
        assert json.loads(done.stderr.splitlines()[-1]) == []


def test_help_shows_groups_and_exit_codes(tmp_path: Path):
    outcome = command(tmp_path, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    for text in ("gpt_175b", "tp8_pp4", "== Keys", "Exit codes"):
        assert text in outcome.out


# ---- the shipped configs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed():
    """Composes overrides into the typed config, without running anything."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    from tptrain.job import schema

    ConfigStore.instance().store(name="schema", node=schema())
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        yield lambda *overrides: typed(compose("config", list(overrides)))


def test_every_model_in_every_layout_resolves_or_is_refused(composed):
    """Groups compose independently of each other, so each option is composed once and the pairs are made from these."""
    layouts = [composed(f"parallel={layout}").parallel for layout in OPTIONS["parallel"]]
    for model in OPTIONS["model"]:
        config = composed(f"model={model}", "parallel=tp2_pp2")
        resolved, refused = [], []
        for layout in layouts:
            try:
                resolved.append(resolve(replace(config, parallel=layout)))
            except ConfigError as error:
                refused.append(str(error))
        assert len(resolved) > len(layouts) / 2, model
        assert all(": use " in text for text in refused), model


WHERE = {
    **{("data", name): ("data.path=notes",) for name in ("text", "jsonl", "parquet", "saved")},
    ("data", "hub"): ("data.name=owner/name",),
    ("data", "mixture"): ("+data.mixture={docs: {source: python_docs, weight: 3}, mine: {source: text, path: notes}}",),
}
"""What an option leaves to the user."""


@pytest.mark.parametrize("group", [group for group in OPTIONS if group not in ("model", "parallel", "slurm", "hydra")])
def test_every_other_option_resolves(composed, group: str):
    for option in OPTIONS[group]:
        resolve(composed(f"{group}={option}", *WHERE.get((group, option), ())))


@pytest.mark.parametrize("path", sorted(cli.CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(cli.CONF)))
def test_a_yaml_opens_with_the_command_that_uses_it(path: Path):
    lines = path.read_text().splitlines()
    first = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert first.startswith(("# tptrain", "# torchrun"))
