"""What `tptrain data` prints: a table of the splits, what the run reads of them, five samples; and the picture that it writes."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from tptrain.config import Config, refuse
from tptrain.data import Data, load_tokenizer, open_data
from tptrain.data.verify import prepare_verified
from tptrain.files import write_atomically
from tptrain.survey.parts import Part, parts_of
from tptrain.survey.samples import sample_text, shown

SAMPLES = 5
SAMPLE_CHARACTERS = 300
PICTURE = "document_lengths.png"


def survey(config: Config, run_dir: Path) -> None:
    """Find or build the stores of a resolved config, verify and count them, and draw the lengths of their documents.

    Raises ConfigError for data that cannot be used, and for a run folder that cannot be written to.
    """
    folder, stores = prepare_verified(config, print)
    data = open_data(config, folder)
    terminal = _terminal()
    parts = parts_of(config.data, stores)
    if parts:
        terminal.print(part_table(parts, data.epochs(_samples(config))))
    for label, text in facts(config, data, parts):
        terminal.print(f"{label:<12}{text}", soft_wrap=True)
    tokenizer = load_tokenizer(config.data, folder)
    for number, row in enumerate(data.train.rows(0, SAMPLES)):
        text = shown(sample_text(row, tokenizer), SAMPLE_CHARACTERS, terminal.encoding)
        terminal.print(f"sample {number:<5}{text}", soft_wrap=True)
    drawn = [part for part in parts if part.has_documents and part.counts.documents]
    if drawn:
        path = run_dir / "plots" / PICTURE
        draw(path, drawn)
        terminal.print(f"{'picture':<12}{path}", soft_wrap=True)


def part_table(parts: list[Part], epochs: dict[str, float]) -> Table:
    """A row a split. epochs: how often the run goes through each source that it trains on."""
    table = Table()
    table.add_column("")
    for heading in ("documents", "tokens", "tokens a document", "median", "longest", "vocabulary used", "epochs"):
        table.add_column(heading, justify="right")
    for part in parts:
        counts, lengths = part.counts, part.counts.lengths
        used = f"{counts.ids_used:,} of {counts.vocab_size:,} ({100 * counts.ids_used / counts.vocab_size:.1f} %)"
        sizes = (f"{lengths.mean:,.1f}", f"{lengths.median:,.1f}", f"{lengths.longest:,}") if part.has_documents else ("", "", "")
        documents = f"{counts.documents:,}" if part.has_documents else ""
        times = "" if part.trained is None else f"{epochs[part.trained]:.3g}"
        table.add_row(part.label, documents, f"{counts.tokens:,}", *sizes, used, times)
    return table


def facts(config: Config, data: Data, parts: list[Part]) -> list[tuple[str, str]]:
    """What holds of the whole run, as (label, value)."""
    steps = f"{config.train.max_steps:,} steps of {config.batch_size:,} sequences of {config.data.seq_len:,} tokens"
    reads = data.reads(_samples(config))
    found = [("reads", f"{steps}: {reads}" if reads else steps)]
    if config.data.streaming:
        found += [("data", data.text), ("", "what is trained on is read while training, and not counted")]
    if parts:
        found.append(("checksums", "of every file are as written"))
    return found


def draw(path: Path, parts: list[Part]) -> None:
    """Write the histogram of the documents' lengths. Raises ConfigError where the folder cannot be written to."""
    from matplotlib import rc_context  # takes longer than all refusals

    from tptrain.monitor.draw_lengths import document_lengths
    from tptrain.monitor.draw_style import STYLE, png

    with rc_context(STYLE):
        lengths = {part.label: (part.counts.lengths.tokens, part.counts.lengths.documents) for part in parts}
        picture = png(document_lengths(lengths))
    try:
        write_atomically(path, picture)
    except OSError as error:
        rule = f"cannot be written to ({error.strerror})"
        raise refuse("hydra.run.dir", path.parents[1], rule, "use hydra.run.dir=FOLDER with one that you can") from error


def _samples(config: Config) -> int:
    """Of the whole run."""
    return config.train.max_steps * config.batch_size


def _terminal() -> Console:
    """One that shows text as it is: no markup, no emoji. A pipe has no width of its own."""
    terminal = Console(highlight=False, markup=False, emoji=False)
    return terminal if terminal.is_terminal else Console(highlight=False, markup=False, emoji=False, width=140)
