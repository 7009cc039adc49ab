"""What the ranks of `tptrain doctor` find out about the machines of a layout before a long run, and what is made of it.

    versions ── before there is a process group: the same packages and the same code everywhere?
    machine ─── device, memory, disk of each rank        clock ── its clock against rank 0's
    matmul ──── how fast it multiplies, all at once      links ── latency and bandwidth of every group
    record ──── these numbers                            needs ── what the run will want of memory and disk
    judge ───── which of them are slow or short          show ─── tables

Only what measures needs torch; the rest is also used by the command that starts the ranks.
"""
