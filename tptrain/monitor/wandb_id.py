"""Who a W&B run is: its id, which stays when the run is resumed, and its name.

The id is made once and kept in `RUN/wandb_id` and in each checkpoint's `state.json`, under `wandb_id`.
"""

from __future__ import annotations

from pathlib import Path

from tptrain.config import Config, ParallelConfig
from tptrain.files import write_atomically

_ID_FILE, _USUAL_SCHEDULE = "wandb_id", "1f1b"


def kept_id(run_dir: Path) -> str | None:
    """The id that a run folder keeps, or None where it has had no W&B run yet."""
    try:
        return (run_dir / _ID_FILE).read_text().strip() or None
    except OSError:
        return None


def keep_id(run_dir: Path, wandb_id: str) -> None:
    """Keep an id in a run folder."""
    if kept_id(run_dir) != wandb_id:
        write_atomically(run_dir / _ID_FILE, f"{wandb_id}\n".encode())


def adopt_id(run_dir: Path, wandb_id: str | None) -> None:
    """Let a run folder that has had no W&B run yet go on in the one whose id a checkpoint brought, if it did."""
    if wandb_id and kept_id(run_dir) is None:
        keep_id(run_dir, wandb_id)


def run_name(config: Config) -> str:
    """The choices that a run is told apart by: model, layout, a schedule other than 1f1b, learning rate: `gpt_1b-tp4_pp2-zb_v-lr3e-4`."""
    parallel = config.parallel
    schedule = Path(parallel.schedule).stem if parallel.pp > 1 and parallel.schedule != _USUAL_SCHEDULE else None
    parts = [config.model.name, layout_name(parallel), schedule, f"lr{short(config.optimizer.lr)}"]
    return "-".join(part for part in parts if part)


def layout_name(parallel: ParallelConfig) -> str:
    """The parts of a resolved layout that are larger than 1: `tp2_pp2`, or `single`."""
    sizes = {"tp": parallel.tp, "pp": parallel.pp, "dp": int(parallel.dp)}
    return "_".join(f"{part}{size}" for part, size in sizes.items() if size > 1) or "single"


def short(number: float) -> str:
    """A number as one writes a learning rate.

    >>> short(3e-4), short(0.00025), short(1.0), short(0)
    ('3e-4', '2.5e-4', '1e0', '0')
    """
    if number == 0:
        return "0"
    mantissa, exponent = f"{number:.6e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
