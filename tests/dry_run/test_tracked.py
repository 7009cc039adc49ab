"""Bytes of tensors that are alive, against what was allocated by hand."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tptrain.dry_run.tracked import TrackedBytes


def test_a_storage_counts_once_and_until_its_last_view_is_gone() -> None:
    with TrackedBytes() as tracked:
        whole = torch.zeros(1000)
        part = whole[:5]
        assert tracked.current_bytes == 4000
        copy = part.clone()
        del whole
        assert tracked.current_bytes == 4020, "the view keeps all of it"
        del part
        assert (tracked.current_bytes, tracked.peak_bytes) == (4 * len(copy), 4020)
        tracked.restart()
        assert tracked.peak_bytes == 20


def test_what_autograd_keeps_counts_until_backward() -> None:
    with TrackedBytes() as tracked:
        x = torch.ones(100, requires_grad=True)
        y = x.exp().sin().sum()  # exp keeps its result, which is what sin keeps: its argument
        assert tracked.current_bytes == 4 * (100 + 100 + 1)
        y.backward()
        del y
        assert tracked.current_bytes == 4 * 200, "x and its gradient"


def test_memory_that_a_storage_gives_back_and_takes_again_counts_as_it_is() -> None:
    with TrackedBytes() as tracked:
        tensor, other = torch.zeros(1000), torch.zeros(10)
        tensor.untyped_storage().resize_(0)
        assert tracked.current_bytes == 40
        tracked.restart()
        other = torch.cat((other, other))
        assert tracked.peak_bytes == 40 + 80, "the old one lives until the new one is made"
        tensor.untyped_storage().resize_(4000)
        assert tracked.current_bytes == 4000 + 4 * len(other)


def test_tensors_from_outside_count_once_they_are_named() -> None:
    before = torch.zeros(10)
    with TrackedBytes() as tracked:
        tracked.add([before, "no tensor"])
        assert tracked.current_bytes == 40


def test_fake_tensors_count_as_real_ones() -> None:
    with FakeTensorMode(), TrackedBytes() as tracked:
        tensor = torch.empty(1 << 40, device="cuda")
        assert tracked.current_bytes == tensor.numel() * 4
