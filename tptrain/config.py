"""The schema of every config group, and the checks between groups.

Values live in `conf/`; this file says which keys exist, what type each has, and which combinations make
sense. `resolve` turns what was asked into what will run, or raises one `ConfigError`, whose text is one
line: the key, its value, the rule, and what would do. Nothing here imports torch, so that a refusal is quick.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from tptrain.config_error import ConfigError as ConfigError
from tptrain.config_error import as_text
from tptrain.config_error import refuse as refuse
from tptrain.data_config import DataConfig as DataConfig
from tptrain.data_config import TokenizerConfig as TokenizerConfig
from tptrain.data_config import check_data
from tptrain.hardware_config import HardwareConfig as HardwareConfig
from tptrain.hardware_config import check_hardware
from tptrain.launch_config import LaunchConfig as LaunchConfig
from tptrain.launch_config import check_launch
from tptrain.plan_config import PlanConfig as PlanConfig
from tptrain.plan_config import check_plan


@dataclass
class ModelConfig:
    """A GPT. Sizes are those of the whole model; a rank holds its share of them."""

    name: str
    """Label of the size, used in run names."""
    vocab_size: int
    """Rows of the embedding. At least the tokenizer's vocabulary; tp need not divide it."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads; tp divides them."""
    num_kv_heads: int | None
    """Key/value heads (grouped-query attention); null means num_heads. tp divides them, or is a multiple of them."""
    ffn_hidden_size: int
    """Inner width of the MLP; tp divides it."""
    max_seq_len: int
    """Longest sequence that the model can see."""
    position: str
    """learned, or rope: q and k rotated by their position."""
    norm: str
    """layernorm or rmsnorm."""
    activation: str
    """gelu (the tanh form, as in GPT-2), or swiglu: silu(gate) * up."""
    bias: bool
    """Whether linear layers and layer norms have biases."""
    tie_embeddings: bool
    """Whether the head reuses the embedding's weight."""
    dropout: float
    """Probability of dropping an activation: after the embedding, on attention's weights, before each residual sum."""
    rope_theta: float = 10000.0
    """Base of the rotation's wavelengths (position=rope)."""
    norm_eps: float = 1e-5
    """Epsilon inside the norms."""
    init_std: float = 0.02
    """Standard deviation of initial weights; residual projections divide it by sqrt(2 * num_layers)."""
    peak_lr: float = 3e-4
    """Learning rate that suits this size: what optimizer=adamw starts from."""

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, whether asked for or not."""
        return self.num_kv_heads or self.num_heads


@dataclass
class ParallelConfig:
    """The layout tp x pp x dp and how micro-batches flow through it."""

    tp: int
    """Tensor-parallel size: ranks that share each layer."""
    pp: int
    """Pipeline-parallel size: ranks that share the stack of layers."""
    dp: int | str
    """Data-parallel size, or auto: processes / (tp * pp)."""
    sequence_parallel: bool
    """Split what lies between the split layers (norms, residuals, dropout) over tp along the sequence; tp divides data.seq_len."""
    micro_batch_size: int
    """Sequences in one forward."""
    micro_batches: int
    """Micro-batches a step on each data-parallel rank."""
    schedule: str
    """Pipeline schedule: gpipe, 1f1b, interleaved, zb_h1, zb_v, or the path of a file (.txt) that holds one, a line a rank."""
    stages_per_rank: int | str
    """Stages a pipeline rank holds, or auto: 2 with interleaved and zb_v, else 1."""
    recompute: str
    """Activations made again in backward rather than kept: none, selective (norms, activation functions, dropped attention), or
    full (all of a block but its input)."""
    partition: Any = "balanced"
    """Layers of each stage: balanced (by FLOPs, the head counted), even, or a list such as [6,7,7,4], first stage first."""

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline, of a resolved config."""
        return self.pp * int(self.stages_per_rank)

    @property
    def schedule_is_file(self) -> bool:
        """Whether `schedule` is the path of a file."""
        return self.schedule.endswith(".txt")


@dataclass
class TrainConfig:
    """The loop."""

    max_steps: int
    """Optimizer steps of the run."""
    precision: str
    """fp32, or bf16: bf16 compute with fp32 weights, gradient sums and optimizer state."""
    global_batch_size: int | None
    """Sequences a step over all ranks; null means micro_batch_size * micro_batches * dp. If set, micro_batches follows."""
    log_every: int
    """Steps between lines of metrics.jsonl."""
    eval_every: int
    """Steps between evaluations; 0 means only at the end."""
    eval_steps: int | None
    """Global batches an evaluation reads of each validation set; null means all of it, 0 no evaluation."""
    compile: bool
    """Compile the stages with torch.compile."""
    loss_chunk_tokens: int | None
    """Tokens whose logits exist at a time in the loss, made once more in backward; null means all of a micro-batch's."""
    label_smoothing: float
    """Share of each training target that is spread evenly over the vocabulary; evaluation has none."""
    init_from: str | None
    """Folder of a GPT-2 or a Llama that transformers saved, whose weights are the initial ones; null: random."""
    sample_tokens: int
    """Tokens that the trained model writes at the end of the run; 0 means none."""
    trace_steps: list[int] = field(default_factory=list)
    """Steps whose timeline is kept in traces/: what each rank computed when."""
    max_minutes: float | None = None
    """Minutes after which the run saves, stops and leaves with exit code 75, from the moment that the ranks begin; null means no limit."""
    max_skipped_steps: int = 10
    """Steps in a row that are left out because their loss or gradient is no number; one more ends the run."""
    spike_factor: float | None = None
    """A loss above so many times the mean of the last steps is reported as a spike; null means none is looked for."""
    skip_spikes: bool = False
    """Leave out the steps whose loss is a spike."""
    max_restarts: int = 0
    """Times that the ranks are started again, from the newest checkpoint, after one of them has failed."""
    tensorboard: bool = False
    """Also write the numbers of metrics.jsonl for TensorBoard, into tensorboard/ in the run folder; needs the extra `tensorboard`."""


@dataclass
class OptimizerConfig:
    """AdamW or SGD over the fp32 weights."""

    name: str
    """adamw or sgd."""
    lr: float
    """Peak learning rate."""
    betas: list[float]
    """AdamW's decay rates of the first and second moment."""
    eps: float
    """AdamW's epsilon."""
    weight_decay: float
    """Decoupled weight decay; norms and biases have none."""
    grad_clip: float | None
    """Largest global gradient norm; null means no clipping."""
    momentum: float = 0.0
    """SGD's momentum."""


@dataclass
class LrScheduleConfig:
    """The learning rate as a function of the step."""

    name: str
    """cosine or constant."""
    warmup_steps: int
    """Steps of linear warmup."""
    min_lr_ratio: float
    """Final learning rate over peak learning rate (cosine)."""


@dataclass
class CheckpointConfig:
    """What is saved, and where a run starts."""

    every: int
    """Steps between checkpoints; 0 means only at the end."""
    keep: int
    """Newest checkpoints that stay."""
    async_save: bool
    """Write in the background: the run waits only while a rank copies its part in memory."""
    resume: str
    """auto: continue from the run's newest complete checkpoint; never; or a checkpoint's path."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides stay for good; null means none."""
    dir: str | None = None
    """The folder of this run's checkpoints; null means `checkpoints` in the run folder."""
    timeout_seconds: float = 3600.0
    """Longest wait for another rank's disk, in writing and in reading; launch.timeout_seconds does not count there."""


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: str
    """offline, online or disabled."""
    project: str
    """Project of the run."""
    name: str | None
    """Name of the run; null means one made from the model and the layout."""
    group: str | None
    """Group of the run."""
    tags: list[str]
    """Tags of the run."""
    continue_run: bool = False
    """A run that starts from another run's checkpoint (checkpoint.resume=PATH) goes on in that one's W&B run; else it gets its own."""
    entity: str | None = None
    """User or team that owns the project; null means the default of whoever is logged in."""
    upload_seconds: float = 20.0
    """Online, how long the end of the run waits for the rest to be uploaded, while the server answers."""


@dataclass
class CheckConfig:
    """What `tptrain check` compares with one process."""

    steps: int
    """Optimizer steps that both take."""
    layouts: str
    """own: the layout of `parallel`; all: every layout that fits."""
    processes: int
    """For layouts=all: the most processes of a layout."""


@dataclass
class DoctorConfig:
    """From where on `tptrain doctor` calls something slow."""

    slow_rank: float = 0.3
    """How far a rank's matrix products may stay below the median of the other ranks', as a share of it; on the CPU
    also how far the time for which it had its cores may stay below its even share of them."""
    slow_link: float = 0.5
    """How far a link's bandwidth may stay below the median of the other links of its kind, as a share of it."""


@dataclass
class Config:
    """Everything one run is made of."""

    seed: int
    model: ModelConfig
    parallel: ParallelConfig
    train: TrainConfig
    data: DataConfig
    optimizer: OptimizerConfig
    lr_schedule: LrScheduleConfig
    checkpoint: CheckpointConfig
    wandb: WandbConfig
    hardware: HardwareConfig
    launch: LaunchConfig
    check: CheckConfig
    doctor: DoctorConfig = field(default_factory=DoctorConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    @property
    def batch_size(self) -> int:
        """Sequences of a step over all ranks, of a resolved config."""
        assert self.train.global_batch_size is not None
        return self.train.global_batch_size

    @property
    def processes(self) -> int:
        """Ranks of the resolved layout."""
        return self.parallel.tp * self.parallel.pp * int(self.parallel.dp)


# ---- resolving -------------------------------------------------------------------------------------------


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


# ---- single values ---------------------------------------------------------------------------------------

CHOICES: dict[str, tuple[Any, ...]] = {
    "model.position": ("learned", "rope"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.activation": ("gelu", "swiglu"),
    "parallel.recompute": ("none", "selective", "full"),
    "train.precision": ("fp32", "bf16"),
    "train.compile": (False,),
    "optimizer.name": ("adamw", "sgd"),
    "lr_schedule.name": ("cosine", "constant"),
    "wandb.mode": ("offline", "online", "disabled"),
    "check.layouts": ("own", "all"),
}
"""What keys of few values may be."""

_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "model.vocab_size": 2, "model.hidden_size": 1, "model.num_layers": 1, "model.num_heads": 1,
    "model.num_kv_heads": 1, "model.ffn_hidden_size": 1, "model.max_seq_len": 1, "model.init_std": 0, "model.dropout": 0,
    "parallel.tp": 1, "parallel.pp": 1, "parallel.micro_batch_size": 1, "parallel.micro_batches": 1,
    "train.max_steps": 0, "train.global_batch_size": 1, "train.log_every": 1, "train.eval_every": 0,
    "train.eval_steps": 0, "train.sample_tokens": 0, "train.loss_chunk_tokens": 1, "train.label_smoothing": 0,
    "train.max_skipped_steps": 0, "train.max_restarts": 0, "data.seq_len": 1,
    "optimizer.lr": 0, "optimizer.weight_decay": 0, "optimizer.momentum": 0,
    "lr_schedule.warmup_steps": 0, "lr_schedule.min_lr_ratio": 0,
    "checkpoint.every": 0, "checkpoint.keep": 1, "checkpoint.keep_every": 1, "wandb.upload_seconds": 0,
    "check.steps": 1, "check.processes": 1,
}  # fmt: skip

_ABOVE_ZERO = (
    "model.norm_eps", "model.rope_theta", "optimizer.eps", "launch.timeout_seconds", "launch.stop_seconds",
    "doctor.slow_rank", "doctor.slow_link", "checkpoint.timeout_seconds",
)  # fmt: skip
_ABOVE_ZERO_OR_NULL = ("optimizer.grad_clip", "train.max_minutes")
_AT_MOST_ONE = ("lr_schedule.min_lr_ratio",)
_BELOW_ONE = ("optimizer.momentum", "model.dropout", "train.label_smoothing", "doctor.slow_rank", "doctor.slow_link")
_INT_OR_AUTO = ("parallel.dp", "parallel.stages_per_rank", "launch.threads_per_rank", "launch.processes_per_node")
STAGES_PER_RANK: dict[str, int | None] = {"gpipe": None, "1f1b": 1, "interleaved": None, "zb_h1": 1, "zb_v": 2}
"""For each schedule that has a name, the stages that a rank must hold; None: any number."""


def check_values(config: Config) -> None:
    """Each key by itself."""
    for key, choices in CHOICES.items():
        value = _get(config, key)
        if value not in choices:
            options = ", ".join(as_text(choice) for choice in choices)
            rule, remedy = ("is not available", f"use {options}") if len(choices) == 1 else ("is unknown", f"use one of {options}")
            raise refuse(key, value, rule, remedy)
    for key, least in _AT_LEAST.items():
        value = _get(config, key)
        if value is not None and not value >= least:
            raise refuse(key, value, f"is below {least}", f"use {least} or more")
    for key in (*_ABOVE_ZERO, *_ABOVE_ZERO_OR_NULL):
        value, or_null = _get(config, key), key in _ABOVE_ZERO_OR_NULL
        if not (or_null and value is None) and not value > 0:
            raise refuse(key, value, "is not above 0", f"use a positive number{', or null' * or_null}")
    if "://" in (config.checkpoint.dir or ""):
        rule = "is a URL, and a checkpoint is made complete by a rename, which only a file system has"
        raise refuse("checkpoint.dir", config.checkpoint.dir, rule, "use a folder, such as one where that storage is mounted")
    for key in _AT_MOST_ONE:
        if _get(config, key) > 1:
            raise refuse(key, _get(config, key), "is above 1", "use a value from 0 to 1")
    for key in _BELOW_ONE:
        if _get(config, key) >= 1:
            raise refuse(key, _get(config, key), "is not below 1", "use a value from 0 up to, not including, 1")
    for key in _INT_OR_AUTO:
        value = _get(config, key)
        if value != "auto" and not (isinstance(value, int) and value >= 1):
            raise refuse(key, value, "is neither auto nor a positive integer", "use auto, 1, 2, ...")
    if not all(step >= 1 for step in config.train.trace_steps):
        raise refuse("train.trace_steps", config.train.trace_steps, "has a step below 1", "use a list of steps such as [5], or []")
    if config.train.spike_factor is not None and not config.train.spike_factor > 1:
        rule = "is not above 1, so that every loss above the mean were a spike"
        raise refuse("train.spike_factor", config.train.spike_factor, rule, "use 2 or more, or null")
    if config.train.skip_spikes and config.train.spike_factor is None:
        raise refuse("train.skip_spikes", True, "has no spikes to skip, as train.spike_factor=null", "use train.spike_factor=2 or more")
    if config.train.tensorboard and find_spec("tensorboard") is None:
        rule = "needs the package tensorboard, which is not installed"
        raise refuse("train.tensorboard", True, rule, "pip install 'tptrain[tensorboard]', or use train.tensorboard=false")
    check_launch(config.launch)
    check_hardware(config.hardware)
    check_plan(config.plan)
    check_data(config.data)
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise refuse("optimizer.betas", betas, "is not two numbers from 0 up to 1", "use [0.9,0.95]")
    for key in ("optimizer.lr", "optimizer.weight_decay"):
        if not math.isfinite(_get(config, key)):
            raise refuse(key, _get(config, key), "is not finite", "use a number")


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


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
