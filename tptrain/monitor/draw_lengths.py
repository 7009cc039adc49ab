"""How long documents are: the share of each split's documents by their tokens, over a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from tptrain.monitor.draw_style import BLUE, GREEN, ORANGE, VERMILLION

_BINS_A_DOUBLING = 4
_LINES = list(product(("-", "--", ":"), (BLUE, VERMILLION, GREEN, ORANGE)))
_ROWS_OF_LEGEND = 12


def document_lengths(lengths: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """An outline a split. lengths: by its name the lengths that occur, int64 [k] above 0, and the documents of each, int64 [k]."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    every = np.concatenate([tokens for tokens, _ in lengths.values()])
    edges = bin_edges(int(every.min()), int(every.max()))
    for number, (label, (tokens, documents)) in enumerate(lengths.items()):
        shares = np.histogram(tokens, edges, weights=documents)[0] / documents.sum()
        line, colour = _LINES[number % len(_LINES)]
        axes.stairs(100 * shares, edges, color=colour, linestyle=line, linewidth=1.8, label=f"{label}, {int(documents.sum()):,} documents")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens a document, with its end token")
    axes.set_ylabel("% of the documents")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.legend(ncols=-(-len(lengths) // _ROWS_OF_LEGEND))
    return figure


def bin_edges(shortest: int, longest: int) -> np.ndarray:
    """Where bins begin and at last end: half way between whole numbers, `_BINS_A_DOUBLING` a doubling where there are so many.

    >>> bin_edges(1, 9).tolist()
    [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 9.5, 10.5]
    """
    first = math.floor(_BINS_A_DOUBLING * math.log2(shortest))
    last = math.ceil(_BINS_A_DOUBLING * math.log2(longest + 1))
    return np.unique(np.round(2.0 ** (np.arange(first, last + 1) / _BINS_A_DOUBLING))) - 0.5
