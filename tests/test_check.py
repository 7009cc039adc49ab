"""`tptrain check`: right layouts are equal; an error planted in one rank is found, and the parameter is named.

Plants change one thing in a trainer that is otherwise right. All of them run in one start of four ranks.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch
import torch.distributed as dist

from tests.command import command
from tests.ranks import run_ranks
from tests.support import SMALL, small_config
from tptrain import cli, launch, prove
from tptrain.config import Config, ConfigError, refuse_unprovable
from tptrain.data import prepare
from tptrain.failures import JobFailed
from tptrain.tensor_parallel.parameter import local_part
from tptrain.verdict import TENSORS, Finding, Verdict, judge, table_of_all, table_of_one

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "gpt, untied, no biases, sgd": {"model__tie_embeddings": False, "model__bias": False, "optimizer__name": "sgd"},
    "llama": {
        "model__position": "rope", "model__norm": "rmsnorm", "model__activation": "swiglu", "model__bias": False, "model__num_kv_heads": 2,
        "model__dropout": 0.1,
    },
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_pp2": {"tp": 2, "pp": 2}, "tp2_dp2": {"tp": 2, "dp": 2}, "pp2_dp2": {"pp": 2, "dp": 2, "schedule": "gpipe", "micro_batch_size": 2},
    "tp2_pp2_sp": {"tp": 2, "pp": 2, "sequence_parallel": True}, "tp4_sp": {"tp": 4, "sequence_parallel": True, "recompute": "full"},
    "pp2_dp2_zb_h1": {"pp": 2, "dp": 2, "schedule": "zb_h1", "micro_batch_size": 2}, "tp4": {"tp": 4},
    "dp4": {"dp": 4, "micro_batch_size": 2},
}  # fmt: skip
STEPS = 2


# ---- plants ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plant:
    """An error: `change` does it to a parameter on `ranks` at one moment of one step, and what must be found first."""

    change: Callable[[Any], None]
    moment: str
    name: str
    ranks: tuple[int, ...]
    step: int
    what: str
    layout: str = "tp2_pp2"


def double_gradient(parameter: Any) -> None:
    """One rank counts its share twice."""
    local_part(parameter.grad).mul_(2)


def half_gradient(parameter: Any) -> None:
    """Half of a sum is missing."""
    local_part(parameter.grad).mul_(0.5)


def nan_gradient(parameter: Any) -> None:
    """One element is no number."""
    local_part(parameter.grad).view(-1)[3] = float("nan")


def next_float(parameter: Any) -> None:
    """One element differs in its last bit."""
    values = local_part(parameter).view(-1)
    values[3] = torch.nextafter(values[3], torch.tensor(2.0))


def no_update(parameter: Any) -> None:
    """The optimizer forgets a tensor: here, it gets its initial values back."""
    local_part(parameter).copy_(parameter.planted_start)


PLANTS = {
    "a gradient counted twice on one rank": Plant(double_gradient, "gradient", "layers.1.mlp.up.weight", (3,), 1, "gradients"),
    "in a later step": Plant(double_gradient, "gradient", "layers.0.attention.out.weight", (0,), 2, "gradients"),
    "a norm's gradient without its sum": Plant(half_gradient, "gradient", "layers.0.mlp_norm.weight", (0, 1), 1, "gradients"),
    "the same on one rank alone": Plant(half_gradient, "gradient", "layers.0.attention_norm.bias", (1,), 1, "gradients"),
    "over dp": Plant(half_gradient, "gradient", "final_norm.weight", (2,), 1, "gradients", layout="tp2_dp2"),
    "no number": Plant(nan_gradient, "gradient", "layers.1.mlp.down.weight", (2,), STEPS, "gradients"),
    "an initial weight on one rank": Plant(next_float, "start", "layers.1.attention.q.weight", (3,), 0, "initial weights"),
    "in a copy": Plant(next_float, "start", "layers.0.mlp_norm.weight", (1,), 0, "initial weights"),
    "in the tied embedding's copy": Plant(next_float, "start", "embedding.weight", (2,), 0, "initial weights"),
    "an update left out": Plant(no_update, "update", "layers.0.mlp.down.weight", (1,), 1, "updated weights"),
    "a copy that drifts": Plant(next_float, "update", "positions.weight", (1,), STEPS, "copies"),
    "a tied copy that drifts": Plant(next_float, "update", "embedding.weight", (2,), STEPS, "copies"),
}


def planted(plant: Plant) -> type:
    """A Trainer with the error in it, on the ranks that have it."""
    from tptrain.trainer import Trainer

    class Planted(Trainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            for _, parameter in self.share.named_parameters():
                parameter.planted_start = local_part(parameter).clone()
            self._do("start", 0)

        def compute_gradients(self) -> torch.Tensor:
            totals = super().compute_gradients()
            self._do("gradient", self.steps_done + 1)
            return totals

        def update(self, totals: torch.Tensor) -> Any:
            result = super().update(totals)
            self._do("update", self.steps_done)
            return result

        def _do(self, moment: str, step: int) -> None:
            if (moment, step) == (plant.moment, plant.step) and dist.get_rank() in plant.ranks:
                with torch.no_grad():
                    plant.change(dict(self.share.named_parameters())[plant.name])

    return Planted


# ---- running ---------------------------------------------------------------------------------------------


def config_of(family: str, layout: str | None = None) -> Config:
    """A small config of a family, under a layout or as it stands."""
    parallel = {f"parallel__{key}": value for key, value in LAYOUTS[layout].items()} if layout else {}
    return small_config(
        **{"parallel__micro_batch_size": 4, **FAMILIES[family], **parallel}, data__vocab_size=257, model__num_layers=2, check__steps=STEPS
    )


def run_twins(rank: int, folder: Path, store_dir: Path) -> dict[str, Any]:
    """One process's results by family."""
    from tptrain.check import run_twin

    results = {}
    for family in FAMILIES:
        results[family] = run_twin(config_of(family), folder / family / "one_process", store_dir)
    return results


def run_layouts(rank: int, folder: Path, store_dir: Path) -> dict[Any, Any]:
    """Each layout of each family, and each plant."""
    from tptrain import check

    results: dict[Any, Any] = {}
    for family in FAMILIES:
        for layout in LAYOUTS:
            results[family, layout] = check.run_layout(config_of(family, layout), folder / family / layout, store_dir)
    trainer = check.Trainer
    for name, plant in PLANTS.items():
        check.Trainer = planted(plant)  # type: ignore[misc]
        results[name] = check.run_layout(config_of("gpt", plant.layout), folder / "gpt" / "planted", store_dir)
    check.Trainer = trainer  # type: ignore[misc]
    return results


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Verdict]:
    """By (family, layout), and by the plant's name."""
    folder = tmp_path_factory.mktemp("check")
    config = config_of("gpt")
    config.data.store_dir = str(folder / "stores")
    store_dir = prepare(config, print)
    (twins,) = run_ranks(1, run_twins, folder, store_dir)
    layouts = run_ranks(4, run_layouts, folder, store_dir)[0]
    return {key: judge(str(key), 4, twins["gpt" if isinstance(key, str) else key[0]], measured) for key, measured in layouts.items()}


def shown(table: Any) -> str:
    """A table as text."""
    text = io.StringIO()
    rich.console.Console(file=text, width=140).print(table)
    return text.getvalue()


# ---- right layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_layout_is_equal(family: str, layout: str, verdicts: dict[Any, Verdict]) -> None:
    verdict = verdicts[family, layout]
    assert verdict.equal, verdict.failing
    assert max(finding.difference for finding in verdict.of("gradients")) > 0, "another order of sums leaves a trace"
    assert max(finding.difference for finding in verdict.of("gradients")) < 1e-5, "the limit is ten times as wide"
    assert [len(verdict.of(what)) for what in ("loss", "gradient norm")] == [STEPS, STEPS]
    assert "equal" in shown(table_of_one(verdict))


def test_every_parameter_is_compared_on_every_rank_that_has_its_own(verdicts: dict[Any, Verdict]) -> None:
    def copies(layout: str, name: str) -> set[str]:
        return {finding.where for finding in verdicts["gpt", layout].of("initial weights") if finding.where.split()[0] == name}

    assert len(copies("tp2_pp2", "embedding.weight")) == 2, "both ends of the pipeline"
    assert len(copies("tp2_pp2", "layers.1.mlp.up.weight")) == 1, "split by tp: gathered"
    assert len(copies("tp2_pp2", "layers.1.mlp_norm.weight")) == 2, "replicated over tp"
    assert len(copies("tp2_dp2", "layers.1.mlp_norm.weight")) == 2, "and sharded over dp"
    assert len(copies("tp4", "positions.weight")) == 4


# ---- planted errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_error_is_found_and_named(name: str, verdicts: dict[Any, Verdict]) -> None:
    plant, verdict = PLANTS[name], verdicts[name]
    assert not verdict.equal
    first = verdict.failing[0]
    assert (first.what, first.step, first.where.split()[0]) == (plant.what, plant.step, plant.name)
    same = {finding.where.split()[0] for finding in verdict.failing if (finding.what, finding.step) == (first.what, first.step)}
    assert same == {plant.name}, "nothing else differs at that moment"
    if plant.what != "copies":
        places = [f.where for f in verdict.failing if (f.what, f.step) == (first.what, first.step)]
        assert len(places) <= len(plant.ranks), "a copy that is right is not accused"
    table = shown(table_of_one(verdict))
    assert plant.name in table
    assert "differs" in table
    assert "differs" in shown(table_of_all([verdict]))


def test_the_largest_element_is_where_it_was_planted(verdicts: dict[Any, Verdict]) -> None:
    changed = verdicts["an initial weight on one rank"].failing[0]
    # [32, 32], rows split over tp: rank 3 is tp rank 1, whose first row is row 16
    assert (changed.difference, changed.where) == (1, "layers.1.attention.q.weight [16, 3]")


def test_a_missing_parameter_is_named() -> None:
    twin = {"loss": [1.0], "grad_norm": [1.0], "names": ["head.weight"]}
    verdict = judge("tp2", 2, twin, {"loss": [1.0], "grad_norm": [1.0], "parameters": []})
    assert verdict.failing[0].describe() == "initial weights: head.weight is on no rank"


@pytest.mark.parametrize(("factor", "equal"), [(1 + 5e-6, True), (1 + 2e-5, False), (float("nan"), False)])
def test_the_limit_of_the_loss(factor: float, equal: bool) -> None:
    twin = {"loss": [5.5], "grad_norm": [1.0], "names": []}
    verdict = judge("tp2", 2, twin, {"loss": [5.5 * factor], "grad_norm": [1.0], "parameters": []})
    assert verdict.equal == equal


# ---- the command -----------------------------------------------------------------------------------------


def test_the_command_proves_a_layout(tmp_path: Path) -> None:
    outcome = command(tmp_path, "check", "parallel=tp2_pp2", *SMALL, "check.steps=2", "hydra.run.dir=run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "verdict" in outcome.out
    assert "one process ... loss 4.1" in outcome.out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".hydra", "check.json"], "no checkpoints, no logs, no tensors"
    (layout,) = json.loads((tmp_path / "run/check.json").read_text())["layouts"]
    assert (layout["layout"], layout["processes"], layout["equal"], layout["first_difference"]) == ("tp2_pp2", 4, True, None)
    assert len(layout["loss"]) == 2
    assert {one["rank"] for one in layout["parameters"]} == {0, 1, 2, 3}


def test_all_layouts_and_an_error_in_one_of_them(tmp_path: Path) -> None:
    """tp2 with a wrong gradient on rank 1, dp2 as it should be; with 15 tokens sequence parallelism is refused, with 1 layer pp."""
    plant = tmp_path / "plant/sitecustomize.py"
    plant.parent.mkdir()
    plant.write_text(
        "import sys, os\n"
        "if 'check-layout' in sys.orig_argv and os.environ.get('RANK') == '1':\n"
        "    from tptrain.trainer import Trainer\n"
        "    real = Trainer.compute_gradients\n"
        "    def wrong(self):\n"
        "        totals = real(self)\n"
        "        if self.mesh.tp_size == 2: self.share.stages[0].layers['0'].attention.v.weight.grad.to_local().mul_(2)\n"
        "        return totals\n"
        "    Trainer.compute_gradients = wrong\n"
    )
    small = ["model.num_layers=1", "data.seq_len=15", "check.layouts=all", "check.processes=2", "hydra.run.dir=run"]
    outcome = command(tmp_path, "check", *SMALL, *small, PYTHONPATH=f"{plant.parent}:{Path.cwd()}")
    assert (outcome.code, outcome.err) == (1, "")
    lines = {line.split()[0]: line.split() for line in outcome.out.splitlines() if line.rstrip().endswith(("equal", "differs"))}
    assert (lines["tp2"][-1], lines["dp2"][-1]) == ("differs", "equal")
    assert "first in the gradients at step 1: layers.0.attention.v.weight" in outcome.out
    assert "cannot be split so: tp2_sp, pp2" in outcome.out
    layouts = json.loads((tmp_path / "run/check.json").read_text())["layouts"]
    assert [layout["equal"] for layout in layouts] == [False, True]


def faked(monkeypatch: pytest.MonkeyPatch, failing: str) -> list[tuple[str, str]]:
    """Let `launch.run` do nothing but note (work, layout), and fail for one layout."""
    seen = []

    def run(job: Any, apart: bool = False) -> dict[str, Any]:
        job.run_dir.mkdir(parents=True)
        (job.run_dir.parent / TENSORS).mkdir(exist_ok=True)
        seen.append((job.work, job.run_dir.name))
        if job.run_dir.name == failing:
            raise JobFailed("rank 1: out of memory")
        same = {"share": 0.0, "index": [0]}
        one = {
            "name": "head.weight",
            "rank": 0,
            "initial": 0,
            "initial_index": [],
            "gradients": [same],
            "updates": [same],
            "digests": ["a"],
        }
        return {"loss": [1.0], "grad_norm": [1.0], "names": ["head.weight"], "parameters": [one]}

    monkeypatch.setattr(launch, "run", run)
    return seen


def test_a_layout_that_fails_stops_no_other_and_leaves_its_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    seen = faked(monkeypatch, failing="pp2")
    config = small_config(check__layouts="all", check__processes=2, data__vocab_size=257, data__store_dir=str(tmp_path / "stores"))
    with pytest.raises(JobFailed, match="not equal to one process: pp2"):
        prove.check(config, tmp_path / "run")
    assert seen == [("check-twin", "one_process"), *(("check-layout", name) for name in ("tp2", "tp2_sp", "pp2", "dp2"))]
    out = capsys.readouterr().out
    assert "pp2 failed: rank 1: out of memory" in out
    assert not (tmp_path / "run/check" / TENSORS).exists()
    assert (tmp_path / "run/check/pp2").exists()


def test_one_layout_that_fails_leaves_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, failing="tp2")
    with pytest.raises(JobFailed, match="out of memory"):
        prove.check(small_config(parallel__tp=2, data__vocab_size=257, data__store_dir=str(tmp_path / "stores")), tmp_path / "run")
    assert not (tmp_path / "run/check" / TENSORS).exists()


def test_one_process_is_compared_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    seen = faked(monkeypatch, failing="")
    prove.check(small_config(data__vocab_size=257, data__store_dir=str(tmp_path / "stores")), tmp_path / "run")
    assert [name for _, name in seen] == ["one_process", "single"]
    assert "two runs of it are compared" in capsys.readouterr().out


# ---- which layouts, and what is refused ------------------------------------------------------------------


def test_every_layout_that_fits() -> None:
    layouts, refused = prove.every_layout(small_config(check__processes=4))
    names = [prove.layout_name(layout.parallel) for layout in layouts]
    assert names == [
        "tp2",
        "tp2_sp",
        "pp2",
        "dp2",
        "pp3",
        "tp4",
        "tp4_sp",
        "tp2_pp2",
        "tp2_pp2_sp",
        "tp2_dp2",
        "tp2_dp2_sp",
        "pp4",
        "pp2_dp2",
        "dp4",
    ]
    assert refused == ["tp3", "tp3_sp", "dp3"], "4 heads, 8 sequences a step"
    assert {layout.batch_size for layout in layouts} == {8}
    assert max(layout.processes for layout in layouts) == 4


def test_the_twin_keeps_the_batch() -> None:
    config = small_config(parallel__tp=2, parallel__dp=2, parallel__recompute="full", parallel__sequence_parallel=True)
    twin = prove.one_process(config)
    assert (twin.processes, twin.batch_size, twin.parallel.micro_batches) == (1, 8, 4)
    assert (twin.parallel.recompute, twin.parallel.sequence_parallel) == ("none", False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__precision": "bf16"}, "train.precision=bf16 rounds to 8 bits, too few to tell a wrong layout from rounding: use"),
        ({"check__layouts": "all", "check__processes": 1}, "check.processes=1 leaves no layout to compare with one process: use 2"),
    ],
)
def test_what_cannot_be_proven_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        refuse_unprovable(small_config(**changes))
    assert str(refusal.value).startswith(message)
    with pytest.raises(ConfigError):
        prove.check(small_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="starts its own processes, but this is one of a launcher's: run it without torchrun"):
        cli._run(["check"])


def test_a_table_names_no_more_than_one_can_read() -> None:
    findings = [Finding("gradients", 1, 0.5, f"layers.{i}.mlp.up.weight [0]") for i in range(40)]
    verdict = Verdict("tp2", 2, [Finding(what, 0, 0) for what in ("initial weights", "updated weights", "copies")] + findings)
    table = shown(table_of_one(verdict))
    assert "in 32 more parameters" in table
    assert table.count("layers.") <= 10
