"""Guessing a secret: ten tries at once, then one in six seconds, for each address."""

import pytest

from ops_backend.failed_logins import FailedLogins


class Clock:
    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def logins(clock: Clock) -> FailedLogins:
    return FailedLogins(failures=10, refill_s=6.0, most=100, clock_s=clock)


def fail(logins: FailedLogins, address: str, times: int) -> None:
    for _ in range(times):
        logins.failed(address)


def test_ten_failures_are_free_and_the_eleventh_waits(logins: FailedLogins) -> None:
    for _ in range(10):
        assert logins.allowed("10.0.0.1") == 0.0
        logins.failed("10.0.0.1")

    assert logins.allowed("10.0.0.1") == 6.0


def test_one_more_comes_every_six_seconds(logins: FailedLogins, clock: Clock) -> None:
    fail(logins, "10.0.0.1", 10)

    clock.now_s += 4.0
    assert logins.allowed("10.0.0.1") == 2.0
    clock.now_s += 2.0
    assert logins.allowed("10.0.0.1") == 0.0
    logins.failed("10.0.0.1")
    assert logins.allowed("10.0.0.1") == 6.0


def test_a_minute_of_quiet_makes_all_ten_free_again(logins: FailedLogins, clock: Clock) -> None:
    fail(logins, "10.0.0.1", 10)
    clock.now_s += 60.0

    fail(logins, "10.0.0.1", 9)
    assert logins.allowed("10.0.0.1") == 0.0
    logins.failed("10.0.0.1")
    assert logins.allowed("10.0.0.1") == 6.0


def test_failures_that_were_under_way_together_all_count(logins: FailedLogins) -> None:
    fail(logins, "10.0.0.1", 20)

    assert logins.allowed("10.0.0.1") == 66.0


def test_an_address_does_not_pay_for_another(logins: FailedLogins) -> None:
    fail(logins, "10.0.0.1", 50)

    assert logins.allowed("10.0.0.2") == 0.0


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("unix", "unix", True),
    ],
)
def test_who_counts_together(logins: FailedLogins, one: str, other: str, together: bool) -> None:
    fail(logins, one, 10)

    assert (logins.allowed(other) > 0) == together


def test_many_addresses_take_bounded_memory(logins: FailedLogins) -> None:
    for n in range(1000):
        logins.failed(f"10.0.{n // 256}.{n % 256}")

    assert len(logins._full_at_s) == 100


def test_a_guesser_is_not_forgotten_while_others_come_and_go(logins: FailedLogins, clock: Clock) -> None:
    for n in range(1000):
        logins.failed("10.9.9.9")
        logins.failed(f"10.0.{n // 256}.{n % 256}")
        clock.now_s += 1.0

    assert logins.allowed("10.9.9.9") > 0


def test_who_has_long_been_quiet_goes_first(logins: FailedLogins, clock: Clock) -> None:
    fail(logins, "10.9.9.9", 10)
    for n in range(100):
        clock.now_s += 0.01
        logins.failed(f"10.0.0.{n}")

    assert logins.allowed("10.9.9.9") == 0.0
    assert logins.allowed("10.0.0.99") == 0.0
    assert len(logins._full_at_s) == 100
