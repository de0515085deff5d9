"""Where the ranks of a gang meet: the sockets on which rank 0 may listen, and the interface through which they talk."""

import contextlib
import fcntl
import ipaddress
import logging
import socket
import struct
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from ops_worker.settings import Settings

log = logging.getLogger(__name__)

# All the other ranks may come before rank 0 accepts the first.
BACKLOG = 1024
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
LOOPBACK = "lo"
EVERY_ADDRESS = ("", "0.0.0.0", "::")

_SIOCGIFADDR = 0x8915


@contextlib.contextmanager
def listeners(address: str, count: int) -> Iterator[list[socket.socket]]:
    """So many sockets on free ports. Nobody accepts in this process: the trainers inherit them. Raises OSError."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_listener(address)) for _ in range(count)]


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def interface_environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Which interface gloo and NCCL take, where `environ` does not say.

    By themselves they look the host's name up, and that is 127.0.1.1 on Debian: no other host would reach a rank.
    """
    unset = [name for name in INTERFACE_VARIABLES if name not in environ]
    found = interface(settings) if unset else None
    return dict.fromkeys(unset, found) if found else {}


def interface(settings: Settings) -> str | None:
    """The one with this worker's own IPv4 address; None where none has it, as with IPv6 and behind NAT."""
    if settings.worker_bind not in EVERY_ADDRESS:
        return _interface_with(_ipv4(settings.worker_bind))
    host = urlsplit(settings.worker_url or "").hostname or ""
    address = _ipv4(host)
    if address is None or (address.is_loopback and host not in ("localhost", str(address))):
        # A name that only this host knows as loopback: others reach us at the address from which we call the API.
        address = _towards(urlsplit(settings.api_url).hostname or "")
    return _interface_with(address)


def _listener(address: str) -> socket.socket:
    try:
        return socket.create_server((address, 0), family=family(address), backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {address} for the ranks of a gang: {error}") from error


def _ipv4(host: str) -> ipaddress.IPv4Address | None:
    with contextlib.suppress(OSError, UnicodeError):
        return ipaddress.IPv4Address(socket.gethostbyname(host)) if host else None
    return None


def _towards(host: str) -> ipaddress.IPv4Address | None:
    """The address of ours from which packets to that host go; none is sent."""
    with contextlib.suppress(OSError, UnicodeError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return ipaddress.IPv4Address(probe.getsockname()[0])
    return None


def _interface_with(address: ipaddress.IPv4Address | None) -> str | None:
    if address is None:
        return None
    if address.is_loopback:
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                asked = struct.pack("256s", name.encode()[:15])
                if fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)[20:24] == address.packed:
                    return name
    return None
