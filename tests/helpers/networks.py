"""Hosts that are not one: network namespaces on a bridge of their own, each with an address and no way elsewhere."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ops_cli.child import Child


@dataclass(frozen=True)
class Network:
    """`name` is the namespace's, `address` its own on the bridge, `gateway` that of the machine around it."""

    name: str
    address: str
    gateway: str


def why_not() -> str | None:
    """Why there can be none here."""
    if shutil.which("ip") is None:
        return "network namespaces want `ip` (iproute2)"
    probe = f"rl{os.getpid()}p"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@contextmanager
def networks(number: int) -> Iterator[list[Network]]:
    """Numbered by this process, so that two runs of the tests do not meet."""
    bridge = f"rl{os.getpid()}"
    subnet = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
    found = [Network(f"{bridge}n{i}", f"{subnet}.{i + 2}", f"{subnet}.1") for i in range(number)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for i, network in enumerate(found):
            _ip("netns", "add", network.name)
            _ip("link", "add", f"{bridge}v{i}", "type", "veth", "peer", "name", "eth0", "netns", network.name)
            _ip("link", "set", f"{bridge}v{i}", "master", bridge, "up")
            _ip("-n", network.name, "addr", "add", f"{network.address}/24", "dev", "eth0")
            _ip("-n", network.name, "link", "set", "eth0", "up")
            _ip("-n", network.name, "link", "set", "lo", "up")
        yield found
    finally:
        for i, network in enumerate(found):
            # Of a namespace that is deleted it goes some time later, and the next of this name would meet it.
            subprocess.run(["ip", "link", "del", f"{bridge}v{i}"], capture_output=True)
            if Path("/run/netns", network.name).exists():
                _ip("netns", "del", network.name)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


class Elsewhere(Child):
    """A child in such a network."""

    def inside(self, network: Network) -> "Elsewhere":
        self._command: Sequence[str] = ["ip", "netns", "exec", network.name, *self._command]
        return self


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
