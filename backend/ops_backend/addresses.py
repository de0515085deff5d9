"""Which addresses this service connects to on the word of others."""

import asyncio
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import httpx

LOOK_UP_S = 3.0
LOOK_UPS = 4
Address = IPv4Address | IPv6Address
Allowed = str | IPv4Network | IPv6Network

# Beside the link-local addresses: where clouds tell their machines credentials.
METADATA = frozenset(ip_address(address) for address in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192"))


class Refused(Exception):
    """Nothing is sent to that address; the message says what to do."""


class Names:
    """Looks names up, on threads of its own: those that nobody answers for must not take those of the workers."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOK_UPS, "names")

    async def addresses(self, name: str) -> list[str]:
        """All that it has. Raises Refused when one of them is never connected to, OSError when there is none."""
        look_up = partial(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            _look_at(address)
        return addresses


def allowed(text: str) -> list[Allowed]:
    """Names, addresses and networks, with commas. Raises ValueError for a network with bits of a host."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [ip_network(part) if _is_network(part) else part.lower() for part in parts]


async def worker_url(names: Names, url: str, peer: str, allow: Sequence[Allowed]) -> str:
    """Where the worker is called that registered from `peer`: at its own address, or at one that is allowed.

    A name is looked up here and never again, so that it cannot come to mean another address; that of an https URL
    stays: there the certificate is what says who answers. Raises Refused.
    """
    parsed = _plain(url)
    try:
        async with asyncio.timeout(LOOK_UP_S):
            found = [_of(address) for address in await names.addresses(parsed.raw_host.decode())]
    except (OSError, UnicodeError, TimeoutError) as error:
        raise Refused(f"{parsed.host!r} has no address here: {error or 'no answer'}") from error
    for address in found:
        if not (_is_allowed(parsed.host, address, allow) or _same_host(address, peer)):
            raise Refused(
                f"it is at {address}, and this came from {peer}: a worker is called where it calls from; let the API's "
                "OPS_WORKER_ALLOW name that address, its network or its name if this is right"
            )
    return str(parsed if parsed.scheme == "https" else parsed.copy_with(host=str(found[0]))).rstrip("/")


def _plain(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise Refused(str(error)) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise Refused("it begins with http:// or https://, and a host")
    if parsed.userinfo or parsed.query or parsed.fragment or "@" in url:
        raise Refused("it has no user, no query and no fragment")
    return parsed


def _look_at(address: str) -> None:
    ip = _of(address)
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip in METADATA:
        raise Refused(
            f"it is at {address}: nothing is sent to addresses that are link-local, multicast, unspecified or a "
            "cloud's for its metadata"
        )


def _of(address: str) -> Address:
    ip = ip_address(address)
    return ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip


def _is_network(text: str) -> bool:
    head = text.partition("/")[0]
    try:
        ip_address(head)
    except ValueError:
        return False
    return True


def _is_allowed(host: str, address: Address, allow: Sequence[Allowed]) -> bool:
    return any(host.lower() == each if isinstance(each, str) else address in each for each in allow)


def _same_host(address: Address, peer: str) -> bool:
    try:
        there = _of(peer)
    except ValueError:  # a socket that is no network's
        return False
    return address == there or (_is_ours(address) and _is_ours(there))


def _is_ours(address: Address) -> bool:
    """Whether this host has it: only such a one can be bound."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True
