"""Draws the pictures of docs/pipeline.md: `python docs/draw_schedules.py` writes docs/schedules/*.svg."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

from tptrain.monitor.draw_timeline import draw
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.simulate import Costs, Simulation, simulate

FOLDER = Path(__file__).parent / "schedules"
RANKS, MICRO_BATCHES = 4, 8
STAGES_PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb_h1": 1, "zb_v": 2}
UNIT_SECONDS = 6.0
"""Of a rank's forward, input gradient and weight gradient each; its stages share it."""


def simulation(name: str) -> Simulation:
    """One step of the schedule, all stages alike, transfers that take no time."""
    stages = STAGES_PER_RANK[name]
    costs = [UNIT_SECONDS / stages] * (RANKS * stages)
    return simulate(SCHEDULES[name](RANKS, stages, MICRO_BATCHES), Costs(costs, costs, costs))


def main() -> None:
    """Draw all of them to one scale of time."""
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.hashsalt": "tptrain", "svg.fonttype": "none"}  # the same file each time, with text as text
    FOLDER.mkdir(exist_ok=True)
    longest = max(simulation(name).step_seconds for name in STAGES_PER_RANK)
    for name in STAGES_PER_RANK:
        figure = Figure(figsize=(13, 1.7))
        axes = figure.add_axes((0.05, 0.12, 0.945, 0.84))
        draw(axes, simulation(name).timeline, 1.0, 13 * 0.945 / longest, 1.7 * 0.84 / RANKS)
        axes.set_xlim(0, longest)
        axes.set_xticks([])
        axes.set_xlabel("")
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
