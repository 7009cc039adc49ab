"""`tptrain generate`: from a small run's folder to a text on stdout, and what it refuses."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from tests.command import command, start
from tests.ranks import run_ranks
from tests.support import SMALL, small_config
from tptrain import answer, cli, launch
from tptrain.arguments import as_text
from tptrain.config import Config, ConfigError
from tptrain.data.tokenizers import ByteTokenizer
from tptrain.failures import JobFailed
from tptrain.generate import Output
from tptrain.generate_config import GenerateConfig
from tptrain.job import Job, literal
from tptrain.mesh import build_mesh
from tptrain.trained_stage import load_stage

TEXT = "".join(f"def f{i}(x):\n    return {i} * x\n\n" for i in range(200))
CONTEXT = 24
PROMPT, OTHER = "def f", "é ${x} 'q'\n"
OUR_KEYS = ("data=", "data.", "model.vocab_size", "model.max_seq_len")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned text, split over two ranks."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT)
    small = [argument for argument in SMALL if not argument.startswith(OUR_KEYS)]
    more = ["data=text", f"data.path={folder / 'text.txt'}", "data.seq_len=16", "data.val_fraction=0", "data.store_dir=stores"]
    more += [f"model.max_seq_len={CONTEXT}", "train.max_steps=30", "checkpoint.every=20", "train.eval_steps=0", "train.sample_tokens=0"]
    outcome = command(folder, *small, *more, "parallel.tp=2", "hydra.run.dir=run")
    assert outcome.code == 0, outcome.err
    return folder / "run"


def generate(run_dir: Path, *arguments: str, tmp: Path):
    """The command with a temporary folder of its own, which must be empty afterwards; the run folder must be as it was."""
    before = contents(run_dir.parent)
    outcome = command(run_dir.parent, "generate", "run=run", "hardware=cpu", *arguments, TMPDIR=str(tmp))
    assert contents(run_dir.parent) == before
    assert not list(tmp.glob("tptrain*")), "it leaves nothing behind"
    return outcome


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def by_whole_forward(run_dir: Path, prompt: str, checkpoint: str) -> str:
    """What the model goes on with, greedily, without anything of the verb but its loading."""
    config: Config = Job.load("train", run_dir, run_dir).config
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = build_mesh(replace(config.parallel, tp=1), torch.device("cpu"), 60)
        stage = load_stage(config, run_dir / "checkpoints" / checkpoint, mesh)
        tokens = list(prompt.encode()) or [256]
        while len(tokens) < CONTEXT and tokens[1:].count(256) == 0:
            with torch.no_grad():
                tokens.append(int(stage(torch.tensor([tokens]))[0, -1].argmax()))
    finally:
        dist.destroy_process_group()
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def test_greedy_text_is_that_of_the_whole_forward_under_any_tp(run_dir: Path, tmp_path: Path) -> None:
    alone = generate(run_dir, f"prompt={PROMPT}", "temperature=0", tmp=tmp_path)
    assert alone.code == 0, alone.err
    assert alone.out == by_whole_forward(run_dir, PROMPT, "step-00000030") + "\n"
    assert alone.err.startswith(f"tptrain: {CONTEXT - len(PROMPT)} tokens, ")
    assert alone.err.count("\n") == 1
    staged = generate(run_dir, f"prompt={PROMPT}", "temperature=0", "parallel.pp=2", tmp=tmp_path)
    assert (staged.code, staged.out) == (0, alone.out), staged.err
    assert staged.err.startswith(f"tptrain: {CONTEXT - len(PROMPT)} tokens, ")
    assert staged.err.count("\n") == 1

    escaped = OTHER.replace("$", "\\$").replace("'", "\\'")  # as Hydra and OmegaConf want it
    prompts = f"prompt=['{PROMPT}','{escaped}']"
    split = generate(run_dir, prompts, "parallel.tp=2", "temperature=0", "max_new_tokens=9", tmp=tmp_path)
    assert split.code == 0, split.err
    first = alone.out[: len(PROMPT) + 9]
    assert split.out.startswith(first + "\n" + OTHER)
    second = split.out.removeprefix(first + "\n")
    assert second.removesuffix("\n") == by_whole_forward(run_dir, OTHER, "step-00000030")[: len(second) - 1]
    assert split.err.splitlines()[:2] == ["tptrain: text 1 of 2", "tptrain: text 2 of 2"]
    assert len(split.err.splitlines()) == 3
    both = generate(run_dir, prompts, "parallel.tp=2", "parallel.pp=2", "temperature=0", "max_new_tokens=9", tmp=tmp_path)
    assert (both.code, both.out, both.err.splitlines()[:2]) == (0, split.out, split.err.splitlines()[:2]), both.err


def test_each_stage_loads_its_layers_by_name(run_dir: Path) -> None:
    """Every parameter is that of the whole model, and the stages together have them all; the tied embedding twice."""
    names = run_ranks(3, check_stage_weights, run_dir)
    assert names[0] & names[2] == {"embedding.weight"}
    assert not names[1] & (names[0] | names[2])


def check_stage_weights(rank: int, run_dir: Path) -> set[str]:
    config: Config = Job.load("train", run_dir, run_dir).config
    checkpoint = run_dir / "checkpoints" / "step-00000030"
    whole = load_stage(config, checkpoint, build_mesh(replace(config.parallel, tp=1, dp=3), torch.device("cpu"), 60))
    stage = load_stage(config, checkpoint, build_mesh(replace(config.parallel, tp=1, pp=3), torch.device("cpu"), 60))
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter.to_local(), whole.get_parameter(name).to_local()), name
    gathered: list[set[str]] = [set()] * 3
    dist.all_gather_object(gathered, {name for name, _ in stage.named_parameters()})
    assert set.union(*gathered) == {name for name, _ in whole.named_parameters()}
    assert list(stage.layers) == [["0", "1"], ["2"], ["3"]][rank]
    return gathered[rank]


def test_an_earlier_checkpoint_and_a_reader_that_leaves(run_dir: Path, tmp_path: Path) -> None:
    earlier = generate(run_dir, "checkpoint=step-00000020", "temperature=0", "echo=false", tmp=tmp_path)
    assert earlier.out == by_whole_forward(run_dir, "", "step-00000020") + "\n"

    for layout in ("parallel.pp=1", "parallel.pp=2"):
        process = start(run_dir.parent, "generate", "run=run", "hardware=cpu", layout, TMPDIR=str(tmp_path))
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as `| head` does
        errors = process.stderr.read()
        assert process.wait(60) == 0
        assert errors.startswith("tptrain: ")
        assert errors.count("\n") == 1
        assert int(errors.split()[1]) < CONTEXT - 1, "it stopped before the last token"
        assert not list(tmp_path.glob("tptrain*"))


def test_bf16_weights_are_the_rounded_ones(run_dir: Path) -> None:
    config: Config = Job.load("train", run_dir, run_dir).config
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = build_mesh(replace(config.parallel, tp=1), torch.device("cpu"), 60)
        checkpoint = run_dir / "checkpoints" / "step-00000030"
        exact = load_stage(config, checkpoint, mesh)
        rounded = load_stage(replace(config, train=replace(config.train, precision="bf16")), checkpoint, mesh)
        ours = dict(rounded.named_parameters())
        for name, parameter in exact.named_parameters():
            assert torch.equal(ours[name].to_local(), parameter.to_local().bfloat16()), name
        assert rounded(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    finally:
        dist.destroy_process_group()


def test_a_tokenizer_learned_by_the_run(tmp_path: Path) -> None:
    """From training to text: the run folder is enough, also where the data and the token store are gone."""
    (tmp_path / "text.txt").write_text(TEXT)
    small = [argument for argument in SMALL if not argument.startswith(OUR_KEYS)]
    more = ["data=text", "data.path=text.txt", "data.seq_len=16", "data.store_dir=stores", f"model.max_seq_len={CONTEXT}"]
    more += ["data.tokenizer.name=train", "data.tokenizer.vocab_size=400", "train.eval_steps=0", "hydra.run.dir=run"]
    more += ["model.vocab_size=400", "train.max_steps=30", "checkpoint.every=0", "train.sample_tokens=4", "data.val_fraction=0"]
    outcome = command(tmp_path, *small, *more)
    assert (outcome.code, outcome.err) == (0, "")
    plain = Tokenizer.from_file(str(tmp_path / "run" / "tokenizer.json"))
    assert 257 < plain.get_vocab_size() <= 400
    for gone in ("stores", "text.txt"):
        (tmp_path / gone).rename(tmp_path / f"{gone} is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        asked = cli.compose(["run=run", f"prompt={PROMPT}", "hardware=cpu"], "generate")
        assert isinstance(asked, GenerateConfig)
        assert answer.settle(asked).max_new_tokens == CONTEXT - len(plain.encode(PROMPT).ids)
    written = generate(tmp_path / "run", f"prompt={PROMPT}", "temperature=0", "max_new_tokens=9", tmp=tmp_path)
    assert written.code == 0, written.err
    assert written.out == by_whole_ids(tmp_path / "run", plain, PROMPT, 9) + "\n"


def by_whole_ids(run_dir: Path, plain: Tokenizer, prompt: str, count: int) -> str:
    """What the model writes when all is computed anew for each token, and decoded at once."""
    ids, end = plain.encode(prompt).ids, plain.token_to_id("<|endoftext|>")
    config: Config = Job.load("train", run_dir, run_dir).config
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        stage = load_stage(config, run_dir / "checkpoints" / "step-00000030", build_mesh(config.parallel, torch.device("cpu"), 60))
        with torch.no_grad():
            for _ in range(count):
                ids.append(int(stage(torch.tensor([ids]))[0, -1].argmax()))
                if ids[-1] == end:
                    break
    finally:
        dist.destroy_process_group()
    return plain.decode(ids)


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.fixture
def run_here(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command inside this process, in the folder above the run's: its exit code and its stderr."""
    monkeypatch.chdir(run_dir.parent)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["tptrain"])
    monkeypatch.setattr(launch, "run", lambda job: pytest.fail("ranks were started"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    before = contents(run_dir.parent)

    def run(*arguments: str) -> str:
        try:
            code = cli._run(["generate", *arguments])
        except ConfigError as error:
            return str(error)
        except SystemExit as leaving:
            code = leaving.code
        assert code == 2
        return capsys.readouterr().err.removeprefix("tptrain: ")

    yield run
    assert contents(run_dir.parent) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "run=??? has no value: use run=VALUE"),
        ("run=nope", "run=nope is no folder: use a run folder"),
        ("run=run/logs", "run=run/logs has no config.yaml"),
        ("run=run checkpoint=step-00000010", "checkpoint=step-00000010 is no complete checkpoint: use latest, step-00000020, step-"),
        ("run=run parallel.tp=3", "parallel.tp=3 does not divide model.num_heads=4: use 1, 2 or 4"),
        ("run=run parallel.tp=0", "parallel.tp=0 is below 1: use 1 or more"),
        ("run=run parallel.pp=0", "parallel.pp=0 is below 1: use 1 or more"),
        ("run=run parallel.pp=5", "parallel.pp=5 needs a layer a stage, but the run's model has 4: use 4 or less"),
        ("run=run top_p=0", "top_p=0.0 is no share: use a number above 0"),
        ("run=run top_p=1.1", "top_p=1.1 is no share: use a number above 0"),
        ("run=run top_k=0", "top_k=0 is below 1: use 1 or more"),
        ("run=run temperature=-1", "temperature=-1.0 is below 0: use 0 or more"),
        ("run=run temperature=inf", "temperature=inf is not finite: use"),
        ("run=run temperature=nan", "temperature=nan is below 0: use"),
        ("run=run max_new_tokens=0", "max_new_tokens=0 is below 1: use 1 or more"),
        ("run=run max_new_tokens=20 prompt=12345", "max_new_tokens=20 + prompt of 5 tokens is over model.max_seq_len=24: use 19 or less"),
        ("run=run prompt=" + "x" * 24, "prompt=" + "x" * 24 + " has 24 tokens, and model.max_seq_len=24 leaves no room"),
        ("run=run prompt=\udcff", "prompt is no UTF-8 text"),
        ("run=run prompt=[1]", "prompt=[1] is no text: use"),
        ("run=run prompt=[]", "prompt=[] is no text: use"),
        ("run=run tempratur=1", "tempratur=1 is an unknown key: use temperature"),
        ("run=run +foo=3", "foo=3 is an unknown key: see"),
        ("run=run max_new_tokens=x", "max_new_tokens=x is not an integer: use"),
        ("run=run -m seed=1,2", "-m starts one job after another"),
        ("run=run hardware.device=tpu", "hardware.device=tpu is unknown: use"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_in_one_line(run_here, arguments: str, message: str) -> None:
    said = run_here(*arguments.split())
    assert said.startswith(message), said
    assert "\n" not in said.rstrip("\n")


def test_refused_runs(run_here, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a checkpoint, one whose data is no text, one with a checkpoint of another model, a broken config.yaml."""
    text = (run_dir / "config.yaml").read_text()
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    assert "has no complete checkpoint: train until" in run_here(f"run={folder}")
    (folder / "config.yaml").write_text(text.replace("num_layers: 4", "num_layers: 5"))
    said = run_here(f"run={folder}", f"checkpoint={run_dir / 'checkpoints' / 'step-00000030'}")
    assert "is of another model: its model.num_layers is 4, and that of" in said
    (folder / "config.yaml").write_text(text.replace("source: text", "source: memorize"))
    said = run_here(f"run={folder}", f"checkpoint={run_dir / 'checkpoints' / 'step-00000030'}")
    assert "learned data.source=memorize, whose tokens stand for no text: use" in said
    (folder / "config.yaml").write_text("model: 3\n")
    assert "has a config.yaml that this tptrain cannot read (" in run_here(f"run={folder}")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "run it without torchrun" in run_here("run=run")


@pytest.mark.parametrize(("error", "left"), [(launch.Stopped("stopped"), 0), (JobFailed("a rank failed"), 1), (ConfigError("no"), 0)])
def test_only_a_failure_leaves_its_logs(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, left: int):
    def fail(job: Job) -> None:
        (job.run_dir / "logs").mkdir()
        raise error

    monkeypatch.setattr(launch, "run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = cli.compose([f"run={run_dir}", "hardware=cpu"], "generate")
    with pytest.raises(type(error)):
        answer.generate(config)
    assert len(list(tmp_path.iterdir())) == left


def test_how_the_run_was_cut_does_not_matter(run_dir: Path) -> None:
    """Its schedule, its stages and its partition are those of the training."""
    interleaved = small_config(parallel__pp=2, parallel__schedule="interleaved", parallel__stages_per_rank=2)
    listed = small_config(parallel__pp=2, parallel__partition=[3, 1])
    for trained in (interleaved, listed):
        for pp in (1, 4):
            config = cli.compose([f"run={run_dir}", f"parallel.pp={pp}", "parallel.tp=2", "hardware=cpu"], "generate")
            resolved = answer.launch.settle(answer._in_layout(trained, config), None)
            assert resolved.processes == config.processes == 2 * pp


def test_tokens_asked_for_by_default(run_dir: Path) -> None:
    """What is left of the context, but not more than 200."""
    trained = small_config(model__max_seq_len=1000)
    config = cli.compose([f"run={run_dir}", "prompt=abc", "hardware=cpu"], "generate")
    assert answer.settle(config).max_new_tokens == CONTEXT - 3
    assert answer._new_tokens(config, trained, 3) == 200
    assert answer._new_tokens(config, trained, 990) == 10


# ---- the command line ------------------------------------------------------------------------------------


def test_help_and_config_are_its_own(run_here, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli._run(["generate", "--help"])
    assert not leaving.value.code
    shown = capsys.readouterr().out
    assert "tptrain generate run=outputs/my_run" in shown
    assert "temperature: 0.8" in shown
    assert "Exit codes" in shown
    assert "optimizer" not in shown
    cli._run(["generate", "--cfg", "job", "run=run", "checkpoint=step-00000020", "hardware=cpu"])
    shown = capsys.readouterr().out
    assert OmegaConf.create(shown).checkpoint.load == "step-00000020"
    assert OmegaConf.create(shown).hardware.device == "cpu"


TEXTS = st.text(alphabet="\\'\"${}[](),=: aé\n#~!*", max_size=12).filter(lambda text: text[:1] not in ("'", '"', "["))


def test_the_command_line_becomes_the_config() -> None:
    config = cli.compose(["run=x", "prompt=def f('${a}'", "checkpoint=a=b"], "generate")
    assert isinstance(config, GenerateConfig)
    assert (config.prompts, config.checkpoint.load) == (["def f('${a}'"], "a=b")
    config = cli.compose(["run=x", "prompt=['one, two',\"three\"]"], "generate")
    assert isinstance(config, GenerateConfig)
    assert config.prompts == ["one, two", "three"]


@settings(deadline=None)
@given(TEXTS)
def test_a_prompt_is_the_text_as_it_stands(text: str) -> None:
    """On the command line, and on its way to the ranks."""
    override = OverridesParser.create().parse_override(as_text(f"prompt={text}", {"prompt": "prompt"}))
    config = OmegaConf.to_object(OmegaConf.create({override.key_or_group: override.value()}))
    assert config == {"prompt": text}
    there = OmegaConf.to_object(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(literal({"prompt": [text]})))))
    assert there == {"prompt": [text]}


# ---- what is shown -----------------------------------------------------------------------------------------


class Stdout(io.TextIOWrapper):
    """A stdout whose bytes can be seen, as a pipe or as a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def take(self) -> str:
        """What was written since the last call."""
        self.flush()
        text = self.buffer.getvalue().decode()
        self.buffer.seek(0)
        self.buffer.truncate()
        return text


def test_a_text_is_shown_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stdout := Stdout(terminal=False))
    output = Output(["Is "], ByteTokenizer(), echo=True)
    assert stdout.take() == "Is "
    shown = []
    for byte in "né€\x1b".encode():
        assert output.add([byte]) == 1
        shown.append(stdout.take())
    assert shown == ["n", "", "é", "", "", "€", "\x1b"]
    assert output.add([0xE2]) == 1, "and the rest of it never comes"
    assert output.add([256]) == 1
    assert stdout.take() == "\ufffd\n"
    assert output.add([65]) == 0
    output.finish()
    assert stdout.take() == ""


def test_several_texts_are_shown_one_after_another(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", stdout := Stdout(terminal=True))
    output = Output(["a", "b", "c"], ByteTokenizer(), echo=False)
    shown = []
    for tokens in ([49, 50, 51], [27, 256, 51], [256, 0, 51]):
        output.add(tokens)
        shown.append((stdout.take(), capsys.readouterr().err))
    output.finish()
    shown.append((stdout.take(), capsys.readouterr().err))
    label = "tptrain: text {} of 3\n".format
    assert shown == [("1", label(1)), ("\u241b", ""), ("\n2\n333", label(2) + label(3)), ("\n", "")]
