"""The asynchronous client: the same methods, and an event loop that is never held up."""

import asyncio
import inspect
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID, uuid4

import httpx
import pytest

from helpers.answers import metric_names, metric_points, operation
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import Artifacts, Results, ResultView
from ops_contract.lifecycle import Status
from ops_contract.plans import TrainingResult
from relight import AsyncClient
from relight.client import Client
from relight.transport import TRIES

AT = datetime(2026, 1, 1, tzinfo=UTC)
TRAINED = TrainingResult(steps=6, samples=12, units=12, params=3, embedding_params=0)
Answer = Callable[[httpx.Request], httpx.Response]


def client(answer: Answer) -> AsyncClient:
    return AsyncClient("http://127.0.0.1:1", "t", transport=httpx.MockTransport(answer), sleep=lambda duration_s: None)


def test_it_has_every_method_of_the_client() -> None:
    def public(of: type) -> set[str]:
        return {name for name, _ in inspect.getmembers(of, inspect.isfunction) if not name.startswith("_")}

    assert public(AsyncClient) == public(Client)


async def test_two_hundred_waits_go_on_beside_each_other() -> None:
    asked: dict[UUID, int] = {}
    lock = threading.Lock()

    def answer(request: httpx.Request) -> httpx.Response:
        id = UUID(request.url.path.rpartition("/")[2])
        with lock:
            asked[id] = asked.get(id, 0) + 1
            # None ends before all of them have asked twice: with a thread for each they would wait for one another.
            ended = len(asked) == 200 and min(asked.values()) >= 2
        status = Status.COMPLETED if ended else Status.RUNNING
        return httpx.Response(200, text=operation(id=id, status=status).model_dump_json())

    async with client(answer) as api:
        ended = await asyncio.gather(*(api.wait(uuid4(), poll_s=0.0) for _ in range(200)))

    assert {each.status for each in ended} == {Status.COMPLETED}


async def test_a_call_that_hangs_holds_up_nobody_and_can_be_cancelled() -> None:
    release = threading.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/workers"):
            release.wait(60)
        return httpx.Response(200, text='{"items": []}')

    async with client(answer) as api:
        hanging = asyncio.create_task(api.workers())
        assert await api.workloads() == []
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        release.set()


async def test_a_stream_tells_every_change_and_outlives_an_absent_server() -> None:
    id = uuid4()
    states = [operation(id=id, attempt=n) for n in (1, 1, 2)] + [operation(id=id, attempt=2, status=Status.FAILED)]
    away = OpsError(ErrorCode.UNAVAILABLE, "away").body().model_dump_json()
    answers = [httpx.Response(200, text=each.model_dump_json()) for each in states]
    answers[1:1] = [httpx.Response(503, text=away) for _ in range(TRIES)]

    async with client(lambda request: answers.pop(0)) as api:
        told = [each async for each in api.stream(id, poll_s=0.0)]

    assert [(each.attempt, each.status) for each in told] == [(1, "running"), (2, "running"), (2, "failed")]
    assert not answers


async def test_an_error_of_the_server_is_the_same_error() -> None:
    body = OpsError(ErrorCode.NOT_CANCELLABLE, "it has ended").body().model_dump_json()

    async with client(lambda request: httpx.Response(409, text=body)) as api:
        with pytest.raises(OpsError, match="it has ended"):
            await api.cancel(uuid4(), reason="why")


async def test_metrics_as_columns_have_nan_where_there_is_no_value() -> None:
    curves = {"loss": [(0, 2.0), (2, 1.0)], "val_loss": [(2, 3.0)]}

    def answer(request: httpx.Request) -> httpx.Response:
        name = request.url.params.get("name")
        body = metric_points(name, curves[name]) if name else metric_names(curves)
        return httpx.Response(200, text=body.model_dump_json())

    async with client(answer) as api:
        columns = await api.columns(uuid4())
        one = await api.columns(uuid4(), ["loss"])

    assert columns["step"] == [0, 2]
    assert columns["loss"] == [2.0, 1.0]
    assert columns["val_loss"][0] != columns["val_loss"][0], "NaN"
    assert columns["val_loss"][1] == 3.0
    assert one == {"step": [0, 2], "loss": [2.0, 1.0]}


async def test_a_bar_shows_in_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = operation(name="run [1]", status=Status.COMPLETED, progress={"step": 7, "steps_total": 9, "loss": 0.25})

    async with client(lambda request: httpx.Response(200, text=done.model_dump_json())) as api:
        await api.wait(done.id, progress=True)
        silent = capsys.readouterr()
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        await api.wait(done.id, progress=True)

    assert (silent.out, silent.err) == ("", "")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "run [1] completed" in shown.err
    assert "step 7/9 loss 0.25" in shown.err


async def test_results_are_the_last_values_and_the_files() -> None:
    done = operation(status=Status.COMPLETED)
    bodies = {
        f"/api/v1/operations/{done.id}": done,
        f"/api/v1/operations/{done.id}/artifacts": Artifacts(items=[]),
        f"/api/v1/operations/{done.id}/results": Results(items=[ResultView(attempt=1, created_at=AT, content=TRAINED)]),
    }
    metrics = metric_names({"loss": [(0, 2.0), (5, 1.0)]})

    def answer(request: httpx.Request) -> httpx.Response:
        assert "name" not in request.url.params, "no curve is read for its last value"
        return httpx.Response(200, text=bodies.get(request.url.path, metrics).model_dump_json())

    async with client(answer) as api:
        results = await api.results(done.id)

    assert (results.operation, results.metrics, results.artifacts) == (done, {"loss": 1.0}, [])
    assert results.content == TRAINED
