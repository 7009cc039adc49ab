"""Jobs over two hosts with addresses of their own (`tests/hosts`): tp inside a host, the pipeline across. What they compute, and how they
end and go on when a rank, a command or the link dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests import hosts as network_namespaces
from tests.command import command, environment, wait_until
from tests.hosts import Hosts
from tests.support import SMALL
from tptrain.monitor.metrics import read_metrics

LIMIT_SECONDS = 8
"""launch.timeout_seconds: longer than any step or start here takes."""
PATIENCE = 240
"""For what takes seconds."""
STEPS = 80
ROOT = str(Path(__file__).parents[1])
LINE = [*SMALL, "launch.threads_per_rank=1", "lr_schedule=constant", "checkpoint.every=3", "train.eval_every=0", "train.sample_tokens=0"]
ENDLESS = ["parallel=tp2_pp2", "train.max_steps=1000000", f"launch.timeout_seconds={LIMIT_SECONDS}"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    lacking = network_namespaces.missing()
    if lacking:
        pytest.skip(f"two hosts cannot be made here: {lacking}")
    with Hosts() as made:
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Loss by step of one process."""
    folder = tmp_path_factory.mktemp("alone")
    outcome = command(folder, *LINE, f"train.max_steps={STEPS}", "checkpoint.every=0", "hydra.run.dir=run")
    assert outcome.code == 0, outcome.err
    return losses(folder / "run")


def losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(run_dir) if "loss" in record}


class Job:
    """One command a host, in a folder of its own, with one run folder for all."""

    def __init__(
        self, hosts: Hosts, folder: Path, line: Callable[[int, str], list[str]], hidden: str | None = None, **variables: str
    ) -> None:
        """line: Python's arguments for a host, by number and letter. hidden: what host b does not see of `folder`."""
        self.hosts, self.folder, self.run_dir = hosts, folder, folder / "run"
        self.commands: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("a", "b", "run"):
            (folder / name).mkdir()
        for number, host in enumerate(hosts.letters):
            here = hosts.on(host, folder / hidden if hidden and host == "b" else None)
            keys = [
                "parallel=tp2_pp2",
                "train.max_steps=1000000",
                f"hydra.run.dir={self.run_dir}",
                f"launch.timeout_seconds={LIMIT_SECONDS}",
            ]
            words = [*here, sys.executable, *line(number, host), *LINE, *keys]
            with (folder / f"{host}.txt").open("wb") as said:
                self.commands[host] = subprocess.Popen(
                    words, cwd=folder / host, env=environment(PYTHONPATH=ROOT, **variables), stdout=said, stderr=subprocess.STDOUT
                )

    @property
    def step(self) -> int:
        """The last step whose loss is written."""
        return max(losses(self.run_dir), default=0) if (self.run_dir / "metrics.jsonl").exists() else 0

    def reach(self, step: int) -> None:
        """Wait until the job is that far."""
        wait_until(lambda: self.step >= step or self.ended(), seconds=PATIENCE)
        assert self.step >= step, "\n".join(self.said(host) for host in self.commands)

    def ended(self) -> bool:
        """Whether all commands have."""
        return all(one.poll() is not None for one in self.commands.values())

    def said(self, host: str) -> str:
        """What a host's command has said."""
        return (self.folder / f"{host}.txt").read_text()

    def ranks(self, host: str) -> Sequence[int]:
        """Process ids of a host's ranks, in their order."""
        return [one for one in self.hosts.processes(host) if one != self.commands[host].pid and self._is_rank(one)]

    def cut_until_the_ranks_are_gone(self, host: str) -> float:
        """Cut a host off, and heal the link once no rank is left on either side; how many seconds that took."""
        self.hosts.cut(host)
        began = time.monotonic()
        before = {one for letter in self.commands for one in self.ranks(letter)}
        assert len(before) == 4
        wait_until(lambda: not before & {one for letter in self.commands for one in self.ranks(letter)}, seconds=PATIENCE)
        took = time.monotonic() - began
        self.hosts.heal(host)
        return took

    def finish(self) -> dict[str, int]:
        """Wait for the end of all commands; their exit codes. Nothing of the job is left."""
        wait_until(self.ended, seconds=PATIENCE)
        wait_until(lambda: not [one for host in self.commands for one in self.hosts.processes(host)], seconds=20)
        return {host: one.returncode for host, one in self.commands.items()}

    def _is_rank(self, process: int) -> bool:
        try:
            line = Path(f"/proc/{process}/cmdline").read_bytes().decode()
        except OSError:
            return False
        return "tptrain" in line and "torch.distributed.run" not in line


def names_a_peer(said: str) -> bool:
    """Whether somebody has said for which rank he waited in vain: of the other host, in a pair's exchange or a sum over all."""
    pairs = re.findall(r"rank (\d) gave up waiting for .* from rank (\d)", said)
    sums = re.findall(r"rank (\d) failed:.*?ranks? ([\d, ]+) did not answer in time", said, re.DOTALL)
    return any((int(waiting) < 2) != (int(other[0]) < 2) for waiting, other in [*pairs, *sums])


def agents(hosts: Hosts, *options: str) -> Callable[[int, str], list[str]]:
    """The command line of each node's torchrun."""

    def line(number: int, host: str) -> list[str]:
        meeting = [f"--rdzv-endpoint={hosts.address('a')}:29555", f"--rdzv-conf=is_host={int(number == 0)}"]
        size = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", f"--local-addr={hosts.address(host)}"]
        return ["-m", "torch.distributed.run", *size, *options, *meeting, "-m", "tptrain"]

    return line


def test_torchrun_cut_off_for_good(hosts: Hosts, tmp_path: Path) -> None:
    """Ranks and agents end on both sides, though the far agent's connection to the first one's store stays open."""
    job = Job(hosts, tmp_path, agents(hosts))
    job.reach(5)
    hosts.cut("b")
    began = time.monotonic()
    codes = job.finish()
    took = time.monotonic() - began
    hosts.heal("b")
    assert took < LIMIT_SECONDS + 60, "of which the ranks have the limit and 15 s, and the agent 15 s"
    assert codes["a"] == 1
    assert codes["b"] in (1, -signal.SIGTERM, -signal.SIGKILL)
    assert codes["b"] == 1 or "torchrun has had no ranks on this node" in job.said("b")
    assert all(names_a_peer(job.said(host)) for host in hosts.letters)


@pytest.mark.parametrize("killed", ["ranks", "agent"])
def test_torchrun_loses_part_of_a_host(killed: str, hosts: Hosts, tmp_path: Path) -> None:
    """Its agent goes with its ranks, and its ranks with their agent; the other host's end too, and nothing trains on."""
    job = Job(hosts, tmp_path, agents(hosts))
    job.reach(5)
    for process in job.ranks("b") if killed == "ranks" else [job.commands["b"].pid]:
        os.kill(process, signal.SIGKILL)
    began = time.monotonic()
    codes = job.finish()
    assert time.monotonic() - began < LIMIT_SECONDS + 60
    assert codes == {"a": 1, "b": 1 if killed == "ranks" else -signal.SIGKILL}
    assert "lost another rank" in job.said("a") or names_a_peer(job.said("a"))


def test_torchrun_over_two_hosts(hosts: Hosts, alone: dict[int, float], tmp_path: Path) -> None:
    """The link is cut in mid-step, and healed; later the whole second host is lost."""

    job = Job(hosts, tmp_path, agents(hosts, "--max-restarts=1"), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    job.reach(5)
    took = job.cut_until_the_ranks_are_gone("b")
    assert took < LIMIT_SECONDS + 15  # 1 to 2 s beyond the limit, and 5 more where no pair's exchange was cut
    at = job.step
    assert all(names_a_peer(job.said(host)) for host in hosts.letters)
    job.reach(at + 3)
    found = losses(job.run_dir)
    for process in hosts.processes("b"):
        os.kill(process, signal.SIGKILL)
    assert job.finish() == {"a": 1, "b": -signal.SIGKILL}
    assert "rank 0 lost another rank (no word from ranks 2, 3)" in job.said("a")
    assert found == pytest.approx({step: alone[step] for step in found}, rel=1e-4)


def commands(number: int, host: str) -> list[str]:
    """The command line of a node."""
    return ["-m", "tptrain", "launch.nodes=2", f"launch.node_rank={number}", "launch.master=hosta"]


def test_commands_on_two_hosts(hosts: Hosts, alone: dict[int, float], tmp_path: Path) -> None:
    """Each command starts its host's ranks and has token stores of its own. A rank dies, the link is cut, and at last a command dies."""

    def line(number: int, host: str) -> list[str]:
        return [*commands(number, host), "train.max_restarts=2"]

    job = Job(hosts, tmp_path, line, hidden="a")
    job.reach(4)
    os.kill(job.ranks("b")[-1], signal.SIGKILL)
    wait_until(lambda: "restart 1 of 2" in job.said("a"), seconds=PATIENCE)
    for host in hosts.letters:
        wait_until(lambda host=host: "rank 3 was killed by SIGKILL" in job.said(host), seconds=PATIENCE)
    job.reach(job.step + 3)
    took = job.cut_until_the_ranks_are_gone("b")
    assert took < LIMIT_SECONDS + 15
    at = job.step
    job.reach(at + 3)
    for host in hosts.letters:
        assert names_a_peer(job.said(host))
        assert "restart 2 of 2, from step-" in job.said(host)
    found = losses(job.run_dir)
    job.commands["b"].kill()
    assert job.finish() == {"a": 1, "b": -signal.SIGKILL}
    assert job.said("a").endswith(f"tptrain: node 1 has given no sign of life for {LIMIT_SECONDS} s\n")
    assert json.loads((job.run_dir / "status.json").read_text())["state"] == "failed"
    assert found == pytest.approx({step: alone[step] for step in found}, rel=1e-4)
    assert all(list((tmp_path / host).glob("outputs/token_stores/memorize-*")) for host in hosts.letters)
