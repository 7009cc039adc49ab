"""docs/silent_errors.md names a test for each error; and what is measured is named with its unit."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNITS = {
    "bandwidth": ("_bytes_per_second",), "throughput": ("_per_second",), "latency": ("_seconds",), "timeout": ("_seconds",),
    "flops": ("_per_second", "_per_token"), "memory": ("_bytes", "_bytes_per_second"), "duration": ("_seconds",),
}  # fmt: skip


def test_every_error_of_the_table_has_a_test() -> None:
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    rows = re.findall(r"^\| (\d+) \|.*\| (.+) \|$", (ROOT / "docs/silent_errors.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == [*range(1, 36), 40]
    for number, cell in rows:
        names = re.findall(r"`(\w+)`", cell)
        assert names, number
        assert set(names) <= defined, (number, set(names) - defined)


def test_names_of_measured_things_carry_their_units() -> None:
    """Of every field and parameter: eight times too slow is how far bits are from bytes."""
    seen = 0
    for path in (ROOT / "tptrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.arg] if isinstance(node, ast.arg) else []
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            for name in names:
                for thing, endings in UNITS.items():
                    if thing in name.lower().split("_"):
                        seen += 1
                        assert name.endswith(endings), f"{path.name}: {name} has no unit of {endings}"
    assert seen > 5, "the test must see them"


def test_the_pipeline_waits_for_no_device() -> None:
    """No synchronize but the clock's, which reads the times of a step that is over."""
    waits = {
        path.name
        for path in (ROOT / "tptrain/pipeline").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("synchronize", "barrier", "item", "tolist")
    }
    assert waits == {"clock.py"}
