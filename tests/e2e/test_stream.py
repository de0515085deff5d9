"""A dashboard watches a run whose trainer is killed, while the API is killed under the dashboard."""

from collections.abc import Iterator
from uuid import UUID

import httpx
import pytest

from helpers.service import LONG, WAIT_S, Service, kill
from helpers.sse import Dashboard, Said, read


@pytest.mark.slow
def test_a_stream_that_an_api_restart_cut_off_has_every_point_of_a_run_whose_trainer_was_killed(
    service: Service,
) -> None:
    id, dashboard = service.submit(**LONG), Dashboard()
    messages = watch(service, id, dashboard)
    while not dashboard.reports:
        dashboard.take(next(messages))
    service.until_saved(id, attempt=1)
    kill(service.attempts(id)[0].trainer_pid)
    while "retry" not in names(dashboard):
        dashboard.take(next(messages))
    service.server.kill()
    service.server.close()
    with pytest.raises(httpx.TransportError):
        until_completed(messages, dashboard)
    service.restart_server()

    until_completed(watch(service, id, dashboard), dashboard)

    assert dashboard.curves() == service.curves(id)
    assert names(dashboard) == service.events(id)
    assert {attempt for attempt, _ in dashboard.reports} == {1, 2}


def watch(service: Service, id: UUID, dashboard: Dashboard) -> Iterator[Said]:
    """From where it was."""
    position = {"Last-Event-ID": dashboard.position}
    with service.http.stream("GET", f"/operations/{id}/stream", headers=position, timeout=WAIT_S) as answer:
        assert answer.status_code == 200
        yield from read(answer.iter_lines())


def until_completed(messages: Iterator[Said], dashboard: Dashboard) -> None:
    for said in messages:
        dashboard.take(said)
        if dashboard.progress.get("status") == "completed":
            return


def names(dashboard: Dashboard) -> list[str]:
    return [event["name"] for event in dashboard.events]
