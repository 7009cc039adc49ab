"""A rank's stage of a trained model, for what only computes forwards: the verbs `generate` and `eval`."""

from __future__ import annotations

from pathlib import Path

from tptrain.checkpoint.sharded import load_model
from tptrain.config import Config
from tptrain.mesh import Mesh
from tptrain.model.gpt import Execution, GPTStage
from tptrain.pipeline.partition import even_partition
from tptrain.tensor_parallel.parameter import DTYPES, compute_in


def load_stage(trained: Config, checkpoint: Path, mesh: Mesh, execution: Execution | None = None) -> GPTStage:
    """This rank's stage with a checkpoint's weights, in the dtype that the run computes in: there are no updates to keep fp32 for.

    trained: the run's config. All ranks call this; each dp rank gets the whole of its tp x pp share.
    """
    dtype = DTYPES[trained.train.precision]
    first_layer, last_layer = even_partition(trained.model.num_layers, mesh.pp_size)[mesh.pp_rank]
    stage = GPTStage(trained.model, first_layer, last_layer, mesh.tp, mesh.device, execution or Execution()).to(dtype)
    compute_in(stage, dtype)
    load_model(checkpoint, stage, mesh.world)
    return stage.eval()
