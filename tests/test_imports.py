"""Imports run only downwards, read from the source: each room knows the rooms below it and no other.

Also: nobody but `launch.py` reads the environment, and nobody but `mesh.py` knows the default process group.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tptrain"

ALLOWED: dict[str, set[str]] = {
    # what everybody may know
    "config_error": set(),
    "data_config": {"config_error"},
    "hardware_config": {"config_error"},
    "launch_config": {"config_error"},
    "plan_config": {"config_error"},
    "schema": {"data_config", "hardware_config", "launch_config", "plan_config"},
    "config_values": {"config_error", "data_config", "hardware_config", "launch_config", "plan_config", "schema"},
    "config": {"config_error", "config_values", "data_config", "hardware_config", "launch_config", "plan_config", "schema"},
    "files": set(),
    "lifeline": set(),
    "stop": set(),
    # the numeric rooms
    "mesh": {"config"},
    "tensor_parallel": {"mesh"},
    "model": {"tensor_parallel", "mesh", "config"},
    "pipeline": {"mesh", "config"},
    "optim": {"tensor_parallel", "mesh", "config"},
    "data_parallel": {"mesh"},
    "share": {"config", "mesh", "tensor_parallel", "model", "pipeline", "plan", "data_parallel"},
    "sampling": {"tensor_parallel", "model"},
    "pipeline_decoder": {"pipeline", "model", "mesh"},
    "row_losses": {"tensor_parallel", "model", "pipeline", "mesh"},
    "generate_config": {"config", "launch_config"},
    "eval_config": {"config", "generate_config"},
    "export_config": {"config", "generate_config"},
    "plot_config": {"config"},
    "plan": {"config", "model", "pipeline"},
    # around them
    "data": {"config", "config_error", "data_config", "files", "lifeline"},
    "checkpoint": {"tensor_parallel", "model", "mesh", "config", "config_error", "files"},
    "monitor": {"config", "files", "lifeline", "pipeline"},
    "trained_stage": {"checkpoint", "config", "mesh", "model", "pipeline", "tensor_parallel"},
    "multiple_choice": {"config", "data"},
    # from a command to running ranks
    "job": {"config", "stop"},
    "failures": {"config"},
    "network": set(),
    "store_line": set(),
    "roll_call": {"store_line"},
    "last_words": {"failures", "roll_call"},
    "council": {"config", "stop", "store_line"},
    "nodes": {"checkpoint", "config", "council", "data", "job"},
    "crew": {"config", "council", "failures", "job", "launch_config", "network", "roll_call"},
    "host_memory": set(),
    "refusal": {"config", "job"},
    "ranks": {
        "config",
        "council",
        "eval_config",
        "evaluate",
        "failures",
        "generate_config",
        "host_memory",
        "job",
        "last_words",
        "lifeline",
        "monitor",
        "nodes",
        "roll_call",
        "stop",
        "train",
        "check",
        "doctor",
        "generate",
        "probe",
    },
    "agent_watch": set(),
    "scheduler": {"config_error"},
    "spawn": {"config", "failures", "job", "ranks", "stop"},
    "environment": {"agent_watch", "config", "failures", "job", "network", "ranks", "scheduler", "spawn"},
    "interrupt": {"failures", "stop"},
    "launch": {
        "checkpoint",
        "config",
        "council",
        "crew",
        "data",
        "environment",
        "failures",
        "interrupt",
        "job",
        "monitor",
        "nodes",
        "plan",
        "ranks",
        "spawn",
        "stop",
    },
    "slurm": {"config", "files", "job", "plan"},
    "verdict": set(),
    "probe": {"config", "doctor", "mesh", "tensor_parallel"},
    "this_machine": {"config", "environment", "files", "interrupt", "job", "launch", "probe", "ranks"},
    "doctor": {"config", "mesh", "tensor_parallel", "model", "plan"},
    "consult": {"config", "doctor", "failures", "files", "interrupt", "job", "launch", "launch_config"},
    "prove": {"checkpoint", "config", "data", "failures", "files", "interrupt", "job", "launch", "launch_config", "verdict"},
    "answer": {"checkpoint", "config", "data", "failures", "generate_config", "interrupt", "job", "launch"},
    "examine": {
        "answer",
        "checkpoint",
        "config",
        "data",
        "data_config",
        "eval_config",
        "files",
        "generate_config",
        "interrupt",
        "job",
        "launch",
        "monitor",
        "multiple_choice",
    },
    "own_data": {"config", "job"},
    "survey": {"config", "data", "data_config", "files", "monitor"},
    "export": {"answer", "checkpoint", "config", "config_error", "data", "export_config", "files", "interrupt"},
    "foresee": {"config", "dry_run", "files", "monitor", "plan", "this_machine"},
    "sweep": {"config", "files", "monitor"},
    "plot": {"config", "files", "monitor", "pipeline", "plot_config"},
    "arguments": {"config", "job"},
    "typed_config": {"config", "eval_config", "export_config", "generate_config", "job", "plot_config", "refusal"},
    "verbs": {
        "answer",
        "config",
        "consult",
        "environment",
        "eval_config",
        "examine",
        "export",
        "export_config",
        "foresee",
        "generate_config",
        "interrupt",
        "launch",
        "own_data",
        "plot",
        "plot_config",
        "prove",
        "slurm",
        "stop",
        "survey",
        "sweep",
        "typed_config",
    },
    "cli": {
        "arguments",
        "config",
        "environment",
        "failures",
        "files",
        "interrupt",
        "launch",
        "monitor",
        "ranks",
        "refusal",
        "stop",
        "sweep",
        "typed_config",
        "verbs",
    },
    "__main__": {"cli"},
    "__init__": set(),
}
BELOW_TRAIN = {
    "config", "files", "mesh", "tensor_parallel", "model", "pipeline", "plan", "optim", "data_parallel", "share", "data", "checkpoint",
    "monitor",
}  # fmt: skip
ALLOWED |= {
    "trainer": BELOW_TRAIN,
    "report": BELOW_TRAIN | {"trainer"},
    "step_watch": BELOW_TRAIN | {"trainer", "report", "stop"},
    "train": BELOW_TRAIN | {"trainer", "report", "step_watch", "stop"},
    "check": BELOW_TRAIN | {"trainer", "verdict"},
    "dry_run": BELOW_TRAIN | {"trainer"},
    "generate": BELOW_TRAIN | {"generate_config", "job", "sampling", "pipeline_decoder", "trained_stage"},
    "evaluate": BELOW_TRAIN | {"eval_config", "job", "multiple_choice", "row_losses", "trained_stage"},
}  # the composition root: anything but what starts it

MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in MODULES}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[tuple[str, ...]]:
    """Modules of ours that a file names, anywhere in it, as paths below the package: `from tptrain.data import prepare` is
    both ("data",) and ("data", "prepare"), which may be a module or a name in one."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                package = ["tptrain", *path.relative_to(PACKAGE).parent.parts]
                base = package[: len(package) - node.level + 1] + base
            found |= {(*base, alias.name) for alias in node.names}
    return {name[1:] for name in found if name[0] == "tptrain" and len(name) > 1}


def imported_rooms(path: Path) -> set[str]:
    return {name[0] for name in imported_modules(path) if name[0] != "__version__"}


def test_the_table_names_every_room() -> None:
    assert {room_of(path) for path in MODULES} == ALLOWED.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    room = room_of(path)
    forbidden = imported_rooms(path) - ALLOWED[room] - {room}
    assert not forbidden, f"{room} may import {sorted(ALLOWED[room])}, but this file imports {sorted(forbidden)}"


def test_the_table_has_no_cycle() -> None:
    assert len(list(TopologicalSorter(ALLOWED).static_order())) == len(ALLOWED)


def test_the_parser_sees_imports() -> None:
    """In functions and in every form: else the tests above hold of anything."""
    assert {"mesh", "trainer", "checkpoint", "report", "config"} <= imported_rooms(PACKAGE / "train.py")
    assert "train" in imported_rooms(PACKAGE / "ranks.py"), "imported in a function"
    assert {"launch", "verbs"} <= imported_rooms(PACKAGE / "cli.py"), "from tptrain import launch"
    assert ("data", "store", "TokenStore") in imported_modules(PACKAGE / "data" / "__init__.py")


BEFORE_RANKS = {"config", "generate_config", "files", "data", "job", "failures", "refusal", "launch", "ranks", "answer", "plan", "cli"}
BEFORE_RANKS |= {
    "config_values",
    "schema",
    "agent_watch",
    "arguments",
    "typed_config",
    "verbs",
    "environment",
    "interrupt",
    "consult",
    "council",
    "crew",
    "last_words",
    "launch_config",
    "network",
    "nodes",
    "roll_call",
    "spawn",
    "store_line",
    "export",
    "export_config",
    "foresee",
    "hardware_config",
    "lifeline",
    "monitor",
    "plan_config",
    "plot",
    "plot_config",
    "prove",
    "survey",
}


def test_no_torch_before_the_ranks_start() -> None:
    """At the top of a module, that is: a refused config and a help text must not wait seconds for torch."""
    schedules = {path for path in (PACKAGE / "pipeline").glob("*.py") if path.stem not in ("engine", "transfer", "clock")}
    assert not any("mesh" in imported_rooms(path) for path in schedules), "which needs torch"
    plain = [PACKAGE / "checkpoint" / f"{name}.py" for name in ("folder", "manifest", "start")]
    plain += [PACKAGE / "doctor" / f"{name}.py" for name in ("judge", "needs", "record", "show", "units", "versions")]
    plain += [path for path in (PACKAGE / "checkpoint" / "hugging_face").glob("*.py") if path.stem != "weights"]
    paths = [path for path in MODULES if room_of(path) in BEFORE_RANKS] + plain
    for path in [*paths, *schedules, PACKAGE / "model" / "flops.py"]:
        for node in TREES[path].body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "torch"], path
    known = imported_modules(PACKAGE / "launch.py") | imported_modules(PACKAGE / "answer.py") | imported_modules(PACKAGE / "prove.py")
    allowed = {path.relative_to(PACKAGE).with_suffix("").parts for path in plain}
    for name in known:
        assert name[0] != "checkpoint" or name[:2] in allowed or name[:3] in allowed, f"{name}: the rest of that room needs torch"


# ---- the environment and the default group -----------------------------------------------------------------


def environment_lines(path: Path) -> list[str]:
    """Every line that touches the environment, as source."""
    text = path.read_text().splitlines()
    lines = []
    for node in ast.walk(TREES[path]):
        by_name = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv", "unsetenv")
        imported = isinstance(node, ast.ImportFrom) and node.module == "os" and any("env" in alias.name for alias in node.names)
        if by_name or imported:
            lines.append(text[node.lineno - 1].split("#")[0].strip())
    return lines


def test_only_one_file_reads_the_environment() -> None:
    touching = {str(path.relative_to(PACKAGE)): lines for path in MODULES if (lines := environment_lines(path))}
    assert touching.pop("environment.py")
    quiet = ['os.environ["TOKENIZERS_PARALLELISM"] = "false"']
    assert touching.pop("data/workers.py") == quiet, "the tokenizers library can be told no other way"
    assert touching.pop("cli.py", []) in ([], ['os.environ["HYDRA_FULL_ERROR"] = "1"']), "Hydra can be told no other way"
    assert not touching, "the config is the only thing that a rank is told by"


def test_only_mesh_knows_the_default_group() -> None:
    knowing = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.walk(TREES[path])
        if (isinstance(node, ast.Attribute) and node.attr in ("WORLD", "_get_default_group"))
        or (isinstance(node, ast.Name) and node.id in ("WORLD", "_get_default_group"))
        or (isinstance(node, ast.ImportFrom) and any(alias.name in ("WORLD", "_get_default_group") for alias in node.names))
    }
    assert knowing == {"mesh.py"}


COMMUNICATING = {
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "broadcast_object_list", "scatter", "gather", "gather_object", "scatter_object_list", "all_to_all", "all_to_all_single",
    "barrier", "monitored_barrier", "send", "recv", "isend", "irecv",
}  # fmt: skip


def test_whoever_communicates_says_with_whom() -> None:
    """A call without `group` would use the default group. Only `ranks.py` may, as it hands out the job before there is a mesh."""
    calls = 0
    for path in MODULES:
        for node in ast.walk(TREES[path]):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)):
                continue
            if node.func.value.id != "dist" or (room_of(path) == "ranks" and node.func.attr == "broadcast_object_list"):
                continue
            where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
            if node.func.attr in COMMUNICATING:
                calls += 1
                assert any(keyword.arg == "group" for keyword in node.keywords), f"{where}: dist.{node.func.attr} without group"
            if node.func.attr == "P2POp":
                assert len(node.args) == 4 or any(keyword.arg == "group" for keyword in node.keywords), f"{where}: P2POp without group"
    assert calls > 10, "the test must see them"
