"""Several nodes in one process: what the config refuses, what the nodes tell each other in a store in memory, and whom they give up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from tests.support import small_config
from tptrain import cli, environment, launch, network, nodes
from tptrain import council as council_module
from tptrain.config import Config, ConfigError, resolve
from tptrain.council import Council, LostNode, Patience
from tptrain.crew import Crew
from tptrain.data import prepare
from tptrain.failures import Outcome
from tptrain.job import Job, Place
from tptrain.launch_config import LaunchConfig
from tptrain.stop import Stopped
from tptrain.store_line import Silent, StoreLine, Unreachable, within

SECONDS = 60
"""A patience that no test needs."""


# ---- the config ------------------------------------------------------------------------------------------


def over_nodes(count: int, changes: dict[str, Any] | None = None, **launch_changes: Any) -> Config:
    """A small config, not yet resolved, of the last node."""
    config = small_config()
    config.parallel.dp, config.train.global_batch_size = "auto", None
    config.launch = LaunchConfig(1, 60, nodes=count, node_rank=count - 1, master="node-0", **launch_changes)
    for key, value in (changes or {}).items():
        setattr(config.parallel, key, value)
    return config


@pytest.mark.parametrize(
    ("count", "changes", "each", "devices", "dp"),
    [
        (2, {"tp": 2}, "auto", 4, 4),  # 8 GPUs
        (2, {"tp": 2, "pp": 2}, "auto", None, 1),
        (2, {"tp": 2}, "auto", None, 2),  # on CPU the fewest that give each node a tp group
        (4, {"tp": 2, "pp": 2}, "auto", None, 2),
        (3, {"pp": 2}, "auto", None, 3),
        (2, {"tp": 2}, 4, None, 4),
        (1, {"tp": 2}, 4, None, 2),
        (2, {"tp": 2}, 2, 8, 2),
    ],
)
def test_dp_auto_counts_the_processes_of_all_nodes(count: int, changes: dict, each: int | str, devices: int | None, dp: int) -> None:
    config = resolve(over_nodes(count, changes, processes_per_node=each), None, devices)
    assert config.parallel.dp == dp
    assert config.processes % count == 0
    assert config.processes // count % config.parallel.tp == 0


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (over_nodes(2, {"tp": 4, "pp": 3, "dp": 1}), None,
         "parallel.tp=4 does not divide the 6 processes of a node, so that a tp group would straddle two nodes: "
         "use a tp that divides 6, or more copies by parallel.dp"),
        (over_nodes(3, {"tp": 2, "pp": 2, "dp": 1}), None,
         "launch.nodes=3 does not divide the tp 2 x pp 2 x dp 1 = 4 processes: use a layout of 3 or 6 processes"),
        (over_nodes(2, {"dp": 3}, processes_per_node=4), None,
         "parallel.dp=3 gives tp 1 x pp 1 x dp 3 = 3 processes, but launch.nodes=2 x launch.processes_per_node=4 = 8: use parallel.dp=8"),
        (over_nodes(2, {"dp": 9}), 4,
         "parallel.dp=9 gives tp 1 x pp 1 x dp 9 = 9 processes, but this machine has 4 GPUs, 2 such nodes 8: use parallel.dp=8"),
        (over_nodes(2, processes_per_node=8), 4,
         "launch.processes_per_node=8 is more than the 4 GPUs of this machine: use 4 or less, or hardware.device=cpu"),
        (over_nodes(2, processes_per_node="all"), None,
         "launch.processes_per_node=all is neither auto nor a positive integer: use auto, 1, 2, ..."),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit_the_nodes(config: Config, devices: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve(config, None, devices)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "launch.nodes=0 is below 1: use 1 or more"),
        ({"nodes": 1, "node_rank": 1}, "launch.node_rank=1 is one of several nodes, but launch.nodes=1: use launch.nodes=2"),
        ({"node_rank": None}, "launch.node_rank=null is needed with launch.nodes=2: use 0 on the first node, up to 1 on the last"),
        ({"node_rank": 2}, "launch.node_rank=2 is none of launch.nodes=2: use 0 on the first node, up to 1 on the last"),
        ({"master": None}, "launch.master=null is needed with launch.nodes=2: use HOST or HOST:PORT of node 0"),
        ({"master": "node:port"}, "launch.master=node:port is neither HOST nor HOST:PORT with a port from 1 to 65535: use HOST:29500"),
        ({"master": "node:70000"}, "launch.master=node:70000 is neither HOST nor HOST:PORT with a port from 1 to 65535: use HOST:29500"),
    ],
)
def test_nodes_that_are_none(changes: dict[str, Any], message: str) -> None:
    config = over_nodes(2)
    config.launch = replace(config.launch, **changes)
    with pytest.raises(ConfigError) as refusal:
        resolve(config)
    assert str(refusal.value) == message


def test_torchrun_over_nodes() -> None:
    """Ranks that a launcher has started, as each of them sees it."""
    config = over_nodes(1, {"tp": 2})
    assert launch.settle(config, Place(rank=5, world_size=8, local_rank=1, local_world_size=4)).parallel.dp == 4
    config.parallel.tp = 4
    with pytest.raises(ConfigError, match=r"tp=4 does not divide the 2 processes of a node, so that a tp group would straddle two nodes"):
        launch.settle(config, Place(rank=5, world_size=8, local_rank=1, local_world_size=2))
    with pytest.raises(ConfigError, match=r"launch.nodes=2 starts ranks on several nodes, but a launcher has already started 8"):
        launch.settle(over_nodes(2), Place(rank=5, world_size=8, local_rank=1, local_world_size=4))


def test_places_that_a_launcher_gives_on_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    place = environment.given_place()
    assert place is not None
    assert (place.node, place.nodes, list(place.neighbours)) == (1, 2, [3, 4, 5])
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "5"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="RANK=5 WORLD_SIZE=8 LOCAL_RANK=2 LOCAL_WORLD_SIZE=5 are of nodes with unequal numbers of ranks"):
        environment.given_place()


def test_restarts_of_torchrun_that_would_be_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Place(0, 2, 0, 2), Place(0, 4, 0, 2)
    environment.check_restarts(two, names_folder=False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    environment.check_restarts(one, names_folder=True)
    with pytest.raises(ConfigError, match=r"--max-restarts=3 would begin anew in another run folder each time: use hydra\.run\.dir=FOLDER"):
        environment.check_restarts(one, names_folder=False)
    with pytest.raises(ConfigError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node"):
        environment.check_restarts(two, names_folder=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    environment.check_restarts(two, names_folder=True)


def test_a_later_node_makes_no_run_folder_and_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.sys, "argv", ["tptrain"])
    monkeypatch.setattr(launch, "start", lambda config, run_dir, place: folders.append(run_dir))
    folders: list[Path] = []
    line = ["experiment=memorize", "launch.nodes=2", "launch.master=node-0"]
    cli._run([*line, "launch.node_rank=0", "hydra.run.dir=run"])
    assert (tmp_path / "run" / ".hydra").is_dir()
    cli._run([*line, "launch.node_rank=1", "hydra.run.dir=run2"])
    assert [folder.name for folder in folders] == ["run", tmp_path.name]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert cli._run(["-m", *line, "launch.node_rank=0", "seed=1,2"]) == 2


def test_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"lo": "127.0.0.1", "eth0": "10.0.0.7"}
    monkeypatch.setattr(network, "interface_of", {address: name for name, address in known.items()}.get)
    towards = {
        "node-0": "10.0.0.7",
        "localhost": "127.0.0.1",
        "127.0.0.1": "127.0.0.1",
        "myself": "127.0.0.1",
        network._ELSEWHERE: "10.0.0.7",
    }
    monkeypatch.setattr(network, "own_address", towards.__getitem__)
    found = {host: network.interface_to(host) for host in ("node-0", "localhost", "127.0.0.1", "myself")}
    assert found == {"node-0": "eth0", "localhost": "lo", "127.0.0.1": "lo", "myself": "eth0"}


# ---- a store that may not answer -------------------------------------------------------------------------


def test_an_operation_that_takes_too_long_is_left_behind() -> None:
    began = time.monotonic()
    with pytest.raises(Silent):
        within(0.1, lambda: time.sleep(30))
    assert time.monotonic() - began < 20
    with pytest.raises(Unreachable, match="the store is gone: reset"):
        within(SECONDS, lambda: (_ for _ in ()).throw(RuntimeError("reset\nframe 0")))


def test_a_line_connects_anew_after_a_failure() -> None:
    made: list[HashStore] = []

    def connect() -> HashStore:
        made.append(HashStore())
        return made[-1]

    line = StoreLine(connect, SECONDS)
    line.do(lambda store: store.set("a", "1"))
    assert line.do(lambda store: store.check(["a"])), "on the same connection"
    with pytest.raises(Unreachable):
        line.do(lambda store: 1 / 0)
    assert not line.do(lambda store: store.check(["a"]))
    assert len(made) == 2


# ---- the council -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hearts that beat faster, and farewells that are short."""
    monkeypatch.setattr(council_module, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(council_module, "_FAREWELL_SECONDS", 0.5)


def meet(count: int, attend: Callable[[Council], Any], store: HashStore | None = None, patience: float = SECONDS) -> list[Any]:
    """What `attend` gives or raises on each node, all at once."""
    store = store or HashStore()
    ends: list[Any] = [None] * count

    def run(node: int) -> None:
        try:
            with Council(lambda: store, node, count, patience) as council:
                ends[node] = attend(council)
        except BaseException as error:
            ends[node] = error

    threads = [threading.Thread(target=run, args=(node,)) for node in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return ends


def test_all_nodes_wait_for_each_other_and_get_what_node_0_says() -> None:
    done: list[int] = []

    def attend(council: Council) -> Any:
        def part() -> int:
            time.sleep(0.2 * council.node)
            done.append(council.node)
            return 10 + council.node

        got = council.together("part", part)
        assert sorted(done) == [0, 1, 2]
        return got, council.together("next")

    assert meet(3, attend) == [(10, None)] * 3


@pytest.mark.parametrize(
    ("error", "kind", "elsewhere"),
    [
        (ConfigError("a=1 is bad: use 2"), ConfigError, "node 1: a=1 is bad: use 2"),
        (Stopped("stopped by SIGTERM"), Stopped, "node 1 was stopped by SIGTERM"),
        (OSError("the disk\nis full"), LostNode, "node 1 has failed: the disk is full"),
    ],
)
def test_all_nodes_end_as_the_first_that_does(error: BaseException, kind: type, elsewhere: str) -> None:
    def attend(council: Council) -> None:
        def part() -> None:
            if council.node == 1:
                raise error

        council.together("part", part)

    ends = meet(3, attend)
    assert ends[1] is error
    assert [type(ends[node]) for node in (0, 2)] == [kind] * 2
    assert [str(ends[node]) for node in (0, 2)] == [elsewhere] * 2


def test_a_node_that_gives_no_sign_of_life_is_given_up() -> None:
    def attend(council: Council) -> Any:
        if council.node == 1:
            council._over.set()  # its heart stands still
            gone.wait(SECONDS)
            return None
        began = time.monotonic()
        with pytest.raises(LostNode, match="node 1 has given no sign of life for 1 s"):
            council.hear(1, "anything")
        gone.set()
        return time.monotonic() - began

    gone = threading.Event()
    waited, _ = meet(2, attend, patience=1)
    assert waited >= 1


def test_a_node_is_waited_for_as_long_as_it_lives() -> None:
    def attend(council: Council) -> Any:
        if council.node == 1:
            time.sleep(4)
            council.say("at last", True)
        return council.node == 1 or council.hear(1, "at last")

    assert meet(2, attend, patience=3) == [True, True]


def test_silence_may_count_from_the_last_sign_of_life() -> None:
    def attend(council: Council) -> Any:
        if council.node == 1:
            council.say("here", True)
            council._over.set()
            gone.wait(SECONDS)
            return None
        council.hear(1, "here")
        time.sleep(1)
        began = time.monotonic()
        with pytest.raises(LostNode):
            council.hear(1, "anything", Patience(0.9, since_last_sign=True))
        gone.set()
        return time.monotonic() - began

    gone = threading.Event()
    waited, _ = meet(2, attend)
    assert waited < 0.9


# ---- one preparation -------------------------------------------------------------------------------------


def preparing(tmp_path: Path, change: Callable[[Config, int], None] = lambda config, node: None, shared: bool = False) -> list[Any]:
    """What two nodes get of `prepare_together`, each with a store_dir of its own unless they share one."""

    def attend(council: Council) -> Any:
        config = small_config()
        config.data.store_dir = str(tmp_path / ("stores" if shared else f"stores-{council.node}"))
        config.data.vocab_size = 64
        config.launch.node_rank = council.node
        change(config, council.node)

        def first() -> Job:
            (tmp_path / "run" / "logs").mkdir(parents=True)
            return Job("train", config, tmp_path / "run", prepare(config, lambda line: None))

        return nodes.prepare_together(council, config, first)

    return meet(2, attend)


def test_nodes_that_share_stores_tokenise_once(tmp_path: Path) -> None:
    (run_dir, store), again = preparing(tmp_path, shared=True)
    assert again == (run_dir, store) == (tmp_path / "run", store)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"], "the sign is gone"


def test_a_node_that_does_not_see_the_store_makes_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nodes.digest

    def digest(folder: Path, source: str) -> str:
        if threading.current_thread().name == "1" and "stores-0" in str(folder):
            raise nodes.StoreError("not here")
        return real(folder, source)

    def change(config: Config, node: int) -> None:
        threading.current_thread().name = str(node)

    monkeypatch.setattr(nodes, "digest", digest)
    (_, first), (_, second) = preparing(tmp_path, change)
    assert (first.parent.name, second.parent.name) == ("stores-0", "stores-1")
    assert first.name == second.name
    assert real(first, "memorize") == real(second, "memorize")


def test_a_node_with_other_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "digest", lambda folder, source: threading.current_thread().name)

    def change(config: Config, node: int) -> None:
        threading.current_thread().name = str(node)

    first, second = preparing(tmp_path, change)
    assert str(second).startswith("data.source=memorize has other text here than on node 0: use the same text on every node")
    assert str(first) == f"node 1: {second}"


def test_a_node_with_another_config_is_refused(tmp_path: Path) -> None:
    def change(config: Config, node: int) -> None:
        config.optimizer.lr = 0.5 * (node + 1)
        config.wandb.name = str(node)

    first, second = preparing(tmp_path, change)
    assert str(second) == "optimizer.lr=1.0 differs from node 0's 0.5: start every node with the same"
    assert str(first) == f"node 1: {second}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["hydra.run.dir", "checkpoint.dir"])
def test_a_folder_that_is_not_shared_is_refused(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node 0's sign lies elsewhere."""
    (tmp_path / "home").mkdir()
    hidden = {"hydra.run.dir": "run", "checkpoint.dir": "home"}[key]
    real = nodes._leave_sign
    monkeypatch.setattr(nodes, "_leave_sign", lambda folder: f"{folder}/sign" if folder.name == hidden else real(folder))
    monkeypatch.setattr(nodes, "_SHARED_SECONDS", 0.2)

    def change(config: Config, node: int) -> None:
        config.checkpoint.dir = str(tmp_path / "home")

    first, second = preparing(tmp_path, change)
    assert str(second).startswith(f"{key}={tmp_path / hidden} is another folder here than on node 0, but every rank writes its part")
    assert str(first) == f"node 1: {second}"


# ---- how an attempt ends ---------------------------------------------------------------------------------


def concluding(outcomes: list[Outcome | None], again: bool = False) -> list[Any]:
    """What `Crew.conclude` gives each node for the outcomes of their ranks; None: a node that has died."""
    gone = threading.Event()
    config = replace(small_config(), launch=LaunchConfig(1, 2, nodes=len(outcomes), node_rank=0, master="node-0"))

    def judge(outcome: Outcome) -> dict[str, Any]:
        return {"exits": sorted(outcome.exits), "asked": outcome.asked}

    def attend(council: Council) -> Any:
        crew, outcome = Crew(config, council, "node-0", 1, None), outcomes[council.node]
        meeting = crew.begin()
        assert (meeting.first_rank, meeting.attempt) == (council.node * config.processes // len(outcomes), 0)
        if outcome is None:
            council._over.set()
            gone.wait(SECONDS)
            return None
        end = crew.conclude(outcome, judge, again)
        gone.set()
        return end, crew.without and crew.without.node, crew.reports

    return meet(len(outcomes), attend)


def test_an_attempt_is_judged_by_what_all_nodes_saw() -> None:
    ends = concluding([Outcome({0: (1, 3.0)}), Outcome({3: (-9, 2.0)}, asked="SIGTERM"), Outcome()])
    verdict = {"exits": [0, 3], "asked": "SIGTERM"}
    assert ends == [(verdict, None, True), (verdict, None, False), (verdict, None, False)]
    json.dumps(verdict)


def test_a_dead_node_is_left_out_of_the_judgement() -> None:
    first, _ = concluding([Outcome({0: (1, 3.0)}), None])
    assert first == ({"exits": [0], "asked": None}, 1, True)


def test_without_node_0_a_node_judges_for_itself() -> None:
    _, second = concluding([None, Outcome({2: (1, 3.0)})])
    assert second == ({"exits": [2], "asked": None}, 0, True)


def test_what_a_node_said_before_it_left_is_heard() -> None:
    """Also where it says its last and leaves between the questions for the one and for the other."""

    class Busy:
        """A store in which node 0 does both as soon as one of its keys has been asked for."""

        def __init__(self) -> None:
            self.values: dict[str, str] = {}

        def check(self, keys: list[str]) -> bool:
            there = all(key in self.values for key in keys)
            self.values = {"says/ready/0": '"all"', "left/0": '{"node": 0, "kind": "failed", "text": "has ended"}'}
            return there

        def get(self, key: str) -> bytes:
            return self.values[key].encode()

        def add(self, key: str, amount: int) -> int:
            return amount

    council = Council(lambda: Busy(), node=1, nodes=2, patience_seconds=10)  # type: ignore[arg-type,return-value]
    assert council.hear(0, "ready") == "all"
