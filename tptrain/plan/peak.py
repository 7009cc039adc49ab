"""How many micro-batches a step must have for its memory to be what it is with more.

Until its first backward a schedule runs ahead by a number of forwards that the pipeline's depth bounds; after that it repeats itself. So a
search walks a short step. gpipe is the exception: it keeps all micro-batches.
"""

from __future__ import annotations


def enough_micro_batches(schedule: str, ranks: int, micro_batches: int) -> int:
    """At most `micro_batches`: so many that with more the memory of a schedule that has a name is no larger, but for the batch's tokens.

    interleaved: groups of p, the first ones of p + 1 where p does not divide them; after three of the last kind a rank does again what it
    did. The others: twice the pipeline's depth, with the two legs of zb_v four times.
    """
    if schedule == "gpipe":
        return micro_batches
    if schedule == "interleaved":
        groups, left = divmod(micro_batches, ranks)
        longer = min(left, 4)
        return min(micro_batches, (longer + 3) * ranks + longer) if groups > left else micro_batches
    return min(micro_batches, (4 if schedule == "zb_v" else 2) * ranks + 2)
