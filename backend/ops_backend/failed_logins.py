"""How often one address may show a wrong secret: as often as people mistype, not as often as a guesser tries."""

import ipaddress
import time
from collections.abc import Callable

FAILURES = 10
REFILL_S = 6.0  # for one more
MOST = 10_000
IPV6_PREFIX = 64  # what one customer has: within it an address costs nothing


class FailedLogins:
    """A bucket an address, of this process, for the `most` that failed last."""

    def __init__(
        self,
        failures: int = FAILURES,
        refill_s: float = REFILL_S,
        most: int = MOST,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spare_s = (failures - 1) * refill_s
        self._refill_s = refill_s
        self._most = most
        self._clock_s = clock_s
        # When the bucket is full again (GCRA's theoretical arrival time), those that failed last at the end.
        self._full_at_s: dict[str, float] = {}

    def allowed(self, address: str) -> float:
        """Seconds to wait before another secret is looked at; 0.0: none."""
        full_at_s = self._full_at_s.get(_network(address), 0.0)
        return max(0.0, full_at_s - self._spare_s - self._clock_s())

    def failed(self, address: str) -> None:
        network, now_s = _network(address), self._clock_s()
        full_at_s = max(self._full_at_s.pop(network, now_s), now_s) + self._refill_s
        if len(self._full_at_s) >= self._most:
            del self._full_at_s[next(iter(self._full_at_s))]  # the one that has been quiet for longest
        self._full_at_s[network] = full_at_s


def _network(address: str) -> str:
    """What is counted together. What is no address (a socket's peer without one) counts as it is."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:100]
    if isinstance(found, ipaddress.IPv6Address):
        if (mapped := found.ipv4_mapped) is not None:
            return str(mapped)
        return str(ipaddress.ip_network((int(found), IPV6_PREFIX), strict=False))
    return str(found)
