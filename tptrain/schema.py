"""The schema of a run's config: which keys there are and what type each has. Values live in `conf/`.

Groups with checks of their own have files of their own (`data_config.py`, `hardware_config.py`, `launch_config.py`, `plan_config.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tptrain.data_config import DataConfig
from tptrain.hardware_config import HardwareConfig
from tptrain.launch_config import LaunchConfig
from tptrain.plan_config import PlanConfig


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
