"""Where the ranks of a gang meet: sockets, and the interface of the worker's own address."""

import socket
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from ops_worker import rendezvous
from ops_worker.rendezvous import interface, interface_environment, listeners
from ops_worker.settings import Settings

Given = Callable[..., Settings]


@pytest.fixture
def given(tmp_path: Path) -> Given:
    def settings(bind: str = "0.0.0.0", url: str | None = None, api: str = "http://127.0.0.1:8470") -> Settings:
        environ = {"OPS_API_URL": api, "OPS_API_TOKEN": "t", "OPS_STORAGE_ROOT": str(tmp_path), "HOME": str(tmp_path)}
        return Settings.from_env(environ | {"OPS_WORKER_BIND": bind} | ({"OPS_WORKER_URL": url} if url else {}))

    return settings


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What host names resolve to here."""
    known: dict[str, str] = {}

    def look_up(host: str) -> IPv4Address | None:
        found = known.get(host, host)
        return IPv4Address(found) if found[:1].isdecimal() else None

    monkeypatch.setattr(rendezvous, "_ipv4", look_up)
    return known


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an interface that others reach; packets to any host go from it."""
    address = rendezvous._towards("192.0.2.1")
    if address is None or address.is_loopback:
        pytest.skip("this host has no network")
    return str(address)


def test_each_slot_has_a_socket_of_its_own_that_listens() -> None:
    with listeners("127.0.0.1", 3) as sockets:
        ports = {each.getsockname()[1] for each in sockets}
        for port in ports:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
    assert len(ports) == 3
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.77 for the ranks"), listeners("192.0.2.77", 1):
        pass


def test_the_loopback_is_the_interface_of_who_listens_there(given: Given, names: dict[str, str]) -> None:
    names["localhost"] = "127.0.0.1"

    assert interface(given("127.0.0.1")) == "lo"
    assert interface(given(url="http://localhost:8471")) == "lo"
    assert interface(given(url="http://127.0.0.1:8471")) == "lo"


def test_the_interface_has_the_address_that_is_listened_on_or_told_the_api(
    given: Given, names: dict[str, str], own: str
) -> None:
    names["node-1"] = own

    found = interface(given(own))

    assert found in [name for _, name in socket.if_nameindex()]
    assert found != "lo"
    assert interface(given(url="http://node-1:8471")) == found
    assert interface(given(url=f"http://{own}:8471")) == found


def test_a_name_that_is_loopback_here_alone_is_not_believed(given: Given, names: dict[str, str], own: str) -> None:
    names["node-1"] = "127.0.1.1"

    found = interface(given(url="http://node-1:8471", api="http://192.0.2.1:8470"))

    assert found == interface(given(own))


def test_an_address_of_nobody_here_leaves_it_to_the_libraries(given: Given, names: dict[str, str]) -> None:
    assert interface(given(url="http://198.51.100.7:8471")) is None
    assert interface(given("::1")) is None


def test_what_the_admin_says_stays(given: Given) -> None:
    said = {"GLOO_SOCKET_IFNAME": "ib0"}

    assert interface_environment(given("127.0.0.1"), said) == {"NCCL_SOCKET_IFNAME": "lo"}
    assert interface_environment(given("127.0.0.1"), said | {"NCCL_SOCKET_IFNAME": "ib1"}) == {}
