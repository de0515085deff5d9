"""The check of answers against the OpenAPI document is seen failing, and the document says what the answers are."""

import json
from typing import Any

import httpx
import pytest

from helpers import answers
from helpers.openapi import NotDocumented, OpenAPI, openapi_of_this_code
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.operations import ProgressView

PATH = "/api/v1/operations/00000000-0000-0000-0000-000000000000"
JSON = "application/json"


@pytest.fixture
def api() -> OpenAPI:
    return openapi_of_this_code()


def operation(**changes: Any) -> bytes:
    return json.dumps(json.loads(answers.operation().model_dump_json()) | changes).encode()


def test_what_is_documented_passes(api: OpenAPI) -> None:
    refusal = OpsError(ErrorCode.NOT_FOUND, "none").body().model_dump_json().encode()
    loss = ProgressView(loss=float("nan"), percent=1)
    api.check("GET", PATH, 200, JSON, answers.operation(progress=loss).model_dump_json().encode())
    api.check("GET", PATH, 304, None, b"")
    api.check("HEAD", PATH, 200, JSON, b"")
    api.check("DELETE", PATH, 204, None, b"")
    api.check("GET", f"{PATH}/logs", 200, "text/plain; charset=utf-8", b"")
    for path in (PATH, f"{PATH}/logs", "/no/such/path"):
        api.check("GET", path, 404, JSON, refusal)
    points = answers.metric_points("loss", [(0, 1.0), (1, float("-inf"))])
    api.check("GET", f"{PATH}/metrics", 200, JSON, points.model_dump_json().encode())


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (("GET", PATH, 418, JSON, operation()), "documented are 200, "),
        (("GET", PATH, 500, JSON, operation()), "documented are 200, "),
        (("GET", PATH, 200, "text/html", operation()), "documented are application/json"),
        (("GET", PATH, 200, None, b""), "documented are application/json"),
        (("GET", PATH, 304, JSON, operation()), "documented are no body"),
        (("PATCH", PATH, 200, JSON, operation()), "no such call is documented"),
        (("GET", PATH + "/moon", 200, JSON, b"{}"), "no such call is documented"),
        (("GET", PATH, 200, JSON, operation(extra=1)), "'extra' was unexpected"),
        (("GET", PATH, 200, JSON, operation(status="asleep")), r"\$.status: 'asleep'"),
        (("GET", PATH, 200, JSON, operation(id="1")), r"\$.id: '1' is not a 'uuid'"),
        (("GET", PATH, 200, JSON, operation(created_at="2026-01-01T00:00:00")), "is not a 'date-time'"),
        (("GET", PATH, 200, JSON, operation(progress={"loss": "Nan"})), "progress"),
        (("GET", PATH, 200, JSON, operation(progress={"step": "NaN"})), "progress"),
        (("GET", PATH, 404, JSON, b'{"detail": "Not Found"}'), "'detail' was unexpected"),
        (("GET", PATH + "/metrics", 200, JSON, b'{"name":"x","points":[[0,null]],"attempt_starts":[]}'), "points"),
    ],
)
def test_what_is_not_documented_fails(api: OpenAPI, answer: tuple[Any, ...], why: str) -> None:
    for _ in range(2):  # what was wrong once is not taken for seen
        with pytest.raises(NotDocumented, match=why):
            api.check(*answer)


def test_a_client_that_is_watched_raises(api: OpenAPI) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={}))
    with httpx.Client(transport=transport, base_url="http://test") as client:
        client.get(PATH)
        api.watch(client)
        with pytest.raises(NotDocumented, match="required property"):
            client.get(PATH)


def test_every_call_documents_its_errors_in_our_shape(api: OpenAPI) -> None:
    document = api.document
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            errors = {status: answer for status, answer in call["responses"].items() if status >= "401"}
            assert {"422", "503"} <= set(errors), (path, method)
            for status, answer in errors.items():
                if status != "416":
                    assert answer["content"] == {JSON: {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}, path
    assert "HTTPValidationError" not in document["components"]["schemas"]
