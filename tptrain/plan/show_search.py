"""What `tptrain plan` says of a search: the best layouts, the faster ones that do not fit, and why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from tptrain.config import ConfigError, refuse
from tptrain.plan.layouts import Layout
from tptrain.plan.record import of_time
from tptrain.plan.search import Candidate, Found
from tptrain.plan.show import table
from tptrain.plan.units import as_bytes, as_seconds, percent

_UNFITTING = 5
"""Rows of layouts that do not fit."""
_COLUMNS = ("memory_bytes_at_least", "missing_bytes_at_least", "step_seconds_at_least", "memory_bytes", "step_seconds")
_KEYS = ("tp", "pp", "dp", "schedule", "stages", "size", "recompute", "split")
"""Of a layout, as short as a table asks for; `docs/planning.md` says them in full."""


def best_table(found: Found) -> Table:
    """A row a layout, the fastest first."""
    rows = table("", *_KEYS, "tokens/s", "MFU", "step", "bubble", "memory", title=f"best layouts of {found.devices} devices")
    for number, each in enumerate(found.best, 1):
        time = each.time
        speed = (f"{time.tokens_per_second:,.0f}", percent(time.mfu), as_seconds(time.step_seconds), percent(time.bubble_fraction))
        rows.add_row(f"{number}", *_cells(each.layout), *speed, as_bytes(each.memory_bytes))
    return rows


def unfitting_table(found: Found) -> Table | None:
    """Of the layouts that might be faster than the best ones, were their memory not short, those that miss least."""
    rows = table(*_KEYS, "step from", "missing from", title="too large, though they might be as fast")
    near = [each for each in found.unfitting if each.least_seconds is not None]
    for each in sorted(near, key=lambda each: each.least_bytes)[:_UNFITTING]:
        rows.add_row(*_cells(each.layout), as_seconds(each.least_seconds or 0), as_bytes(each.missing_bytes(found.device_bytes)))
    return rows if near else None


def facts(found: Found) -> list[tuple[str, str]]:
    """How the search went."""
    whole, unfitting = len(found.candidates), len(found.unfitting)
    simulated = sum(each.step_seconds is not None for each in found.candidates)
    lines = [("searched", f"{whole:,} layouts: {unfitting:,} do not fit into {as_bytes(found.device_bytes)}, {simulated:,} were simulated")]
    if found.config.train.precision == "fp32" and found.config.hardware.device == "cuda":
        lines.append(("precision", "train.precision=fp32; bf16 is faster on such devices"))
    return [*lines, ("overrides", "of the best, to type beside the same command, the fastest first:")]


def refuse_memory(found: Found) -> ConfigError:
    """Of a search in which nothing fits."""
    assert found.nearest is not None
    nearest, device = found.nearest, as_bytes(found.device_bytes)
    missing = as_bytes(nearest.missing_bytes(found.device_bytes))
    count, with_least = f"{len(found.candidates):,} layouts", nearest.layout.overrides
    rule = f"has {count}, and none fits into a device's {device}; {missing} are missing with {with_least}"
    return refuse("hardware.devices", found.devices, rule, "use more devices, a smaller model or batch, or devices of more memory")


def short(layout: Layout) -> str:
    """A layout as the label of a bar."""
    stages = f" x{layout.stages_per_rank}" if layout.stages_per_rank > 1 else ""
    more = f", recompute {layout.recompute}" if layout.recompute != "none" else ""
    split = ", sp" if layout.sequence_parallel else ""
    return f"tp{layout.tp} pp{layout.pp} dp{layout.dp} {layout.schedule}{stages}, b{layout.micro_batch_size}{more}{split}"


def of_search(found: Found) -> dict[str, Any]:
    """The search as a part of plan.json."""
    return {
        "devices": found.devices,
        "device_bytes": found.device_bytes,
        "best": [
            {"overrides": each.layout.overrides, **each.layout._asdict(), "memory_bytes": each.memory_bytes, **of_time(each.time)}
            for each in found.best
        ],
        "layouts": {
            "columns": [*Layout._fields, *_COLUMNS],
            "rows": [_row(each, found.device_bytes) for each in found.candidates],
        },
    }


def _row(each: Candidate, device_bytes: float) -> Sequence[Any]:
    return [*each.layout, each.least_bytes, each.missing_bytes(device_bytes), each.least_seconds, each.memory_bytes, each.step_seconds]


def _cells(layout: Layout) -> list[str]:
    return [("yes" if value else "no") if isinstance(value, bool) else str(value) for value in layout]
