"""What one training step sends: calls and bytes of every collective and transfer of a rank, exactly those that the code makes.

    tp          inside the layers, once a micro-batch; the loss; the batch; the gradients of which each tp rank makes a part
    pp          activations to the next stage, their gradients back
    dp          fully_shard's all-gathers and reduce-scatters, once a step; the number of tokens
    embedding   the two copies of a tied embedding
    world       one sum of four numbers

b, s, h: micro-batch, sequence, hidden size. Each layer of a block sums or gathers [b, s, h]; the tables of Narayanan et al. 2021
(arXiv:2104.04473, section 3.2) and Korthikanti et al. 2022 (arXiv:2205.05198, section 4.2.2) are the same counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tptrain.config import Config
from tptrain.pipeline.actions import Kind, peer_stage, placement, receive_before, sends_after
from tptrain.plan.pipeline import PipelinePlan
from tptrain.plan.shards import block_shards, ends_shards

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
"""Of what layers compute in, by `train.precision`."""
_FP32_BYTES, _FP64_BYTES, _TOKEN_BYTES = 4, 8, 8


@dataclass(frozen=True)
class Traffic:
    """Calls of one kind that a rank makes."""

    group: str
    """tp, dp, pp_up (to higher pipeline ranks), pp_down, embedding or world."""
    operation: str
    """all_reduce, all_gather, reduce_scatter, broadcast, send or receive."""
    purpose: str
    calls: int
    bytes: int
    """Over all calls, of the larger of the operation's input and output on this rank."""
    under: str = ""
    """What the code computes while it travels: "input gradient" or "weight gradient" of the same layer, "forward" or "backward" of the
    layers around, "other micro-batches"; "" nothing, so that its time adds to the step's."""

    def times(self, count: int) -> Traffic:
        """The same so many times."""
        return replace(self, calls=self.calls * count, bytes=self.bytes * count)


def step_traffic(config: Config, pipeline: PipelinePlan, pp_rank: int, dp_rank: int = 0, tp_rank: int = 0) -> list[Traffic]:
    """Everything that one rank calls in one training step.

    config: resolved. The sums of `merged` are those that a hook on the process groups counts.
    """
    traffic = once_traffic(config, pipeline, pp_rank, dp_rank, tp_rank)
    for number, stage in enumerate(pipeline.stages):
        if stage.rank == pp_rank:
            actions = action_traffic(config, stage.first_layer, stage.last_layer)
            counts = Counter(action.kind for action in pipeline.schedule[pp_rank] if action.stage == number)
            inputs, weights = (counts[kind] + counts[Kind.BACKWARD] for kind in (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT))
            for kind, count in ((Kind.FORWARD, counts[Kind.FORWARD]), (Kind.INPUT_GRADIENT, inputs), (Kind.WEIGHT_GRADIENT, weights)):
                traffic += [each.times(count) for each in actions[kind]]
            traffic += fully_shard_traffic(config, stage.first_layer, stage.last_layer, tp_rank)
    return traffic + pipeline_traffic(config, pipeline, pp_rank)


def once_traffic(config: Config, pipeline: PipelinePlan, pp_rank: int, dp_rank: int = 0, tp_rank: int = 0) -> list[Traffic]:
    """Of `step_traffic` what comes once a step and is not fully_shard's: the batch, the number of tokens, and the sums after the last
    backward. Of the pipeline only its stages are read."""
    return _batch(config, pipeline, pp_rank) + _sums(config, pipeline, pp_rank, dp_rank, tp_rank)


def action_traffic(config: Config, first_layer: int, last_layer: int) -> dict[Kind, list[Traffic]]:
    """The tp traffic of one micro-batch on the stage with layers first_layer to last_layer (exclusive), by action.

    A backward makes the traffic of both INPUT_GRADIENT and WEIGHT_GRADIENT. The latter is none: also where weight gradients are put off,
    the layers' inputs are gathered with the input gradients. Collectives `under` the weight gradient run under nothing then.
    """
    traffic: dict[Kind, list[Traffic]] = {Kind.FORWARD: [], Kind.INPUT_GRADIENT: [], Kind.WEIGHT_GRADIENT: []}
    if config.parallel.tp == 1:
        return traffic
    layers, is_first, is_last = last_layer - first_layer, first_layer == 0, last_layer == config.model.num_layers
    forward, backward = (_sequence_traffic if config.parallel.sequence_parallel else _whole_traffic)(config, layers, is_first, is_last)
    if is_last:
        tokens = config.parallel.micro_batch_size * config.data.seq_len
        sums = 2 + bool(config.train.label_smoothing)
        forward.append(Traffic("tp", "all_reduce", "loss: maximum", 1, tokens * _FP32_BYTES))
        forward.append(Traffic("tp", "all_reduce", "loss: sums", 1, sums * tokens * _FP32_BYTES))
    traffic[Kind.FORWARD] = [each for each in forward if each.calls]
    traffic[Kind.INPUT_GRADIENT] = [each for each in backward if each.calls]
    return traffic


def _whole_traffic(config: Config, layers: int, is_first: bool, is_last: bool) -> tuple[list[Traffic], list[Traffic]]:
    """Forward and backward without sequence parallelism: all-reduces of [b, s, h]."""

    def sums(purpose: str, calls: int, under: str = "") -> Traffic:
        return Traffic("tp", "all_reduce", purpose, calls, calls * _activation_bytes(config), under)

    again = layers * _sums_again(config)
    head_under = "weight gradient" if config.train.loss_chunk_tokens is None else ""
    forward = [sums("embedding", int(is_first)), sums("row layers", 2 * layers)]
    backward = [
        sums("row layers, made again", again),
        sums("column layers", 2 * layers, "weight gradient"),
        sums("head", int(is_last), head_under),
    ]
    return forward, backward


def _sequence_traffic(config: Config, layers: int, is_first: bool, is_last: bool) -> tuple[list[Traffic], list[Traffic]]:
    """Forward and backward with sequence parallelism: all-gathers to [b, s, h] and reduce-scatters from it."""

    def gathers(purpose: str, calls: int, under: str = "") -> Traffic:
        return Traffic("tp", "all_gather", purpose, calls, calls * _activation_bytes(config), under)

    def scatters(purpose: str, calls: int, under: str = "") -> Traffic:
        return Traffic("tp", "reduce_scatter", purpose, calls, calls * _activation_bytes(config), under)

    whole = is_last and config.train.loss_chunk_tokens is None  # else the head's input is kept gathered
    made_again = layers * (config.parallel.recompute == "full")
    forward = [
        scatters("embedding", int(is_first)), gathers("column layers", 2 * layers), scatters("row layers", 2 * layers),
        gathers("head", int(is_last)),
    ]  # fmt: skip
    backward = [
        gathers("column layers, made again", 2 * made_again), scatters("row layers, made again", layers * _sums_again(config)),
        gathers("column layers' inputs again", 2 * layers, "input gradient"), scatters("column layers", 2 * layers, "weight gradient"),
        gathers("row layers", 2 * layers), gathers("head's input again", int(whole), "input gradient"),
        scatters("head", int(is_last), "weight gradient" if whole else ""), gathers("embedding", int(is_first)),
    ]  # fmt: skip
    return forward, backward


def _sums_again(config: Config) -> int:
    """Sums of row layers that recomputation makes again in a block: it ends with the last tensor that backward needs, which lies
    before the second sum, or with dropout behind it."""
    return (1 + (config.model.dropout > 0)) * (config.parallel.recompute == "full")


def _activation_bytes(config: Config) -> int:
    """Of [b, s, h]."""
    elements = config.parallel.micro_batch_size * config.data.seq_len * config.model.hidden_size
    return elements * DTYPE_BYTES[config.train.precision]


def message_bytes(config: Config) -> int:
    """Of what one stage sends another: [b, s, h], or with sequence parallelism [b, s/tp, h]."""
    return _activation_bytes(config) // (config.parallel.tp if config.parallel.sequence_parallel else 1)


def pipeline_traffic(config: Config, pipeline: PipelinePlan, pp_rank: int) -> list[Traffic]:
    """What a rank sends and receives between stages in a step."""
    computations = pipeline.schedule[pp_rank]
    ranks = placement(pipeline.schedule)
    transfers = [send for action in computations for send in sends_after(action, ranks)]
    transfers += [receive for action in computations if (receive := receive_before(action, ranks)) is not None]
    counted: Counter[tuple[str, str, str]] = Counter()
    for transfer in transfers:
        peer, sends = ranks[peer_stage(transfer)], transfer.kind in (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT)
        goes_up = (peer > pp_rank) == sends
        purpose = "activations" if transfer.kind in (Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION) else "gradients"
        counted["pp_up" if goes_up else "pp_down", "send" if sends else "receive", purpose] += 1
    size = message_bytes(config)
    return [Traffic(*key, calls, calls * size, "other micro-batches") for key, calls in counted.items()]


def fully_shard_traffic(config: Config, first_layer: int, last_layer: int, tp_rank: int = 0) -> list[Traffic]:
    """fully_shard's on one stage, once a step: weights in the dtype to compute in, gradients in fp32.

    Each block and the rest of the stage are one message each; parts of a parameter that dp does not divide are padded. Gathers run under
    the first micro-batch's forward, reduce-scatters under the last backward. Where the schedule puts weight gradients off they follow
    the last one of the stage.
    """
    dp, layers = int(config.parallel.dp), last_layer - first_layer
    if dp == 1:
        return []
    block = sum(shard.padded_elements(dp) for shard in block_shards(config, tp_rank))
    ends = ends_shards(config, first_layer == 0, last_layer == config.model.num_layers, tp_rank)
    rest = sum(shard.padded_elements(dp) for shard in ends)
    weight_bytes, after = DTYPE_BYTES[config.train.precision], config.parallel.schedule.startswith("zb_")
    traffic = []
    for name, calls, elements in (("blocks", layers, layers * block), ("embedding, final norm, head", bool(ends), rest)):
        if calls:
            traffic.append(Traffic("dp", "all_gather", f"weights: {name}", int(calls), elements * weight_bytes, "forward"))
            traffic.append(
                Traffic("dp", "reduce_scatter", f"gradients: {name}", int(calls), elements * _FP32_BYTES, "" if after else "backward")
            )
    return traffic


def _batch(config: Config, pipeline: PipelinePlan, pp_rank: int) -> list[Traffic]:
    """The rows of the batch from the first tp rank to the others, int64 with one token more than the sequence; and the number of tokens."""
    parallel, traffic = config.parallel, []
    ends = (pipeline.stages[0].rank, pipeline.stages[-1].rank)
    rows = config.batch_size // int(parallel.dp)
    if parallel.tp > 1 and (pp_rank in ends or config.data.document_mask):
        traffic.append(Traffic("tp", "broadcast", "batch", 1, rows * (config.data.seq_len + 1) * _TOKEN_BYTES))
    if int(parallel.dp) > 1 and pp_rank == ends[1]:
        traffic.append(Traffic("dp", "all_reduce", "number of tokens", 1, _FP64_BYTES))
    return traffic


def _sums(config: Config, pipeline: PipelinePlan, pp_rank: int, dp_rank: int, tp_rank: int) -> list[Traffic]:
    """What follows the last backward."""
    parallel, dp, traffic = config.parallel, int(config.parallel.dp), []
    mine = [stage for stage in pipeline.stages if stage.rank == pp_rank]
    has_first, has_last = (pipeline.stages[end].rank == pp_rank for end in (0, -1))
    shards = [shard for stage in mine for shard in block_shards(config, tp_rank) * (stage.last_layer - stage.first_layer)]
    for stage in mine:
        shards += ends_shards(config, stage.first_layer == 0, stage.last_layer == config.model.num_layers, tp_rank)
    parts = [shard.elements(dp, dp_rank) for shard in shards if shard.partial]
    if parts and parallel.tp > 1:
        traffic.append(Traffic("tp", "all_reduce", "partial gradients", 1, sum(parts) * _FP32_BYTES))
    if config.model.tie_embeddings and len(pipeline.stages) > 1 and has_first != has_last:
        table = ends_shards(config, True, False, tp_rank)[0]
        traffic.append(Traffic("embedding", "all_reduce", "tied embedding's gradient", 1, table.elements(dp, dp_rank) * _FP32_BYTES))
    if config.processes > 1:
        traffic.append(Traffic("world", "all_reduce", "norm, loss, tokens, stops", 1, 4 * _FP64_BYTES))
    return traffic


Totals = dict[tuple[str, str], tuple[int, int]]
"""Calls and bytes by group and operation."""


def merged(traffic: Iterable[Traffic]) -> Totals:
    """All of it by group and operation."""
    calls: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for each in traffic:
        calls[each.group, each.operation] += each.calls
        sizes[each.group, each.operation] += each.bytes
    return {key: (calls[key], sizes[key]) for key in sorted(calls)}


def by_exchange(config: Config, traffic: Iterable[Traffic]) -> list[Traffic]:
    """The traffic as a CPU's ranks call it, where each gathers and reduce-scatters over tp by a message to every other rank
    (`tensor_parallel/communication.py`): the same bytes, less those of the rank's own part."""
    others, result = config.parallel.tp - 1, []
    for each in traffic:
        if each.group == "tp" and each.operation in ("all_gather", "reduce_scatter"):
            size = each.bytes // config.parallel.tp * others
            result += [replace(each, operation=operation, calls=each.calls * others, bytes=size) for operation in ("send", "receive")]
        else:
            result.append(each)
    return result
