"""Where the ranks of a gang meet: a socket for each slot, and the interface that leads to rank 0."""

import socket

import pytest

from ops_worker.rendezvous import listeners
from relight.training.team import _interface_towards


def test_each_slot_has_a_socket_of_its_own_that_listens() -> None:
    with listeners("127.0.0.1", 3) as sockets:
        ports = {each.getsockname()[1] for each in sockets}
        for port in ports:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
    assert len(ports) == 3
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.77 for the ranks"), listeners("192.0.2.77", 1):
        pass


def test_a_rank_talks_through_the_interface_that_leads_to_rank_0() -> None:
    assert _interface_towards("127.0.0.1", 9) == "lo"
    assert _interface_towards("::1", 9) is None, "only IPv4 is looked up: the libraries decide"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this host has no network")
        address = probe.getsockname()[0]
    outwards = _interface_towards("192.0.2.1", 9)
    assert outwards not in (None, "lo")
    assert _interface_towards(address, 9) == outwards, "its own address is not reached by the loopback's"
