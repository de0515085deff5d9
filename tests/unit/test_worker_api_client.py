"""Which answers tell a worker that a report will never be taken, and which only that it has to wait."""

from uuid import uuid4

import httpx
import pytest

from ops_contract.agents import HoldRef
from ops_contract.errors import ErrorCode, OpsError
from ops_worker.api_client import ApiClient, ApiRefused, ApiUnavailable


async def sent(answer: httpx.Response) -> int:
    async with ApiClient("http://api", "token") as api:
        api._http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: answer), base_url="http://api")
        return await api.send_reports(HoldRef(operation_id=uuid4(), attempt=1), "{}")


def ours(code: ErrorCode) -> httpx.Response:
    error = OpsError(code, "said so")
    return httpx.Response(error.http_status, content=error.body().model_dump_json())


@pytest.mark.parametrize("status", [302, 401, 403, 404, 405, 408, 409, 429, 500, 502, 503])
async def test_what_a_proxy_or_a_stranger_says_sets_no_report_aside(status: int) -> None:
    with pytest.raises(ApiUnavailable) as problem:
        await sent(httpx.Response(status, text="<html>", headers={"Retry-After": "3"}))
    assert problem.value.retry_after_s == 3


@pytest.mark.parametrize("code", [ErrorCode.UNAUTHENTICATED, ErrorCode.UNAVAILABLE, ErrorCode.INTERNAL])
async def test_an_api_that_cannot_say_yet_is_asked_again(code: ErrorCode) -> None:
    with pytest.raises(ApiUnavailable):
        await sent(ours(code))


@pytest.mark.parametrize("code", [ErrorCode.FENCED, ErrorCode.OUT_OF_ORDER, ErrorCode.INVALID, ErrorCode.NOT_FOUND])
async def test_what_the_api_refuses_it_refuses_for_good(code: ErrorCode) -> None:
    with pytest.raises(ApiRefused) as refusal:
        await sent(ours(code))
    assert refusal.value.code is code


async def test_too_large_is_a_refusal_whoever_says_it() -> None:
    with pytest.raises(ApiRefused, match="413"):
        await sent(httpx.Response(413, text="<html>"))


async def test_an_answer_that_is_not_understood_is_no_answer() -> None:
    with pytest.raises(ApiUnavailable, match="not understood"):
        await sent(httpx.Response(200, text="<html>welcome</html>"))
