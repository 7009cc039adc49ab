"""From what `check.py` measured to a verdict, and how the terminal shows it.

A finding is one comparison: of a loss, of one parameter's gradient at one step. One error spreads: a wrong initial weight
makes a wrong loss, and that every gradient wrong. So findings are put in the order in which a step makes them, and the verdict
names the first that breaks its limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

TENSORS = "tensors"
"""The folder in which the one process leaves its tensors, beside the jobs' folders."""
UPDATE_LIMIT = 1e-3
"""For updated weights: the largest difference, as a share of the tensor's largest update."""
LIMITS = {
    "initial weights": 0.0,
    "loss": 1e-5,
    "gradients": 1e-4,
    "gradient norm": 1e-4,
    "updated weights": UPDATE_LIMIT,
    "copies": 0.0,
}
"""What is compared, in the order in which a step makes it, and its limit: loss and norm relative, tensors as shares of their scale."""

_MOST_ROWS = 8
"""Parameters that a table names of one kind."""


@dataclass(frozen=True)
class Finding:
    """One comparison."""

    what: str
    """A key of LIMITS."""
    step: int
    difference: float
    """What LIMITS limits; for initial weights the elements whose bits differ, for copies how many there are."""
    where: str = ""
    """The parameter and the index in it; the rank, where several have a copy."""

    @property
    def holds(self) -> bool:
        """Whether it is within its limit; a nan is not."""
        return self.difference <= LIMITS[self.what]

    def describe(self) -> str:
        """`gradients at step 2: layers.0.mlp.up.weight [3, 1]`."""
        place = f"{self.what} at step {self.step}" if self.step else self.what
        return f"{place}: {self.where}" if self.where else place


@dataclass(frozen=True)
class Verdict:
    """A layout beside one process."""

    layout: str
    processes: int
    findings: Sequence[Finding] = ()
    error: str = ""
    """Why it did not run to its end."""

    @property
    def failing(self) -> list[Finding]:
        """What breaks its limit: the first in time first, at one time the largest first."""
        order = list(LIMITS)
        broken = [finding for finding in self.findings if not finding.holds]
        return sorted(broken, key=lambda finding: (finding.step, order.index(finding.what), -finding.difference))

    @property
    def equal(self) -> bool:
        """Whether the layout computes what one process does."""
        return not self.error and not self.failing

    def of(self, what: str) -> list[Finding]:
        """The findings of one kind, by step."""
        return [finding for finding in self.findings if finding.what == what]


def judge(layout: str, processes: int, twin: dict[str, Any], measured: dict[str, Any]) -> Verdict:
    """The verdict on what `check.run_twin` and `check.run_layout` returned."""
    findings = []
    for what, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
        for step, (got, expected) in enumerate(zip(measured[key], twin[key], strict=True), start=1):
            findings.append(Finding(what, step, abs(got - expected) / abs(expected) if got != expected else 0.0))
    for name in twin["names"]:
        copies = [one for one in measured["parameters"] if one["name"] == name]
        findings += _about(name, copies) if copies else [Finding("initial weights", 0, math.inf, f"{name} is on no rank")]
    return Verdict(layout, processes, findings)


def _about(name: str, copies: list[dict[str, Any]]) -> list[Finding]:
    """The findings about one parameter, from each rank that has a copy of its own."""
    findings = []
    for one in copies:
        where = f", the copy of rank {one['rank']}" if len(copies) > 1 else ""
        findings.append(Finding("initial weights", 0, one["initial"], f"{name} {one['initial_index']}{where}"))
        for what, key in (("gradients", "gradients"), ("updated weights", "updates")):
            findings += [Finding(what, i + 1, found["share"], f"{name} {found['index']}{where}") for i, found in enumerate(one[key])]
    for step, digests in enumerate(zip(*(one["digests"] for one in copies), strict=True), start=1):
        findings.append(Finding("copies", step, len(set(digests)) - 1, name))
    return findings


# ---- tables ----------------------------------------------------------------------------------------------


def table_of_one(verdict: Verdict) -> Table:
    """All about one layout: each loss and norm, the largest difference of each other kind, and what breaks a limit."""
    table = _table("", "largest difference", "limit", "where")
    for what, limit in LIMITS.items():
        for label, finding in _shown(verdict, what):
            where = finding.where if finding.difference else ""
            _row(table, finding.holds, label, _difference(finding), f"{limit:.0e}" if limit else "none", where)
    if verdict.equal:
        _row(table, True, "verdict", "equal", "", "")
    else:
        _row(table, False, "verdict", "differs", "", f"first in the {verdict.failing[0].describe()}")
    return table


def table_of_all(verdicts: Sequence[Verdict]) -> Table:
    """One line a layout, with the largest difference of each kind."""
    table = _table("layout", "processes", *LIMITS, "verdict")
    for verdict in verdicts:
        cells = [_difference(_worst(found)) if (found := verdict.of(what)) else "" for what in LIMITS]
        said = "failed" if verdict.error else "equal" if verdict.equal else "differs"
        _row(table, verdict.equal, verdict.layout, str(verdict.processes), *cells, said)
    return table


def _shown(verdict: Verdict, what: str) -> list[tuple[str, Finding]]:
    """The findings of one kind that get a row, each with its label."""
    findings = verdict.of(what)
    if what in ("loss", "gradient norm"):
        return [(f"{what}, step {finding.step}", finding) for finding in findings]
    failing = [finding for finding in verdict.failing if finding.what == what]
    if not failing:
        return [(what, _worst(findings))] if findings else []
    first = [finding for finding in failing if finding.step == failing[0].step]
    names = {finding.where.split(" ")[0] for finding in failing}
    rows = [(f"{what}, step {finding.step}" if finding.step else what, finding) for finding in first[:_MOST_ROWS]]
    left = len(names - {finding.where.split(" ")[0] for _, finding in rows})
    return rows + ([(f"... in {left} more parameters", _worst(failing))] if left else [])


def _worst(findings: Sequence[Finding]) -> Finding:
    """The one with the largest difference; a nan is larger than all."""
    return max(findings, key=lambda finding: math.inf if math.isnan(finding.difference) else finding.difference)


def _difference(finding: Finding) -> str:
    if finding.difference == math.inf:
        return "missing" if finding.what == "initial weights" else "inf"
    if finding.what == "initial weights":
        return f"{finding.difference:,.0f} element{'s' * (finding.difference != 1)}" if finding.difference else "bit-equal"
    if finding.what == "copies":
        return f"{finding.difference + 1:.0f} different" if finding.difference else "bit-equal"
    return f"{finding.difference:.1e}" if finding.difference else "0"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _row(table: Table, good: bool, *cells: str) -> None:
    """Text, not markup: an index has brackets."""
    table.add_row(*(Text(cell) for cell in cells), style="" if good else "bold red")
