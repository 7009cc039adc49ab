"""The schema of `tptrain generate`, and the checks of its own values. Values live in `conf/generate.yaml`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tptrain.config import HardwareConfig, LaunchConfig, refuse
from tptrain.launch_config import refuse_several_nodes


@dataclass
class GenerateParallelConfig:
    """The layout, which need not be the one that the run was trained under."""

    tp: int
    """Tensor-parallel size: ranks that share each layer, and each token's keys and values."""
    pp: int
    """Pipeline-parallel size: ranks that share the stack of layers, and the keys and values with it."""


@dataclass
class GenerateCheckpointConfig:
    """Which state of the run."""

    load: str
    """latest, a checkpoint's name such as step-00000400, or the path of one."""


@dataclass
class GenerateConfig:
    """Everything that writing a text is made of. The model and the tokenizer are the run's."""

    run: str
    """A run folder."""
    prompt: Any
    """The text to go on with, or a list of them. Empty: the beginning of a document."""
    echo: bool
    """Whether a text is shown with its prompt."""
    max_new_tokens: int | None
    """Tokens that follow each prompt, unless the document ends before; null: 200, or as many as the model can still see."""
    temperature: float
    """What logits are divided by before a token is drawn; 0: always the most probable token."""
    top_k: int | None
    """Draw from so many most probable tokens only; null: from all."""
    top_p: float | None
    """Draw from the fewest most probable tokens whose probability together reaches this; null: from all."""
    seed: int
    """Of the draws: the same seed, the same text, in any layout."""
    checkpoint: GenerateCheckpointConfig
    parallel: GenerateParallelConfig
    hardware: HardwareConfig
    launch: LaunchConfig

    @property
    def processes(self) -> int:
        """Ranks of the layout."""
        return self.parallel.tp * self.parallel.pp

    @property
    def prompts(self) -> list[str]:
        """One or several, as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)


def refuse_bad_values(config: GenerateConfig) -> None:
    """Check each key by itself. Raises ConfigError. What the groups hold is for `config.resolve`."""
    prompts = config.prompt if isinstance(config.prompt, list) else [config.prompt]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise refuse("prompt", config.prompt, "is no text", "use prompt='a text', or \"prompt=['one','two']\"")
    for key, least in (("max_new_tokens", 1), ("top_k", 1), ("temperature", 0), ("seed", 0)):
        value = getattr(config, key)
        if value is not None and not value >= least:
            raise refuse(key, value, f"is below {least}", f"use {least} or more")
    if not math.isfinite(config.temperature):
        raise refuse("temperature", config.temperature, "is not finite", "use a number, 0 for the most probable tokens")
    refuse_several_nodes(config.launch, "generate")
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise refuse("top_p", config.top_p, "is no share", "use a number above 0 and up to 1, or null")
