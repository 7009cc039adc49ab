"""A run's config: from what was asked to what will run.

`resolve` checks each value (`config_values.py`) and which combinations make sense, and fills in what follows; or it raises one
`ConfigError`, whose text is one line: the key, its value, the rule, and what would do. Nothing here imports torch, so that a refusal is
quick. The schema (`schema.py`) is given on from here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

from tptrain.config_error import ConfigError as ConfigError
from tptrain.config_error import as_text as as_text
from tptrain.config_error import refuse as refuse
from tptrain.config_values import CHOICES as CHOICES
from tptrain.config_values import STAGES_PER_RANK as STAGES_PER_RANK
from tptrain.config_values import check_values as check_values
from tptrain.data_config import DataConfig as DataConfig
from tptrain.data_config import TokenizerConfig as TokenizerConfig
from tptrain.hardware_config import HardwareConfig as HardwareConfig
from tptrain.launch_config import LaunchConfig as LaunchConfig
from tptrain.plan_config import PlanConfig as PlanConfig
from tptrain.schema import CheckConfig as CheckConfig
from tptrain.schema import CheckpointConfig as CheckpointConfig
from tptrain.schema import Config as Config
from tptrain.schema import DoctorConfig as DoctorConfig
from tptrain.schema import LrScheduleConfig as LrScheduleConfig
from tptrain.schema import ModelConfig as ModelConfig
from tptrain.schema import OptimizerConfig as OptimizerConfig
from tptrain.schema import ParallelConfig as ParallelConfig
from tptrain.schema import TrainConfig as TrainConfig
from tptrain.schema import WandbConfig as WandbConfig


def resolve(config: Config, started: int | None = None, devices: int | None = None, started_here: int | None = None) -> Config:
    """Check `config` and fill in what follows from it: dp, micro_batches, global_batch_size.

    started: processes that a launcher already started, or None where this command starts them. started_here: those of them on this
    machine; None: all. devices: accelerators on this machine, or None on CPU, where any number of processes will do.
    Raises ConfigError at the first thing that cannot run.
    """
    config = copy.deepcopy(config)
    check_values(config)
    if started is None:
        _resolve_layout(config.parallel, config.launch, devices)
    else:
        _resolve_started_layout(config, started, started_here or started)
    settle(config)
    return config


def settle(config: Config) -> None:
    """Fill in the stages and the batch of a config whose single values are checked and whose dp is a number, and check what model,
    layout and batch ask of each other. Changes `config`. Raises ConfigError at the first thing that cannot run."""
    _resolve_stages(config.parallel)
    _check_model(config)
    _check_partition(config)
    _resolve_batch(config)


def refuse_unprovable(config: Config) -> None:
    """Whether `tptrain check` can tell a right layout from a wrong one under a resolved config. Raises ConfigError."""
    if config.train.precision != "fp32":
        rule = "rounds to 8 bits, too few to tell a wrong layout from rounding"
        raise refuse("train.precision", config.train.precision, rule, "use train.precision=fp32 for tptrain check")
    if config.check.layouts == "all" and config.check.processes < 2:
        rule = "leaves no layout to compare with one process"
        raise refuse("check.processes", config.check.processes, rule, "use 2 or more, or check.layouts=own")


def _resolve_started_layout(config: Config, started: int, started_here: int) -> None:
    """Turn dp=auto into a number and compare tp x pp x dp with the processes that a launcher has started."""
    parallel = config.parallel
    if config.launch.nodes > 1:
        rule = f"starts ranks on several nodes, but a launcher has already started {started}"
        raise refuse("launch.nodes", config.launch.nodes, rule, "leave launch.nodes out, or start without torchrun")
    inner = parallel.tp * parallel.pp
    if parallel.dp == "auto":
        parallel.dp = max(1, started // inner)
    if config.processes != started:
        remedy = f"use parallel.dp={started // inner}" if started % inner == 0 else f"start {_processes(config.processes)}"
        raise refuse("parallel.dp", parallel.dp, f"gives {_product(parallel)}, but {started} were started", remedy)
    if started_here < started:
        check_nodes(parallel, started_here, f"start {parallel.tp} on each, or a multiple (LOCAL_WORLD_SIZE, slurm.tasks_per_node)")


def _resolve_layout(parallel: ParallelConfig, launch: LaunchConfig, devices: int | None) -> None:
    """Turn dp=auto into a number and share tp x pp x dp out to the nodes and their accelerators."""
    inner, nodes, asked = parallel.tp * parallel.pp, launch.nodes, launch.processes_per_node
    room = devices if asked == "auto" else int(asked)
    if devices is not None and room is not None and room > devices:
        rule = f"is more than the {devices} GPU{'s' * (devices > 1)} of this machine"
        raise refuse("launch.processes_per_node", asked, rule, f"use {devices} or less, or hardware.device=cpu")
    if parallel.dp == "auto":  # with nothing to go by, the fewest copies that give each node whole tp groups
        parallel.dp = nodes // math.gcd(parallel.pp, nodes) if room is None else max(1, room * nodes // inner)
    wanted = inner * int(parallel.dp)
    product = f"gives {_product(parallel)}, but"
    if devices is not None and wanted > devices * nodes:
        have = f"this machine has {devices} GPU{'s' * (devices > 1)}"
        raise refuse(
            "parallel.dp", parallel.dp, f"{product} {have}" + f", {nodes} such nodes {devices * nodes}" * (nodes > 1),
            f"use parallel.dp={max(1, devices * nodes // inner)}" if inner <= devices * nodes
            else "use a smaller tp or pp, or hardware.device=cpu",
        )  # fmt: skip
    if asked != "auto" and wanted != int(asked) * nodes:
        sought = int(asked) * nodes
        rule = f"{product} launch.nodes={nodes} x launch.processes_per_node={asked} = {sought}"
        remedy = f"use parallel.dp={sought // inner}" if sought % inner == 0 else "use a tp and pp whose product divides that"
        raise refuse("parallel.dp", parallel.dp, rule, remedy)
    if wanted % nodes:
        low = wanted // nodes * nodes
        rule = f"does not divide the {_product(parallel)}"
        raise refuse("launch.nodes", nodes, rule, f"use a layout of {f'{low} or ' * bool(low)}{low + nodes} processes")
    if nodes > 1:
        check_nodes(parallel, wanted // nodes, f"use a tp that divides {wanted // nodes}, or more copies by parallel.dp")


def check_nodes(parallel: ParallelConfig, on_each: int, remedy: str) -> None:
    """Whether each node holds whole tp groups, which are runs of consecutive ranks: their messages are too many for what joins nodes."""
    if on_each % parallel.tp:
        rule = f"does not divide the {_processes(on_each)} of a node, so that a tp group would straddle two nodes"
        raise refuse("parallel.tp", parallel.tp, rule, remedy)


def _product(parallel: ParallelConfig) -> str:
    """`tp 2 x pp 2 x dp 1 = 4 processes`."""
    count = parallel.tp * parallel.pp * int(parallel.dp)
    return f"tp {parallel.tp} x pp {parallel.pp} x dp {parallel.dp} = {_processes(count)}"


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


def _check_model(config: Config) -> None:
    """Whether the layout can split the model, and the model can read the data."""
    model, parallel = config.model, config.parallel
    if model.hidden_size % model.num_heads:
        raise refuse("model.num_heads", model.num_heads, f"does not divide model.hidden_size={model.hidden_size}",
                     f"use {_near(_divisors(model.hidden_size), model.num_heads)}")  # fmt: skip
    if model.num_heads % model.kv_heads:
        raise refuse("model.num_kv_heads", model.kv_heads, f"does not divide model.num_heads={model.num_heads}",
                     f"use {_near(_divisors(model.num_heads), model.kv_heads)}")  # fmt: skip
    if model.position == "rope" and model.head_size % 2:
        raise refuse("model.position", "rope", f"turns pairs, but hidden_size {model.hidden_size} / num_heads {model.num_heads} = "
                     f"{model.head_size} is odd", "use model.position=learned, or heads of an even size")  # fmt: skip
    good = [tp for tp in _divisors(math.gcd(model.num_heads, model.ffn_hidden_size)) if _splits_evenly(model.kv_heads, tp)]
    for key, size in (("num_heads", model.num_heads), ("ffn_hidden_size", model.ffn_hidden_size)):
        if size % parallel.tp:
            raise refuse("parallel.tp", parallel.tp, f"does not divide model.{key}={size}", f"use {_near(good, parallel.tp)}")
    if not _splits_evenly(model.kv_heads, parallel.tp):
        rule = f"neither divides model.num_kv_heads={model.kv_heads} nor is a multiple of it"
        raise refuse("parallel.tp", parallel.tp, rule, f"use {_near(good, parallel.tp)}")
    if parallel.sequence_parallel and config.data.seq_len % parallel.tp:
        low = config.data.seq_len // parallel.tp * parallel.tp
        raise refuse("data.seq_len", config.data.seq_len, f"is not split evenly by parallel.tp={parallel.tp}, as sequence_parallel asks",
                     f"use {low or parallel.tp} or parallel.sequence_parallel=false")  # fmt: skip
    if parallel.tp > model.vocab_size:
        raise refuse("parallel.tp", parallel.tp, f"is more than model.vocab_size={model.vocab_size}", f"use at most {model.vocab_size}")
    if parallel.num_stages > model.num_layers:
        each = int(parallel.stages_per_rank)
        stages = f"x parallel.stages_per_rank={each} " * (each > 1)
        remedies = [f"model.num_layers={parallel.num_stages} or more"]
        if model.num_layers >= each:
            remedies.insert(0, f"parallel.pp={model.num_layers // each}" + " or less" * (model.num_layers >= 2 * each))
        if each > 1 and STAGES_PER_RANK.get(parallel.schedule, 0) is None and model.num_layers >= parallel.pp:
            remedies.insert(0, f"parallel.stages_per_rank={model.num_layers // parallel.pp}")
        raise refuse("parallel.pp", parallel.pp, f"{stages}needs a layer a stage, but model.num_layers={model.num_layers}",
                     f"use {', or '.join(remedies)}")  # fmt: skip
    if config.data.seq_len > model.max_seq_len:
        raise refuse("data.seq_len", config.data.seq_len, f"is over model.max_seq_len={model.max_seq_len}",
                     f"use data.seq_len={model.max_seq_len} or less, or a larger model.max_seq_len")  # fmt: skip


def _resolve_stages(parallel: ParallelConfig) -> None:
    """Turn stages_per_rank=auto into a number and compare it with the schedule."""
    name, given = parallel.schedule, parallel.stages_per_rank
    if name not in STAGES_PER_RANK and not parallel.schedule_is_file:
        names = ", ".join(STAGES_PER_RANK)
        raise refuse("parallel.schedule", name, "is unknown", f"use one of {names}, or the path of a file that ends in .txt")
    needed = STAGES_PER_RANK.get(name)
    if given == "auto":
        parallel.stages_per_rank = needed or (2 if name == "interleaved" else 1)
    elif needed is not None and given != needed:
        fitting = [other for other, stages in STAGES_PER_RANK.items() if stages in (None, given)]
        rule = f"does not fit parallel.schedule={name}, which has {needed} stage{'s' * (needed > 1)} a rank"
        raise refuse("parallel.stages_per_rank", given, rule, f"use {needed} or auto, or parallel.schedule={' or '.join(fitting)}")


def _check_partition(config: Config) -> None:
    """Whether a list of layers a stage fits the stages and the layers."""
    sizes, stages, layers = config.parallel.partition, config.parallel.num_stages, config.model.num_layers
    if sizes in ("balanced", "even"):
        return
    is_list = isinstance(sizes, list) and all(isinstance(size, int) and size >= 1 for size in sizes)
    if not is_list or len(sizes) != stages or sum(sizes) != layers:
        rule = f"is not {stages} number{'s' * (stages > 1)} of layers, 1 or more each, that sum to model.num_layers={layers}"
        example = [layers // stages + (stage < layers % stages) for stage in range(stages)]
        raise refuse("parallel.partition", sizes, rule, f"use balanced, even or {as_text(example)}")


def _resolve_batch(config: Config) -> None:
    """One of micro_batches and global_batch_size follows from the other."""
    parallel, train = config.parallel, config.train
    row = parallel.micro_batch_size * int(parallel.dp)
    if train.global_batch_size is None:
        train.global_batch_size = row * parallel.micro_batches
    elif train.global_batch_size % row:
        low = train.global_batch_size // row * row
        raise refuse(
            "train.global_batch_size", train.global_batch_size,
            f"is no multiple of micro_batch_size {parallel.micro_batch_size} x dp {parallel.dp} = {row}",
            f"use {low} or {low + row}" if low else f"use {row}",
        )  # fmt: skip
    parallel.micro_batches = train.global_batch_size // row


def _splits_evenly(kv_heads: int, tp: int) -> bool:
    """Whether each rank's query heads need whole key/value heads, the same number on every rank."""
    return kv_heads % tp == 0 or tp % kv_heads == 0


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _near(values: Iterable[int], wanted: int, count: int = 6) -> str:
    """The values nearest to the wanted one, in order: `1, 2, 4 or 8`."""
    nearest = sorted(sorted(values, key=lambda value: abs(value - wanted))[:count])
    head, last = nearest[:-1], str(nearest[-1])
    return f"{', '.join(map(str, head))} or {last}" if head else last
