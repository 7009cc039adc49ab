"""What the ranks of `tptrain generate` do: the model from a checkpoint, the tokens, and on rank 0 the text as it comes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tptrain.config import Config
from tptrain.data.text_stream import TextStream
from tptrain.data.tokenizers import Tokenizer, load_tokenizer
from tptrain.generate_config import GenerateConfig
from tptrain.job import Job
from tptrain.mesh import build_mesh, own_device
from tptrain.pipeline_decoder import PipelineDecoder
from tptrain.sampling import Chooser, Sampling, continuations
from tptrain.trained_stage import load_stage

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)
"""What a terminal shows for control characters: a model may write any, and they would move the cursor."""


def generate(config: GenerateConfig) -> dict[str, float]:
    """Write what follows the prompts to stdout. Every rank calls this, with the process group up.

    config: with checkpoint.load a path, and max_new_tokens a number. Returns the tokens generated and the seconds it took.
    """
    device = own_device(config.hardware.device)
    trained: Config = Job.load("train", Path(config.run), Path(config.run)).config
    layout = replace(trained.parallel, tp=config.parallel.tp, pp=config.parallel.pp, dp=1)
    mesh = build_mesh(layout, device, config.launch.timeout_seconds)
    tokenizer = load_tokenizer(trained.data, Path(config.run))
    assert tokenizer is not None, "the launcher has seen to it"
    assert config.max_new_tokens is not None
    stage = load_stage(trained, Path(config.checkpoint.load), mesh)

    prompts = [encode(tokenizer, prompt) for prompt in config.prompts]
    decoder = PipelineDecoder(stage, mesh, len(prompts), max(map(len, prompts)) + config.max_new_tokens)
    chooser = Chooser(Sampling(config.temperature, config.top_k, config.top_p, config.seed), range(len(prompts)))
    output = Output(config.prompts, tokenizer, config.echo) if mesh.world.rank() == 0 else None
    began, count = time.perf_counter(), 0
    is_open = output.is_open if output else lambda: True
    for tokens in continuations(decoder, prompts, config.max_new_tokens, chooser, tokenizer.end_of_document, is_open):
        if output:
            count += output.add(tokens)
    if output:
        output.finish()
    return {"tokens": count, "seconds": time.perf_counter() - began}


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's ids; those of an empty one say that a document ended and the next begins. Raises UnicodeEncodeError."""
    return tokenizer.encode(prompt).tolist() or [tokenizer.end_of_document]


class Output:
    """Writes texts to stdout, one after another. The first that is not complete is shown as it comes.

    Of several, each has a line above it that names it, on stderr.
    """

    def __init__(self, prompts: Sequence[str], tokenizer: Tokenizer, echo: bool) -> None:
        self._end = tokenizer.end_of_document
        self._streams = [TextStream(tokenizer, encode(tokenizer, prompt)) for prompt in prompts]
        self._unshown = [prompt if echo else "" for prompt in prompts]
        self._ended = [False] * len(prompts)
        self._current = 0
        self._labelled = 0
        self._open = True
        self._show()

    def is_open(self) -> bool:
        """Whether anybody still reads."""
        return self._open

    def add(self, tokens: Sequence[int]) -> int:
        """One more token of each row. Returns how many of them belong to a text that has not ended."""
        going = [row for row, ended in enumerate(self._ended) if not ended]
        for row in going:
            if tokens[row] == self._end:
                self._close(row)
            else:
                self._unshown[row] += self._streams[row].push(tokens[row])
        self._show()
        return len(going)

    def finish(self) -> None:
        """Show what is left."""
        for row, ended in enumerate(self._ended):
            if not ended:
                self._close(row)
        self._show()

    def _close(self, row: int) -> None:
        self._unshown[row] += self._streams[row].flush() + "\n"
        self._ended[row] = True

    def _show(self) -> None:
        """Write all that is next."""
        while self._current < len(self._streams):
            if len(self._streams) > 1 and self._labelled == self._current:
                self._labelled += 1
                sys.stderr.write(f"tptrain: text {self._labelled} of {len(self._streams)}\n")
                sys.stderr.flush()
            self._write(self._unshown[self._current])
            self._unshown[self._current] = ""
            if not self._ended[self._current]:
                return
            self._current += 1

    def _write(self, text: str) -> None:
        """Write to stdout at once. Where nobody reads any more (`| head`), it is closed for good."""
        if not text or not self._open:
            return
        if sys.stdout.isatty():
            text = text.translate(_PICTURES)
        try:
            sys.stdout.buffer.write(text.encode())
            sys.stdout.flush()
        except BrokenPipeError:
            self._open = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter fails to flush at its end
