"""Sends and receives between neighbours: who, what, how long a sent tensor is kept, and what a silent neighbour leads to."""

from __future__ import annotations

import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.tensor_parallel.support import mesh_of, random
from tptrain.pipeline.actions import Action, Kind
from tptrain.pipeline.transfer import Transfer, TransferError


class FakeWork:
    """A send that is under way until it is waited for, as gloo's are."""

    def __init__(self) -> None:
        self.waited = 0

    def is_completed(self) -> bool:
        return self.waited > 0

    def wait(self) -> None:
        self.waited += 1


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FakeWork, int, Any]]:
    """What was given to `isend`: its request, the peer and the group."""
    calls: list[tuple[FakeWork, int, Any]] = []

    def isend(tensor: torch.Tensor, peer: int, group: Any) -> FakeWork:
        calls.append((FakeWork(), peer, group))
        return calls[-1][0]

    monkeypatch.setattr(dist, "isend", isend)
    return calls


STAGES = 3
FAKE_MESH: Any = SimpleNamespace(
    device=torch.device("cpu"), pp_ranks=(1, 5, 9), pp_rank=1, pp_size=STAGES, pp_up="up", pp_down="down"
)  # fmt: skip


def test_a_sent_tensor_lives_until_its_send_has_completed(sent: list[tuple[FakeWork, int, Any]]) -> None:
    transfer = Transfer(FAKE_MESH, (2,), torch.float32)
    alive = []
    for m in range(10):
        tensor = torch.ones(2)
        alive.append(weakref.ref(tensor.untyped_storage()))
        transfer.send(Action(Kind.SEND_ACTIVATION, 1, m), 2, tensor, STAGES)
        del tensor
        living = [reference() is not None for reference in alive]
        under_way = [work.waited == 0 for work, _, _ in sent]
        assert living == under_way, "freed before its send has completed, or kept for longer"
        assert sum(living) == min(m + 1, STAGES), "sends wait where the pipeline is not full, or pile up where it is"
    transfer.flush()
    assert not any(reference() is not None for reference in alive)
    assert [work.waited for work, _, _ in sent] == [1] * 10, "flush waits for what has not left yet"


def test_a_strided_tensor_s_packed_copy_lives_too(sent: list[tuple[FakeWork, int, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = Transfer(FAKE_MESH, (2, 3), torch.float32)
    given: list[Any] = []
    fake = dist.isend

    def isend(tensor: torch.Tensor, peer: int, group: Any) -> Any:
        assert tensor.is_contiguous()
        given.append(weakref.ref(tensor.untyped_storage()))
        return fake(tensor, peer, group)

    monkeypatch.setattr(dist, "isend", isend)
    transfer.send(Action(Kind.SEND_ACTIVATION, 1, 0), 2, torch.ones(3, 2).t(), STAGES)
    assert given[0]() is not None


def test_directions(sent: list[tuple[FakeWork, int, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations go up on one group, gradients down on the other."""
    transfer = Transfer(FAKE_MESH, (2,), torch.float32)
    received = []

    def irecv(tensor: torch.Tensor, peer: int, group: Any) -> FakeWork:
        received.append((peer, group))
        return FakeWork()

    monkeypatch.setattr(dist, "irecv", irecv)
    transfer.send(Action(Kind.SEND_ACTIVATION, 1, 0), 2, torch.ones(2), 9)
    transfer.send(Action(Kind.SEND_GRADIENT, 1, 0), 0, torch.ones(2), 9)
    transfer.send(Action(Kind.SEND_ACTIVATION, 4, 0), 0, torch.ones(2), 9)  # of another stage here
    transfer.receive(Action(Kind.RECEIVE_ACTIVATION, 1, 0), 0)
    transfer.receive(Action(Kind.RECEIVE_GRADIENT, 1, 0), 2)
    transfer.receive(Action(Kind.RECEIVE_ACTIVATION, 4, 0), 2)
    assert [(peer, group) for _, peer, group in sent] == [(9, "up"), (1, "down"), (1, "down")]
    assert received == [(1, "up"), (9, "down"), (9, "down")]


def test_a_send_that_was_answered_is_let_go(sent: list[tuple[FakeWork, int, Any]]) -> None:
    transfer = Transfer(FAKE_MESH, (2,), torch.float32)
    tensors = [torch.ones(2) for _ in range(3)]
    alive = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    for m in range(3):
        transfer.send(Action(Kind.SEND_ACTIVATION, 1, m), 2, tensors.pop(0), 9)
    transfer.finish(Action(Kind.SEND_ACTIVATION, 1, 1))
    transfer.finish(Action(Kind.SEND_GRADIENT, 1, 0))  # never sent: nothing to wait for
    assert [reference() is not None for reference in alive] == [True, False, True]
    assert [work.waited for work, _, _ in sent] == [0, 1, 0]


def test_a_buffer_given_back_is_received_into_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "irecv", lambda tensor, peer, group: FakeWork())
    transfer = Transfer(FAKE_MESH, (2,), torch.float32)
    first, second = (transfer.receive(Action(Kind.RECEIVE_ACTIVATION, 1, m), 0).wait() for m in (0, 1))
    assert first.data_ptr() != second.data_ptr()
    first.requires_grad_()
    transfer.reuse(first)
    third = transfer.receive(Action(Kind.RECEIVE_ACTIVATION, 1, 2), 0).wait()
    assert third.data_ptr() == first.data_ptr()
    assert not third.requires_grad
    assert transfer.receive(Action(Kind.RECEIVE_ACTIVATION, 1, 3), 0).wait().data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_tensors_arrive() -> None:
    run_ranks(2, send_and_receive)


def send_and_receive(rank: int) -> None:
    """Many large ones, received late, the sender reusing its memory at once; then strided ones; both directions at a time."""
    mesh = mesh_of(pp=2)
    for dtype in (torch.float32, torch.bfloat16):
        transfer = Transfer(mesh, (64, 4096), dtype)
        if rank == 0:
            for m in range(8):
                transfer.send(Action(Kind.SEND_ACTIVATION, 0, m), 1, torch.full((64, 4096), m + 1.0).to(dtype), 2)
                torch.full((64, 4096), -1.0).to(dtype)  # takes the memory, were it free
            transfer.send(Action(Kind.SEND_ACTIVATION, 0, 8), 1, random(4096, 64, seed=1).to(dtype).t(), 2)
            gradient = transfer.receive(Action(Kind.RECEIVE_GRADIENT, 0, 0), 1)
            transfer.flush()
            assert torch.equal(gradient.wait(), random(64, 4096, seed=2).to(dtype))
        else:
            transfer.send(Action(Kind.SEND_GRADIENT, 1, 0), 0, random(64, 4096, seed=2).to(dtype), 2)
            time.sleep(0.2)
            receives = [transfer.receive(Action(Kind.RECEIVE_ACTIVATION, 1, m), 0) for m in range(9)]
            for m in range(8):
                assert (receives[m].wait() == m + 1).all(), f"micro-batch {m} was overwritten before it had left"
            assert torch.equal(receives[8].wait(), random(4096, 64, seed=1).to(dtype).t())
            transfer.flush()


def test_a_silent_neighbour_is_named() -> None:
    """Within the group's time limit, with what was waited for."""
    messages = run_ranks(4, wait_in_vain, timeout=60)
    assert messages[3].startswith("rank 3 gave up waiting for the activation of stage 1, micro-batch 5, from rank 1:")
    assert messages[0].startswith("rank 0 gave up waiting for the gradient of stage 0, micro-batch 2, from rank 2:")


def test_a_neighbour_that_is_gone_is_named() -> None:
    """At once, not after the group's time limit."""
    messages = run_ranks(2, lose_a_neighbour, timeout=50)
    assert messages[1].startswith("rank 1 gave up waiting for the activation of stage 1, micro-batch 0, from rank 0:")


def lose_a_neighbour(rank: int) -> str:
    mesh = mesh_of(timeout_seconds=100, pp=2)
    if rank == 0:
        time.sleep(0.5)
        dist.destroy_process_group()
        return ""
    with pytest.raises(TransferError) as caught:
        Transfer(mesh, (2,), torch.float32).receive(Action(Kind.RECEIVE_ACTIVATION, 1, 0), 0).wait()
    return str(caught.value)


def wait_in_vain(rank: int) -> str:
    """Two pipelines, 0-2 and 1-3. In the first, the second stage is silent; in the second, the first is."""
    mesh = mesh_of(timeout_seconds=3, pp=2, dp=2)
    transfer = Transfer(mesh, (2,), torch.float32)
    waiting = {3: Action(Kind.RECEIVE_ACTIVATION, 1, 5), 0: Action(Kind.RECEIVE_GRADIENT, 0, 2)}
    message = ""
    started = time.monotonic()
    if rank in waiting:
        with pytest.raises(TransferError) as caught:
            transfer.receive(waiting[rank], 1 - mesh.pp_rank).wait()
        message = str(caught.value)
        assert time.monotonic() - started < 20, "the group's limit of 3 seconds is not kept"
    dist.barrier(group=mesh.world)
    return message
