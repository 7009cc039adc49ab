"""How far a rank's wall clock is from rank 0's.

Rank 0 answers a rank's message with the time on its own clock. The rank takes the middle between sending and hearing for the moment of
the answer, which is wrong by half of the time between at most. Of several exchanges the shortest counts (Cristian 1989).
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

_EXCHANGES = 10


def clock_offset(world: dist.ProcessGroup) -> tuple[float, float]:
    """This rank's clock minus rank 0's, and the error of that, in seconds. Every rank calls this; one after the other asks rank 0."""
    message, own = torch.zeros(1, dtype=torch.float64), dist.get_rank()
    shortest, offset = 0.0, 0.0
    for rank in range(1, world.size()):
        for exchange in range(_EXCHANGES):
            if own == 0:
                dist.recv(message, rank, group=world)
                message[0] = time.time()
                dist.send(message, rank, group=world)
            elif own == rank:
                sent = time.time()
                dist.send(message, 0, group=world)
                dist.recv(message, 0, group=world)
                heard = time.time()
                if exchange == 0 or heard - sent < shortest:
                    shortest, offset = heard - sent, (sent + heard) / 2 - float(message)
    return offset, shortest / 2
