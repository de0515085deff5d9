"""What a shell offers at a tab. The server is asked, and soon given up: a key must neither hang nor complain."""

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from ops_cli import show

if TYPE_CHECKING:
    from relight.client import Client

LIMIT_S = 1.0
OFFERED = 50

# The word, and what a shell that can shows beside it.
Offers = list[tuple[str, str]]
Completion = Callable[[typer.Context, str], Offers]


def operations(*statuses: str) -> Completion:
    """Ids of those in one of the statuses, newest first."""

    def offers(client: "Client", incomplete: str) -> Offers:
        found = list(client.list(status=",".join(statuses) or None, q=incomplete or None, limit=OFFERED))
        ids = show.shortest(each.id for each in found)
        return [(ids[each.id], f"{each.name}, {each.status}") for each in found]

    return _asking(offers)


def workers() -> Completion:
    return _asking(lambda client, _: [(each.name, f"on {each.host}") for each in client.workers() if each.live])


def workloads() -> Completion:
    return _asking(lambda client, _: [(each.name, each.title) for each in client.workloads()])


def statuses(incomplete: str) -> list[str]:
    """Of a list with commas the last one."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + status for status in show.STYLES if status.startswith(last)]


def _asking(offers: "Callable[[Client, str], Offers]") -> Completion:
    def complete(context: typer.Context, incomplete: str) -> Offers:
        with suppress(Exception):  # no server, another one's token, a newer one's answer: there is nothing to offer
            from relight.client import Client

            url, token = context.params.get("url"), context.params.get("token")
            with Client(url, token, timeout_s=LIMIT_S, sleep=_no_second_try) as client:
                return [each for each in offers(client, incomplete) if each[0].startswith(incomplete)]
        return []

    return complete


def _no_second_try(_: float) -> None:
    raise TimeoutError
