"""The start banner: what is about to run, a label and a value a line, and the layout as a small grid.

layout      tp 2 x pp 2 x dp 2 = 8 processes
            each layer over 2 ranks, layers over 2 stages, 2 copies
                       copy 0  copy 1
            stage 0    [0 1]   [2 3]
            stage 1    [4 5]   [6 7]
stages      0: layers 0-4, 1.21M parameters
            1: layers 5-7, 1.02M parameters
schedule    1f1b, 8 micro-batches of 2 a step, bubble 11.1 % by FLOPs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tptrain.config import Config
from tptrain.files import near
from tptrain.monitor.text import compact

LABEL_WIDTH = 12
"""Characters of the label column."""
_MOST_STAGES = 8
_KNOWN_FACTS = ("parameters", "parameters_per_rank", "device", "data", "run_dir", "ranks", "stages", "bubble_fraction")


def banner_rows(config: Config, total_steps: int, first_step: int, facts: dict[str, Any], width: int) -> list[tuple[str, str]]:
    """The banner as (label, value) rows; a row that goes on has no label. width: columns of the terminal.

    facts, all optional: parameters (int), parameters_per_rank (int, or one int a rank), device, data, run_dir (text),
    ranks (nested lists [pp][dp][tp] of rank numbers), stages (for each: its pipeline rank, first layer, one past its last, parameters),
    bubble_fraction (predicted). Any other fact is a row of its own.
    """
    parallel, model, seq_len = config.parallel, config.model, config.data.seq_len
    sequences = config.batch_size
    stages, bubble = facts.get("stages", ()), facts.get("bubble_fraction")
    predicted = f", bubble {100 * bubble:.1f} % by FLOPs" if bubble and parallel.pp > 1 else ""
    micro = f"{parallel.micro_batches} micro-batch{'es' * (parallel.micro_batches > 1)} of {parallel.micro_batch_size} a step"
    rows = [
        (
            "model",
            f"{model.name}: {model.num_layers} layers, {model.hidden_size} wide, {model.num_heads} heads, vocabulary {model.vocab_size:,}",
        ),
        ("parameters", _parameters(facts.get("parameters"), facts.get("parameters_per_rank"))),
        *_layout(config, facts.get("ranks"), [rank for rank, *_ in stages], width - LABEL_WIDTH),
        *_stages(stages),
        ("schedule", f"{parallel.schedule}, {micro}{predicted}"),
        ("step", f"{sequences:,} sequences x {seq_len:,} = {sequences * seq_len:,} tokens"),
        ("steps", f"{total_steps:,}" + (f", continues after {first_step:,}" if first_step else "")),
        ("precision", config.train.precision),
        ("device", str(facts.get("device", config.hardware.device))),
        ("data", str(facts.get("data", config.data.source))),
    ]
    rows += [(key.replace("_", " "), str(value)) for key, value in facts.items() if key not in _KNOWN_FACTS]
    rows += [("run folder", near(facts["run_dir"]))] if "run_dir" in facts else []
    return [row for row in rows if row[1]]


def _parameters(total: int | None, per_rank: int | Sequence[int] | None) -> str:
    """`1.05M, 270k to 330k a rank`."""
    if total is None:
        return ""
    if per_rank is None:
        return compact(total)
    sizes = [per_rank] if isinstance(per_rank, int) else list(per_rank)
    low, high = compact(min(sizes)), compact(max(sizes))
    return f"{compact(total)}, {low if low == high else f'{low} to {high}'} a rank"


def _stages(stages: Sequence[tuple[int, int, int, int]]) -> list[tuple[str, str]]:
    """The layers and parameters of each of several stages, as far as they fit."""
    if len(stages) < 2:
        return []
    rows = [
        f"{number}: layer{'s' * (last - first > 1)} {first}{f'-{last - 1}' * (last - first > 1)}, {compact(parameters)} parameters"
        for number, (_, first, last, parameters) in enumerate(stages[:_MOST_STAGES])
    ]
    rows += ["..."] * (len(stages) > _MOST_STAGES)
    return [("stages" if number == 0 else "", row) for number, row in enumerate(rows)]


def _layout(config: Config, ranks: Sequence[Sequence[Sequence[int]]] | None, placement: Sequence[int], width: int) -> list[tuple[str, str]]:
    """The layout in numbers, in words, and as a grid of stages by copies, as far as it fits. placement: the pipeline rank of each stage."""
    tp, pp, dp = config.parallel.tp, config.parallel.pp, int(config.parallel.dp)
    rows = [("layout", f"tp {tp} x pp {pp} x dp {dp} = {tp * pp * dp} process{'es' * (tp * pp * dp > 1)}")]
    stages = config.parallel.num_stages
    over = f"layers over {stages} stages on {pp} ranks" if stages > pp else f"layers over {pp} stages"
    words = [(tp, f"each layer over {tp} ranks"), (pp, over), (dp, f"{dp} copies")]
    said = ", ".join(text for size, text in words if size > 1)
    if not said:
        return rows
    rows.append(("", said))
    cells = [[_cell(tp, ranks[stage][copy] if ranks else None) for copy in range(dp)] for stage in range(min(pp, _MOST_STAGES))]
    heads = [_head(rank, placement or range(pp)) for rank in range(len(cells))]
    margin = max(map(len, heads)) + 2
    column = max(len(text) for row in [*cells, ["copy 00"]] for text in row) + 2
    fitting = (width - margin - len("...")) // column
    copies = dp if dp * column <= width - margin else max(1, fitting)
    lines = [("", [f"copy {copy}" for copy in range(copies)])] if dp > 1 else []
    lines += [(head, row[:copies]) for head, row in zip(heads, cells, strict=True)]
    for head, row in lines:
        rows.append(("", f"{head:<{margin}}{''.join(text.ljust(column) for text in row)}{'...' if copies < dp else ''}".rstrip()))
    return rows + [("", "...")] * (pp > _MOST_STAGES)


def _head(rank: int, placement: Sequence[int]) -> str:
    """The stages of a pipeline rank: `stage 1`, `stages 1 5`."""
    stages = [str(stage) for stage, holder in enumerate(placement) if holder == rank]
    return f"stage{'s' * (len(stages) > 1)} {' '.join(stages)}"


def _cell(tp: int, ranks: Sequence[int] | None) -> str:
    """The ranks that share one stage of one copy: `[0 1]`, `[0-7]`; `[..]` where their numbers are not given."""
    if not ranks:
        return f"[{'.' * tp}]" if tp <= 8 else f"[{tp} ranks]"
    if tp > 2 and list(ranks) == list(range(ranks[0], ranks[0] + tp)):
        return f"[{ranks[0]}-{ranks[-1]}]"
    return f"[{' '.join(map(str, ranks))}]"
