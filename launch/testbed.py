"""Emulated nodes on one machine: network namespaces joined by links of a set bandwidth.

A node is a namespace with a port `gw0` and an `lo` of its own. Ranks of one node meet at the
node's address and so talk over `lo`; ranks of two nodes talk over `gw0`. Token buckets (`tc tbf`)
give both their bandwidth, so traffic within nodes and between them passes through different
queues, as over NVLink and a network card. Two nodes stand back to back; more meet at a bridge.

Making namespaces takes root and the tools `ip` and `tc`. Names carry the process id; what a killed
process left behind is removed by the next one.
"""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from gatewise.launch.signals import StopSignals
from gatewise.parallel.errors import ConfigError

__all__ = ["PORT", "UNSHAPED", "Links", "Testbed", "enter_node", "missing_for_namespaces"]

PORT = "gw0"  # name of every node's port
_BURST = "72kb"  # passes at once after a pause; a packet of 64 kB must fit
_QUEUE = "16mb"
_MTU = 9000  # large packets: fewer of them, less work for the processor
_NAMES = re.compile(r"^gw(\d+)x\w+$")
_CLONE_NEWNET = 0x40000000
_SYSTEM = {"tcp_congestion_control": "reno", "tcp_slow_start_after_idle": "0"}


@dataclass(frozen=True, slots=True)
class Links:
    """Bandwidths in Mbit/s of one node's port and of what connects its ranks; None: as it is."""

    inter_mbit: float | None
    intra_mbit: float | None

    @property
    def shaped(self) -> bool:
        """Whether any bandwidth is set."""
        return self.inter_mbit is not None or self.intra_mbit is not None

    def __str__(self) -> str:
        if not self.shaped:
            return "unshaped"
        parts = (self.inter_mbit, self.intra_mbit)
        return "/".join("unshaped" if mbit is None else f"{mbit:g}" for mbit in parts)


UNSHAPED = Links(None, None)


def missing_for_namespaces() -> str:
    """Return what this process lacks to make nodes, or nothing."""
    if not hasattr(os, "geteuid"):
        return "Linux"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"the tools {' and '.join(missing)} (package iproute2)"
    if os.geteuid() != 0:
        return "root"
    return ""


def enter_node(name: str) -> None:
    """Move the calling thread, and threads that it starts, into a node.

    Raises:
        OSError: if there is no such node, or without the right to enter it.
    """
    library = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}", "rb") as stream:
        if library.setns(stream.fileno(), _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter node {name}: {os.strerror(number)}")


class Testbed:
    """Nodes as a context: made at its start, removed at its end, however that comes.

    Args:
        nodes: number of nodes, at least 2.
        links: bandwidths.
    """

    __test__ = False  # not a test, whatever pytest thinks of the name

    def __init__(self, nodes: int, links: Links) -> None:
        self.links = links
        self.names = tuple(f"gw{os.getpid()}x{number}" for number in range(nodes))
        self._switch = f"gw{os.getpid()}xs"

    def __enter__(self) -> "Testbed":
        _remove_left_over()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _make(self) -> None:
        for name in self.names:
            _run("ip", "netns", "add", name)
        if len(self.names) == 2:
            here, there = self.names
            _join(here, PORT, there, PORT)
        else:
            _run("ip", "netns", "add", self._switch)
            _run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "bridge", "mtu", str(_MTU), "up")
        for number, name in enumerate(self.names):
            if len(self.names) > 2:
                self._connect(name, f"p{number}")
            _run("ip", "-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", PORT)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", PORT, "up")
            for key, value in _SYSTEM.items():
                setting = f"echo {value} > /proc/sys/net/ipv4/{key}"
                _run("ip", "netns", "exec", name, "sh", "-c", setting)
            _shape(name, PORT, self.links.inter_mbit)
            _shape(name, "lo", self.links.intra_mbit)

    def _connect(self, name: str, port: str) -> None:
        """Join a node to the bridge; what it receives is shaped there."""
        _join(name, PORT, self._switch, port)
        _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
        _shape(self._switch, port, self.links.inter_mbit)

    def _remove(self) -> None:
        with StopSignals(lambda _number: None):  # a second Ctrl-C must not leave nodes behind
            there = _namespaces()
            _remove(name for name in (*self.names, self._switch) if name in there)


def _join(here: str, port: str, there: str, other: str) -> None:
    ends = ("type", "veth", "peer", "name", other, "mtu", str(_MTU), "netns", there)
    _run("ip", "link", "add", "name", port, "mtu", str(_MTU), "netns", here, *ends)


def _shape(name: str, port: str, mbit: float | None) -> None:
    if mbit is None:
        return
    bucket = ("tbf", "rate", f"{mbit:g}mbit", "burst", _BURST, "limit", _QUEUE)
    _run("tc", "-n", name, "qdisc", "add", "dev", port, "root", *bucket)


def _remove_left_over() -> None:
    """Remove nodes of processes that are no more."""
    _remove(
        name
        for name in _namespaces()
        if (match := _NAMES.match(name)) and not Path(f"/proc/{match[1]}").exists()
    )


def _remove(names: Iterable[str]) -> None:
    """Remove nodes, also those behind one that cannot be removed; then tell of that one."""
    failures: list[ConfigError] = []
    for name in names:
        try:
            _run("ip", "netns", "del", name)
        except ConfigError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _namespaces() -> Sequence[str]:
    """Return the names of all namespaces."""
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(
            f"testbed is namespaces, but `{' '.join(command)}` failed ({said}); run as root with "
            "the right to make network namespaces, or use testbed=loopback"
        )
