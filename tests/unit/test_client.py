"""The client against scripted answers: what it repeats, what it raises, and which server it finds."""

import json
import stat
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest

from helpers.answers import metric_points, operation, summary
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Status
from ops_contract.operations import OperationPage
from relight.client import Client
from relight.packing import Packed
from relight.settings import UpState, config_path, find_server, forget_up_state, up_state_path, write_up_state
from relight.transfers import run_name
from relight.transport import TRIES, Unreachable

URL = "http://127.0.0.1:8470"
Answer = httpx.Response | Exception


def page(*ids: str, cursor: str | None = None) -> httpx.Response:
    items = [summary(operation(id=UUID(id))) for id in ids]
    return httpx.Response(200, text=OperationPage(items=items, next_cursor=cursor).model_dump_json())


def refusal(code: ErrorCode, message: str = "no", **headers: str) -> httpx.Response:
    error = OpsError(code, message)
    return httpx.Response(error.http_status, text=error.body().model_dump_json(), headers=headers)


class Script:
    """Gives its answers in order, the last one for ever, and keeps the requests."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.slept_s: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self) -> Client:
        return Client(URL, "secret", transport=httpx.MockTransport(self), sleep=self.slept_s.append)


@pytest.mark.parametrize(
    "trouble", [httpx.ConnectError("refused"), httpx.ReadError("lost"), refusal(ErrorCode.UNAVAILABLE)]
)
def test_a_submit_is_repeated_under_one_idempotency_key(trouble: Answer) -> None:
    made = operation()
    script = Script(trouble, httpx.Response(201, text=made.model_dump_json()))

    with script.client() as client:
        assert client.submit({"workload": "digits", "execution": {"max_epochs": 2}}) == made

    keys = [request.headers["Idempotency-Key"] for request in script.requests]
    assert len(keys) == 2
    assert keys[0] == keys[1]
    assert json.loads(script.requests[1].content) == {"workload": "digits", "execution": {"max_epochs": 2}}


def test_two_submits_have_two_keys() -> None:
    script = Script(httpx.Response(201, text=operation().model_dump_json()))

    with script.client() as client:
        client.submit({"workload": "digits"})
        client.submit({"workload": "digits"})

    assert len({request.headers["Idempotency-Key"] for request in script.requests}) == 2


def test_a_cancel_whose_answer_was_lost_is_not_repeated() -> None:
    script = Script(httpx.ReadError("lost"))

    with script.client() as client, pytest.raises(Unreachable, match="may have been carried out"):
        client.cancel(uuid4())

    assert len(script.requests) == 1


def test_retries_end_and_say_what_to_do() -> None:
    script = Script(httpx.ConnectError("refused"))

    with script.client() as client, pytest.raises(Unreachable, match="ops up"):
        client.workers()

    assert len(script.requests) == TRIES


def test_retry_after_is_respected() -> None:
    script = Script(refusal(ErrorCode.UNAVAILABLE, **{"Retry-After": "3"}), httpx.Response(200, text='{"items": []}'))

    with script.client() as client:
        client.workers()

    assert 3 * 0.8 <= script.slept_s[0] <= 3 * 1.2


def test_a_refusal_is_the_error_of_its_body() -> None:
    script = Script(refusal(ErrorCode.NOT_RESUMABLE, "it runs"))

    with script.client() as client, pytest.raises(OpsError, match="it runs") as refused:
        client.resume(uuid4())

    assert refused.value.code is ErrorCode.NOT_RESUMABLE
    assert len(script.requests) == 1


@pytest.mark.parametrize("answer", [httpx.Response(200, text="<html>"), httpx.Response(404, text="<html>")])
def test_another_kind_of_server_is_told_from_relight(answer: httpx.Response) -> None:
    with Script(answer).client() as client, pytest.raises(Unreachable, match="--url"):
        client.get(uuid4())


def test_polling_asks_only_for_changes() -> None:
    known = operation()
    script = Script(httpx.Response(200, text=known.model_dump_json(), headers={"ETag": '"1"'}), httpx.Response(304))

    with script.client() as client:
        first, second = client.get(known.id), client.get(known.id)

    assert first == second == known
    assert [request.headers.get("If-None-Match") for request in script.requests] == [None, '"1"']


def test_wait_outlives_an_absent_server() -> None:
    running, done = operation(), operation(status=Status.COMPLETED)
    away: list[Answer] = [httpx.ConnectError("refused")] * TRIES
    script = Script(
        httpx.Response(200, text=running.model_dump_json()), *away, httpx.Response(200, text=done.model_dump_json())
    )

    with script.client() as client:
        assert client.wait(running.id).status is Status.COMPLETED


def test_wait_loses_its_patience() -> None:
    script = Script(httpx.ConnectError("refused"))

    with script.client() as client, pytest.raises(Unreachable):
        client.wait(uuid4(), poll_s=1.0, patience_s=3.0)

    assert len(script.requests) == 4 * TRIES


def test_list_goes_through_all_pages_up_to_its_limit() -> None:
    ids = [str(uuid4()) for _ in range(3)]
    script = Script(page(*ids[:2], cursor="next"), page(ids[2], cursor="more"))

    with script.client() as client:
        assert [str(item.id) for item in client.list(status="running", limit=3)] == ids

    assert [request.url.params.get("cursor") for request in script.requests] == [None, "next"]
    assert [request.url.params["limit"] for request in script.requests] == ["3", "1"]
    assert script.requests[1].url.params["status"] == "running"


def test_a_prefix_is_resolved_among_ids_only() -> None:
    wanted, named_so = "abcd0000-0000-4000-8000-000000000000", "11110000-0000-4000-8000-000000000000"
    script = Script(page(wanted, named_so))

    with script.client() as client:
        assert client.resolve("ABCD") == UUID(wanted)

    assert script.requests[0].url.params["q"] == "abcd"


@pytest.mark.parametrize(
    ("answer", "prefix", "code", "words"),
    [
        (page(), "abcd", ErrorCode.NOT_FOUND, "ops list"),
        (
            page("abcd0000-0000-4000-8000-000000000000", "abcd1000-0000-4000-8000-000000000000"),
            "abcd",
            ErrorCode.INVALID,
            "abcd1000",
        ),
        (page(), "abc", ErrorCode.INVALID, "at least 4"),
    ],
)
def test_a_prefix_of_none_or_of_several_is_refused(
    answer: httpx.Response, prefix: str, code: ErrorCode, words: str
) -> None:
    with Script(answer).client() as client, pytest.raises(OpsError, match=words) as refused:
        client.resolve(prefix)

    assert refused.value.code is code


def test_metrics_keep_every_bit() -> None:
    points = [(0, 0.1 + 0.2), (1, float("-inf")), (2, -0.0), (3, 5e-324)]
    told = metric_points("loss", points)
    script = Script(httpx.Response(200, text=told.model_dump_json()))

    with script.client() as client:
        assert [value.hex() for _, value in client.metrics(uuid4(), "loss").points] == [v.hex() for _, v in points]


def test_metrics_are_read_to_the_last_page_over_an_attempt_that_begins_meanwhile() -> None:
    pages = [
        metric_points("loss", [(0, 4.0), (1, 3.0), (2, 2.0)], more=True, cursor="1.1.1.0"),
        metric_points("loss", [(1, 3.5)], more=True, cursor="2.1.2.1", replaces_from=1),
        metric_points("loss", [(2, 2.5)], cursor="2.2.2.1"),
    ]
    script = Script(*(httpx.Response(200, text=page.model_dump_json()) for page in pages))

    with script.client() as client:
        whole = client.metrics(uuid4(), "loss")

    assert whole.points == [(0, 4.0), (1, 3.5), (2, 2.5)]
    assert (whole.more, whole.cursor, whole.replaces_from) == (False, "2.2.2.1", 1)
    assert [request.url.params.get("cursor") for request in script.requests] == [None, "1.1.1.0", "2.1.2.1"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


def configure(environ: dict[str, str], url: str, token: str) -> None:
    path = config_path(environ)
    path.parent.mkdir(parents=True)
    path.write_text(f'[server]\nurl = "{url}"\ntoken = "{token}"\n')


def test_the_last_up_is_found_and_kept_private(environ: dict[str, str]) -> None:
    write_up_state(UpState(URL, "up-token", "/data", 1), environ)

    server = find_server(environ=environ)

    assert server is not None
    assert (server.url, server.token) == (URL, "up-token")
    assert stat.S_IMODE(up_state_path(environ).stat().st_mode) == 0o600


def test_arguments_come_before_environment_before_config_before_up(environ: dict[str, str]) -> None:
    def found(**arguments: str) -> tuple[str, str | None]:
        server = find_server(**arguments, environ=environ)
        assert server is not None
        return server.url, server.token

    write_up_state(UpState("http://up:1", "up", "/data", 1), environ)
    assert found() == ("http://up:1", "up")
    configure(environ, "http://config:1", "config")
    assert found() == ("http://config:1", "config")
    environ |= {"OPS_API_URL": "http://env:1", "OPS_API_TOKEN": "env"}
    assert found() == ("http://env:1", "env")
    assert found(url="http://argument:1", token="argument") == ("http://argument:1", "argument")


def test_a_stored_token_goes_to_its_own_server_only(environ: dict[str, str]) -> None:
    configure(environ, "http://config:1", "config")

    own, stranger = find_server("http://config:1/", environ=environ), find_server("http://other:1", environ=environ)

    assert own is not None
    assert own.token == "config"
    assert stranger is not None
    assert stranger.token is None


def test_only_the_last_up_removes_the_state(environ: dict[str, str]) -> None:
    write_up_state(UpState(URL, "token", "/data", 2), environ)

    forget_up_state(1, environ)
    assert find_server(environ=environ) is not None
    forget_up_state(2, environ)
    assert find_server(environ=environ) is None


def test_no_known_server_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clear: Callable[..., None] = monkeypatch.delenv
    for name in ("OPS_API_URL", "OPS_API_TOKEN", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        clear(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    with pytest.raises(Unreachable, match="ops up"):
        Client()


def packed() -> Packed:
    archive = b"an archive"
    return Packed(archive, sha256(archive).hexdigest(), [], [], None, None)


def test_code_that_the_server_has_is_not_sent_again() -> None:
    script = Script(httpx.Response(200))

    with script.client() as client:
        assert client.upload(packed()) == packed().code

    assert [request.method for request in script.requests] == ["HEAD"]


def test_code_that_the_server_has_not_is_sent_and_a_lost_answer_is_no_obstacle() -> None:
    script = Script(refusal(ErrorCode.NOT_FOUND), httpx.ReadError("lost"), httpx.Response(200, json=None))

    with script.client() as client:
        assert client.upload(packed()) == packed().code

    assert [request.method for request in script.requests] == ["HEAD", "PUT", "PUT"]
    assert {request.content for request in script.requests[1:]} == {packed().archive}


def test_a_refused_upload_says_why() -> None:
    script = Script(httpx.Response(401), refusal(ErrorCode.UNAUTHENTICATED, "send a token"))

    with script.client() as client, pytest.raises(OpsError, match="send a token"):
        client.upload(packed())


def test_a_snapshot_is_given_whole_or_not_at_all() -> None:
    with Script(httpx.Response(200, content=packed().archive)).client() as client:
        assert client.snapshot(packed().sha256) == packed().archive
    with Script(httpx.Response(200, content=b"another")).client() as client, pytest.raises(Unreachable):
        client.snapshot(packed().sha256)
    with Script(refusal(ErrorCode.NOT_FOUND)).client() as client, pytest.raises(OpsError) as gone:
        client.snapshot(packed().sha256)
    assert gone.value.code is ErrorCode.NOT_FOUND


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("digits-1", "digits-1-1f6e0a2b"),
        ("digits-1f6e0a2b", "digits-1f6e0a2b"),
        ("../a b", "a-b-1f6e0a2b"),
        ("…", "1f6e0a2b"),
    ],
)
def test_a_file_is_named_after_its_operation_and_the_beginning_of_its_id_once(name: str, file: str) -> None:
    assert run_name(operation(id=UUID("1f6e0a2b-0000-4000-8000-000000000000"), name=name)) == file
