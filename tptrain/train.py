"""The run, as one page: everything is built here, in the order in which data flows, and then the loop."""

from __future__ import annotations

import gc
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tptrain.checkpoint.folder import read_state
from tptrain.checkpoint.hugging_face.weights import load_weights
from tptrain.checkpoint.restore import restore
from tptrain.checkpoint.saver import Saver
from tptrain.checkpoint.sharded import load
from tptrain.config import Config, refuse
from tptrain.data.dataset import VAL_LOSS, open_data
from tptrain.data.stream import StreamRows, merge_states
from tptrain.data.tokenizers import load_tokenizer
from tptrain.mesh import background_group, build_mesh, own_device
from tptrain.monitor.log import prepare_logger
from tptrain.monitor.peak_memory import reset_peak_memory
from tptrain.monitor.step_timer import StepTimer
from tptrain.monitor.wandb_id import adopt_id, kept_id
from tptrain.report import Report
from tptrain.step_watch import StepWatch
from tptrain.stop import Stopped, Wish
from tptrain.trainer import BrokenOff, Trainer


def train(config: Config, run_dir: Path, store_dir: Path, wish: Wish | None = None) -> float | None:
    """Train on this rank until train.max_steps. Every rank of the job calls this, with the process group up.

    config: resolved. store_dir: what `prepare` gave. wish: what tells this rank to stop. Returns the last validation loss in nats a
    token, or None. Raises Stopped, on all ranks, once what was asked to stop is saved.
    """
    began = time.perf_counter()
    gc.collect()
    gc.freeze()  # so that the garbage collector does not look through all of torch in the middle of a step or a save
    reset_peak_memory()
    device = own_device(config.hardware.device)
    mesh = build_mesh(config.parallel, device, config.launch.timeout_seconds)
    trainer = Trainer(config, mesh, open_data(config, store_dir))
    saver = Saver(run_dir, config.checkpoint, background_group(config.checkpoint.timeout_seconds))
    resume(trainer, run_dir, saver.group)
    trainer.read_ahead()
    max_steps = config.train.max_steps
    report = Report(config, mesh, trainer, run_dir)
    watch = StepWatch(trainer, report, saver, wish or Wish())
    timer, val_loss, result = StepTimer(), None, None
    try:
        if trainer.evaluation_due:
            val_loss = evaluate(trainer, report, watch)
        timer.start()
        while trainer.steps_done < max_steps and not watch.stop:
            zero = report.common_zero(trainer.steps_done + 1)
            result = trainer.step()
            step, last = trainer.steps_done, trainer.steps_done == max_steps
            logs = last or is_due(step, config.train.log_every)
            evaluates = config.train.eval_steps != 0 and (last or is_due(step, config.train.eval_every))
            saves = last or is_due(step, config.checkpoint.every)
            waits = logs or evaluates or saves or zero is not None
            if waits:
                result.wait()  # for the device, so that the clock stops after the step
            watch.look(step, result, waits)
            saver.prepare(trainer.share.owned_parameters(), trainer.optimizer)
            report.saved(saver.take_complete())
            saves = (saves and not watch.in_doubt) or watch.stop
            timer.step()
            with timer.paused():
                if logs:
                    waited = trainer.train_data.take_wait_seconds()
                    report.step(step, result, timer.take(), waited, trainer.samples_done, trainer.spans, watch.skipped)
                if zero is not None:
                    report.trace(step, trainer.spans, zero)
                if evaluates:
                    val_loss = evaluate(trainer, report, watch)
                    saves = saves or watch.stop
                if saves:
                    save_checkpoint(trainer, saver)
        if config.train.sample_tokens and result is not None and not watch.stop:
            with suppress(BrokenOff):
                report.sample(write_text(trainer, config, run_dir))
        saver.finish()
        if watch.stop and (trainer.steps_done < max_steps or trainer.evaluation_due):
            report.stopped(trainer.steps_done, time.perf_counter() - began)
            raise Stopped(watch.farewell())
        report.finish(trainer.steps_done, result, trainer.samples_done, val_loss, timer.overall(), time.perf_counter() - began)
    finally:
        saver.close()
        trainer.close()
        report.close()
    return val_loss


def evaluate(trainer: Trainer, report: Report, watch: StepWatch) -> float | None:
    """Evaluate and report; the validation loss. Put off, to where the run goes on, when the job is to stop; then None."""
    trainer.evaluation_due = True
    if not watch.stop:
        try:
            losses = trainer.evaluate()
        except BrokenOff:
            watch.stop = not watch.in_doubt
        else:
            trainer.evaluation_due = False
            report.evaluation(trainer.steps_done, losses)
            return losses[VAL_LOSS]
    return None


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 means never."""
    return every > 0 and step % every == 0


def resume(trainer: Trainer, run_dir: Path, group: dist.ProcessGroup) -> None:
    """Continue from the checkpoint that the config points to, else begin with the weights of train.init_from, if there are any.

    group: all ranks, over gloo, with the time limit of the slowest disk.
    """

    def read(start: Path) -> None:
        _check_same_data(trainer, start)
        load(start, trainer.share.parameters(), trainer.optimizer, group)

    config = trainer.config
    start, passed_over = restore(config, run_dir, read, group)
    for line in passed_over:
        prepare_logger().warning(line)
    if start is None:
        if config.train.init_from is not None:
            load_weights(config.train.init_from, config.model, trainer.share.named_parameters())
        return
    state = read_state(start)
    trainer.share.repeat_tied(trainer.optimizer)
    trainer.steps_done, trainer.samples_done = state["step"], state["samples"]
    trainer.load_progress(state.get("progress", {}))
    if isinstance(trainer.data.train, StreamRows) and trainer.reads:
        trainer.data.train.load_state(state.get("stream"))
    if dist.get_rank() == 0 and (config.checkpoint.resume == "auto" or config.wandb.continue_run):
        adopt_id(run_dir, state.get("wandb_id"))


def _check_same_data(trainer: Trainer, start: Path) -> None:
    """Refuse a checkpoint whose sample numbers stand for other text, as the sources had not as many tokens. An older one does not say."""
    saved, found = read_state(start).get("train_tokens"), dict(trainer.data.train_tokens)
    if saved is not None and saved != found:
        had, has = (", ".join(f"{name} {count:,}" for name, count in tokens.items()) for tokens in (saved, found))
        rule = f"has other text than {start}: training tokens {has}, but it was made with {had}"
        raise refuse("data.source", trainer.config.data.source, rule, "use the same text, or another hydra.run.dir")


def save_checkpoint(trainer: Trainer, saver: Saver) -> None:
    """Save what a resume under any layout needs."""
    state = {"step": trainer.steps_done, "samples": trainer.samples_done, "config": asdict(trainer.config)}
    state["train_tokens"] = dict(trainer.data.train_tokens)
    state["progress"] = trainer.progress()
    state["wandb_id"] = kept_id(saver.run_dir)
    if isinstance(trainer.data.train, StreamRows):
        state["stream"] = _gather_stream_state(trainer, trainer.data.train)
    saver.save(trainer.share.owned_parameters(), trainer.optimizer, state)


def _gather_stream_state(trainer: Trainer, rows: StreamRows) -> dict[str, Any] | None:
    """Where the lanes of the stream stand, from all ranks that read, on rank 0; None elsewhere."""
    world = trainer.mesh.world
    own = rows.state(trainer.samples_done) if trainer.reads else None
    states: list[dict[str, Any] | None] | None = [None] * world.size() if dist.get_rank() == 0 else None
    dist.gather_object(own, states, dst=0, group=world)
    return merge_states(states) if states is not None else None


def write_text(trainer: Trainer, config: Config, run_dir: Path) -> str | None:
    """A sample of what the model has learned to write, or None where the data is no text."""
    tokenizer = load_tokenizer(config.data, run_dir)
    if tokenizer is None:
        return None
    end = tokenizer.end_of_document
    return tokenizer.decode(trainer.sample([end], config.train.sample_tokens, end))
