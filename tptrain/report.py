"""What a run says of itself while it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from tptrain.config import Config
from tptrain.data.dataset import VAL_LOSS
from tptrain.mesh import Mesh
from tptrain.model.flops import flops_per_token, num_parameters
from tptrain.monitor.console import Console
from tptrain.monitor.log import prepare_logger
from tptrain.monitor.metrics import MetricsFile, Record, bubble_fraction, eval_record, train_record, windows
from tptrain.monitor.peak_memory import peak_memory_bytes
from tptrain.monitor.status import write_status
from tptrain.monitor.tensorboard import TensorBoard
from tptrain.monitor.trace import RankSpans, Recorded, clock_name, clock_number, on_one_clock, plain_spans, write_trace
from tptrain.monitor.wandb_id import layout_name
from tptrain.monitor.wandb_run import start_wandb
from tptrain.pipeline.timeline import Span, busy
from tptrain.plan.pipeline import describe
from tptrain.tensor_parallel.parameter import local_part
from tptrain.trainer import StepResult, Trainer


class Report:
    """What the run says of itself: terminal, metrics.jsonl, status.json and W&B on rank 0; on other ranks nothing.

    Some numbers are of all ranks, so every rank calls every method.
    """

    def __init__(self, config: Config, mesh: Mesh, trainer: Trainer, run_dir: Path) -> None:
        self.config, self.mesh, self.run_dir, self.data = config, mesh, run_dir, trainer.data
        self.tokens_per_step = config.batch_size * config.data.seq_len
        self.state = "failed"  # what the run is if it ends now
        self.speaks = dist.get_rank() == 0
        parameters = [int(count) for (count,) in self.gather([sum(local_part(p).numel() for _, p in trainer.share.named_parameters())])]
        if not self.speaks:
            return
        first_step = trainer.steps_done
        pipeline = describe(config)
        facts = {
            "parameters": num_parameters(config.model),
            "stages": [(stage.rank, stage.first_layer, stage.last_layer, stage.parameters) for stage in pipeline.stages],
            "bubble_fraction": pipeline.bubble_fraction,
            "parameters_per_rank": parameters,
            "ranks": mesh.ranks,
            "device": _device_name(mesh.device),
            "data": self.data.text,
            "reads": self.data.reads(config.train.max_steps * config.batch_size),
            "run_dir": run_dir,
        }
        write_status(run_dir, "running", first_step)
        self.metrics = MetricsFile(run_dir, first_step, trainer.evaluation_due)
        self.console = Console(config, config.train.max_steps, first_step)
        self.console.banner(facts)
        facts |= {"processes": config.processes, "layout": layout_name(config.parallel)}
        earlier = self.metrics.earlier
        self.wandb = start_wandb(config, run_dir, facts, earlier=earlier, say=self.console.say)
        self.tensorboard = TensorBoard(config.train.tensorboard, run_dir, earlier or ())

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Every rank's numbers, by rank, in one all-reduce; exact for integers below 2^53."""
        values = torch.zeros(self.mesh.world.size(), len(numbers), dtype=torch.float64, device=self.mesh.device)
        values[dist.get_rank()] = torch.tensor(numbers, dtype=torch.float64)
        if self.mesh.world.size() > 1:
            dist.all_reduce(values, group=self.mesh.world)
        return values.tolist()

    def step(
        self,
        step: int,
        result: StepResult,
        step_seconds: float | None,
        wait_seconds: float,
        samples: int,
        spans: Sequence[Span],
        skipped_steps: int = 0,
    ) -> None:
        """Log a training step.

        step_seconds: mean over the steps since the last logged one. wait_seconds: of these, this rank waited for its rows, mean too.
        samples: read since the start. spans: what this rank computed when in the step. skipped_steps: left out since the start.
        """
        first = min((span.start for span in spans), default=math.inf)
        last = max((span.end for span in spans), default=-math.inf)
        own = [peak_memory_bytes(self.mesh.device.type), busy(spans), first, last, clock_number(clock_name()), wait_seconds]
        peak_memory, busy_seconds, starts, ends, clocks, waits = zip(*self.gather(own), strict=True)
        if self.speaks:
            record = train_record(
                step=step,
                tokens=samples * self.config.data.seq_len,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=result.lr,
                step_time=step_seconds,
                tokens_per_step=self.tokens_per_step,
                model_flops_per_token=flops_per_token(self.config.model, self.config.data.seq_len),
                peak_flops_per_second=self.config.hardware.peak_flops_per_second,
                processes=self.mesh.world.size(),
                bubble_fraction=bubble_fraction(busy_seconds, windows(starts, ends, clocks)),
                data_wait_fraction=max(waits) / step_seconds if step_seconds else None,
                peak_memory_bytes=int(max(peak_memory)),
                skipped_steps=skipped_steps,
                time=time.time(),
            )
            self._log(record)
            self.console.step(record)

    def common_zero(self, step: int) -> float | None:
        """Let all ranks begin a step that is to be traced at one moment; its time on this rank's `time.perf_counter`. Else None.

        An all-reduce returns on one rank after the other; `on_one_clock` makes up for that among ranks of one machine.
        """
        if step not in self.config.train.trace_steps:
            return None
        token = torch.zeros(1, device=self.mesh.device)
        if self.mesh.world.size() > 1:
            dist.all_reduce(token, group=self.mesh.world)
        token.item()  # the device too has nothing left to do
        return time.perf_counter()

    def trace(self, step: int, spans: Sequence[Span], zero: float) -> None:
        """Keep what all ranks computed when in a step. spans: of this rank. zero: what `common_zero` gave it before the step."""
        mesh = self.mesh
        place = RankSpans(dist.get_rank(), mesh.pp_rank, mesh.dp_rank, mesh.tp_rank, plain_spans(spans))
        own = Recorded(clock_name(), zero, place)
        ranks: list[Recorded] = [own] * mesh.world.size()
        if mesh.world.size() > 1:
            dist.gather_object(own, ranks if self.speaks else None, dst=0, group=mesh.world)
        if self.speaks and any(each.rank.spans for each in ranks):
            parallel = self.config.parallel
            layout = {"tp": parallel.tp, "pp": parallel.pp, "dp": parallel.dp}
            facts = {"layout": layout, "schedule": parallel.schedule, "micro_batches": parallel.micro_batches}
            write_trace(self.run_dir, step, on_one_clock(ranks), facts)

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Log an evaluation. losses: what `Trainer.evaluate` gives."""
        if self.speaks:
            sets = {key: loss for key, loss in losses.items() if key != VAL_LOSS}
            record = eval_record(step=step, val_loss=losses[VAL_LOSS], sets=sets)
            self._log(record)
            self.console.evaluation(record)

    def saved(self, step: int | None) -> None:
        """Note a checkpoint that has become complete; None: there is none."""
        if self.speaks and step is not None:
            write_status(self.run_dir, "running", step)

    def warn(self, text: str) -> None:
        """A line that is out of the ordinary, on the terminal and in the log."""
        if self.speaks:
            prepare_logger().warning(text)

    def stopped(self, step: int, wall_seconds: float) -> None:
        """Close the run as stopped. step: the last that is done."""
        self.state = "stopped"
        if self.speaks:
            write_status(self.run_dir, "stopped", step)
            self.console.summary(state="stopped", step=step, wall_seconds=wall_seconds, run_dir=self.run_dir)

    def sample(self, text: str | None) -> None:
        """Show what the model writes."""
        if self.speaks and text is not None:
            self.console.sample(text)

    def finish(
        self,
        step: int,
        result: StepResult | None,
        samples: int,
        val_loss: float | None,
        step_seconds: float | None,
        wall_seconds: float,
    ) -> None:
        """Close the run as done. samples: read since the start. step_seconds: mean over the run."""
        self.state = "done"
        if not self.speaks:
            return
        write_status(self.run_dir, "done", step)
        self.console.summary(
            step=step,
            loss=None if result is None else result.loss,
            val_loss=val_loss,
            tokens_per_second=self.tokens_per_step / step_seconds if step_seconds else None,
            wall_seconds=wall_seconds,
            reads=self.data.reads(samples),
            run_dir=self.run_dir,
        )

    def close(self) -> None:
        """Let go of the terminal and the files, however the run ended: as failed, unless `finish` or `stopped` was called."""
        if self.speaks:
            self.console.close()
            self.metrics.close()
            self.tensorboard.close()
            self.wandb.finish(self.state)

    def _log(self, record: Record) -> None:
        self.metrics.write(record)
        self.wandb.log(record)
        self.tensorboard.log(record)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads > 1)} a rank"
