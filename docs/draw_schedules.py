"""Draws the pictures of docs/pipeline.md: `python docs/draw_schedules.py` writes docs/schedules/*.svg."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from tptrain.monitor.draw_style import STYLE
from tptrain.monitor.draw_timeline import draw
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.simulate import Costs, Simulation, simulate

FOLDER = Path(__file__).parent / "schedules"
RANKS, MICRO_BATCHES = 4, 8
STAGES_PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb_h1": 1, "zb_v": 2}
UNIT_SECONDS = 6.0
"""Of a rank's forward, input gradient and weight gradient each; its stages share it."""
WIDTH, HEIGHT, LEFT = 11.0, 1.5, 0.5
"""Inches of a picture, and of its margin, where the ranks' names stand."""


def simulation(name: str) -> Simulation:
    """One step of the schedule, all stages alike, transfers that take no time."""
    stages = STAGES_PER_RANK[name]
    costs = [UNIT_SECONDS / stages] * (RANKS * stages)
    return simulate(SCHEDULES[name](RANKS, stages, MICRO_BATCHES), Costs(costs, costs, costs))


def main() -> None:
    """Draw all of them to one scale of time."""
    FOLDER.mkdir(exist_ok=True)
    longest = max(simulation(name).step_seconds for name in STAGES_PER_RANK)
    with mpl.rc_context(STYLE | {"svg.hashsalt": "tptrain", "svg.fonttype": "none"}):  # the same file each time, with text as text
        for name in STAGES_PER_RANK:
            figure = Figure(figsize=(WIDTH, HEIGHT))
            axes = figure.add_axes((LEFT / WIDTH, 0.02, (WIDTH - LEFT) / WIDTH, 0.96))
            draw(axes, simulation(name).timeline, 1.0, (WIDTH - LEFT) / longest, 0.96 * HEIGHT / RANKS)
            axes.set_xlim(0, longest)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
