"""What `tptrain plan` prints: the stages as a table on stderr, the schedule on stdout, as a file with the keys that go with it."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from tptrain.config import Config
from tptrain.pipeline.notation import dumps
from tptrain.plan.pipeline import PipelinePlan, describe


def plan(config: Config) -> None:
    """Print the plan of a resolved config. Raises ConfigError for a schedule file that cannot run."""
    described = describe(config)
    terminal = Console(stderr=True, highlight=False, markup=False)
    terminal.print(stage_table(described))
    for label, text in facts(config, described):
        terminal.print(f"{label:<12}{text}", soft_wrap=True)
    sys.stderr.flush()
    sys.stdout.write(f"# {' '.join(keys_of_a_file(config))}\n{dumps(described.schedule)}")


def stage_table(described: PipelinePlan) -> Table:
    """A row a stage."""
    table = Table()
    for heading in ("stage", "rank", "layers", "parameters", "forward FLOPs"):
        table.add_column(heading, justify="right")
    whole = sum(stage.forward_flops_per_token for stage in described.stages)
    for number, stage in enumerate(described.stages):
        first, last = stage.first_layer, stage.last_layer - 1
        layers = f"{first}" if first == last else f"{first}-{last}"
        share = stage.forward_flops_per_token / whole
        table.add_row(f"{number}", f"{stage.rank}", layers, f"{stage.parameters:,}", f"{100 * share:.1f} %")
    return table


def facts(config: Config, described: PipelinePlan) -> list[tuple[str, str]]:
    """What holds of the whole pipeline, as (label, value)."""
    parallel = config.parallel
    micro_batches = f"{parallel.micro_batches} micro-batch{'es' * (parallel.micro_batches > 1)}"
    peaks = " ".join(map(str, described.peaks))
    processes = f"{config.processes} process{'es' * (config.processes > 1)}"
    return [
        ("layout", f"tp {parallel.tp} x pp {parallel.pp} x dp {parallel.dp} = {processes}"),
        ("schedule", f"{parallel.schedule}, {micro_batches}"),
        ("bubble", f"{100 * described.bubble_fraction:.1f} % of the ranks' time, by FLOPs"),
        ("activations", f"at most {peaks} live, rank by rank; one is what a stage keeps of a micro-batch"),
    ]


def keys_of_a_file(config: Config) -> list[str]:
    """What must be set beside `parallel.schedule=FILE` for a schedule of this config."""
    return [f"parallel.{key}={getattr(config.parallel, key)}" for key in ("pp", "stages_per_rank", "micro_batches")]
