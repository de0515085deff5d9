"""Which addresses this service connects to on the word of others."""

import asyncio
import re
import socket
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import httpx
from starlette.requests import Request

LOOK_UP_S = 3.0
LOOK_UPS = 4
Address = IPv4Address | IPv6Address
Allowed = str | IPv4Network | IPv6Network

# Beside the link-local addresses: where clouds tell their machines credentials.
METADATA = frozenset(ip_address(address) for address in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192"))
# Whose last 32 bits are an address of IPv4: what such a gateway, or an old kernel, makes of it.
CARRIERS = (ip_network("64:ff9b::/96"), ip_network("::/96"))
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@cache
def authorities() -> ssl.SSLContext:
    """Whose certificates this process believes: those of SSL_CERT_FILE, or httpx's own. To read them takes 40 ms."""
    return httpx.create_ssl_context()


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


def address_of(request: Request) -> str:
    """Where it came from; of a proxy's on the loopback, where that says. Empty: from a socket that is no network's."""
    return request.client.host if request.client else ""


def allowed(text: str) -> list[Allowed]:
    """Names, addresses and networks, with commas. Raises ValueError for what is none of them."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [part.lower() if _is_name(part) else ip_network(part) for part in parts]


async def worker_url(names: Names, url: str, peer: str, allow: Sequence[Allowed]) -> str:
    """Where the worker is called that registered from `peer`: at its own address, or at one that is allowed.

    A name is looked up here and never again, so that it cannot come to mean another address; of several, as replicas
    share one, it is the worker's own. That of an https URL stays: the certificate says who answers. Raises Refused.
    """
    parsed = _plain(url)
    try:
        async with asyncio.timeout(LOOK_UP_S):
            found = [_of(address) for address in await names.addresses(parsed.raw_host.decode())]
    except (OSError, UnicodeError, TimeoutError) as error:
        raise Refused(f"{parsed.host!r} has no address here: {error or 'no answer'}") from error
    its_own = [each for each in found if _is_allowed(parsed.host, each, allow) or _same_host(each, peer)]
    keeps_name = parsed.scheme == "https"
    if not its_own or (keeps_name and its_own != found):
        elsewhere = next(each for each in found if each not in its_own)
        raise Refused(
            f"it is at {elsewhere}, and this came from {peer}: a worker is called where it calls from; let the API's "
            "OPS_WORKER_ALLOW name that address, its network or its name if this is right"
        )
    return str(parsed if keeps_name else parsed.copy_with(host=str(its_own[0]))).rstrip("/")


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
    if any(each.is_link_local or each.is_multicast or each.is_unspecified or each in METADATA for each in _ends(ip)):
        raise Refused(
            f"it is at {address}: nothing is sent to addresses that are link-local, multicast, unspecified or a "
            "cloud's for its metadata"
        )


def _of(address: str) -> Address:
    ip = ip_address(address)
    return ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip


def _ends(ip: Address) -> list[Address]:
    """It, and where a gateway may take it."""
    if isinstance(ip, IPv4Address):
        return [ip]
    if any(ip in carrier for carrier in CARRIERS):
        return [ip, IPv4Address(int(ip) & 0xFFFFFFFF)]
    return [ip, ip.sixtofour] if ip.sixtofour else [ip]


def _is_name(text: str) -> bool:
    """Also of what looks like a mistaken address: a name does not end in a number."""
    return bool(_NAME.fullmatch(text)) and not text.rpartition(".")[2].isdigit()


def _is_allowed(host: str, address: Address, allow: Sequence[Allowed]) -> bool:
    return any(host.lower() == each if isinstance(each, str) else address in each for each in allow)


def _same_host(address: Address, peer: str) -> bool:
    try:
        there = _of(peer)
    except ValueError:  # a socket that is no network's
        return False
    return address == there or (_is_ours(address) and _is_ours(there))


def _is_ours(address: Address) -> bool:
    """Whether this host has it: only to itself it speaks from there. (Anything can be bound where the kernel is told
    so, as beside a failover address.)"""
    if address.is_loopback:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))  # sends nothing
            return ip_address(probe.getsockname()[0]) == address
    except OSError:
        return False
