"""Machines for a test: network namespaces with addresses, a name and an /etc/hosts of their own, joined by veth through a switch.

    hosta 10.77.0.11 ── eth0 ~~ switch (a namespace with a bridge) ~~ eth0 ── hostb 10.77.0.12

All share the file system, the processes and the clock of this machine, and nothing of it is changed: names carry this process's id.
What a command is not to see of the file system is hidden from it alone.
As Debian sets it up, a host knows its own name as 127.0.1.1, and there is no name server. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path


def missing() -> str:
    """What this machine lacks for it, or nothing."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "needs iproute2 and util-linux"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    probe = f"tp{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", probe], check=True)
    return made.stderr.strip()


class Hosts:
    """Two or more of them, by letters; a context manager."""

    def __init__(self, letters: str = "ab") -> None:
        self.letters = letters
        self._prefix = f"tp{os.getpid()}"
        self._switch = f"{self._prefix}switch"

    def __enter__(self) -> Hosts:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for letter in self.letters:
            self._make(letter)
        return self

    def __exit__(self, *_: object) -> None:
        for letter in self.letters:
            for process in self.processes(letter):
                os.kill(process, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self._space(letter)], check=False)
            shutil.rmtree(f"/etc/netns/{self._space(letter)}", ignore_errors=True)
        subprocess.run(["ip", "netns", "del", self._switch], check=False)

    def address(self, letter: str) -> str:
        """A host's own address."""
        return f"10.77.0.{11 + self.letters.index(letter)}"

    def on(self, letter: str, hidden: Path | None = None) -> list[str]:
        """What to put before a command line to run it on a host. The process that this starts becomes the command.

        hidden: a folder in whose place the command sees an empty one.
        """
        hide = f"mount -t tmpfs none '{hidden}'; " if hidden else ""  # ip gives the command a table of mounts of its own
        return [
            "ip",
            "netns",
            "exec",
            self._space(letter),
            "unshare",
            "--uts",
            "sh",
            "-ec",
            f'{hide}hostname host{letter}; exec "$@"',
            "sh",
        ]

    def processes(self, letter: str) -> Sequence[int]:
        """Ids of what runs on a host."""
        found = subprocess.run(["ip", "netns", "pids", self._space(letter)], capture_output=True, text=True)
        return [int(word) for word in found.stdout.split()]

    def cut(self, letter: str) -> None:
        """Swallow all that a host sends or is sent: its interface stays up, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"to{letter}", "nomaster")

    def heal(self, letter: str) -> None:
        """End the cut."""
        _ip("-n", self._switch, "link", "set", f"to{letter}", "master", "br0")

    def _space(self, letter: str) -> str:
        return f"{self._prefix}host{letter}"

    def _make(self, letter: str) -> None:
        space = self._space(letter)
        folder = Path("/etc/netns") / space
        folder.mkdir(parents=True)
        others = "".join(f"{self.address(other)} host{other}\n" for other in self.letters if other != letter)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 host{letter}\n{others}")
        (folder / "resolv.conf").write_text("")
        _ip("netns", "add", space)
        _ip("-n", self._switch, "link", "add", f"to{letter}", "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", self._switch, "link", "set", f"to{letter}", "master", "br0", "up")
        _ip("-n", space, "addr", "add", f"{self.address(letter)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")
        _ip("-n", space, "route", "add", "default", "dev", "eth0")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
