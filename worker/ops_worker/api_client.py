"""The API as a worker sees it: five calls, and two ways in which they fail."""

import hashlib
from typing import Any, Self, TypeVar
from uuid import UUID

import httpx
from pydantic import BaseModel, ValidationError

from ops_contract.agents import (
    Heartbeat,
    HeartbeatAnswer,
    HoldRef,
    ReportsAccepted,
    WorkerRegistered,
    WorkerRegistration,
)
from ops_contract.errors import ErrorBody, ErrorCode, ErrorDetail
from ops_contract.wire import API_PREFIX

TIMEOUT_S = 30.0
MAX_RETRY_AFTER_S = 60.0

AnswerT = TypeVar("AnswerT", bound=BaseModel)


class ApiUnavailable(Exception):
    """No answer, or one that says nothing about the request: try again, not before `retry_after_s`."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class ApiUnknown(ApiUnavailable):
    """The API does not know, or no more, who this is: a worker that lives registers again."""


class NobodyKnows(Exception):
    """The same, of a worker that has ended."""


class ApiRefused(Exception):
    """The API does not take this request, and would not take it again. `error` is None if its body was not ours."""

    def __init__(self, status: int, error: ErrorDetail | None) -> None:
        super().__init__(f"{status} {error.code}: {error.message}" if error else f"HTTP status {status}")
        self.status = status
        self.error = error

    @property
    def code(self) -> ErrorCode | None:
        return self.error.code if self.error else None


class ApiClient:
    """Every call raises ApiUnavailable or ApiRefused. One client is one connection pool.

    `secret`: a token to register with, the credential of a worker for everything else.
    """

    def __init__(self, api_url: str, secret: str) -> None:
        headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
        self._http = httpx.AsyncClient(
            base_url=f"{api_url.rstrip('/')}{API_PREFIX}", headers=headers, timeout=TIMEOUT_S
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def register(self, worker: WorkerRegistration) -> WorkerRegistered:
        return await self._post("/workers", worker.model_dump_json(), WorkerRegistered)

    async def heartbeat(self, incarnation: UUID, beat: Heartbeat, timeout_s: float) -> HeartbeatAnswer:
        path = f"/workers/{incarnation}/heartbeat"
        return await self._post(path, beat.model_dump_json(), HeartbeatAnswer, timeout_s)

    async def send_reports(self, ref: HoldRef, body: str) -> int:
        """The last sequence number that is committed. `body` is a ReportBatch as JSON."""
        path = f"/operations/{ref.operation_id}/attempts/{ref.attempt}/reports"
        return (await self._post(path, body, ReportsAccepted)).last_seq

    async def send_energy(self, ref: HoldRef, body: str) -> None:
        """`body` is an EnergyBatch as JSON."""
        await self._call("POST", f"/operations/{ref.operation_id}/attempts/{ref.attempt}/energy", content=body)

    async def snapshot(self, sha256: str) -> bytes:
        """The archive, whole."""
        response = await self._call("GET", f"/snapshots/{sha256}")
        if hashlib.sha256(response.content).hexdigest() != sha256:
            raise ApiUnavailable(f"{response.url} did not give the snapshot, or not whole")
        return response.content

    async def _post(self, path: str, body: str, answer: type[AnswerT], timeout_s: float = TIMEOUT_S) -> AnswerT:
        response = await self._call("POST", path, content=body, timeout=timeout_s)
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            raise ApiUnavailable(f"{response.url} gave an answer that is not understood: {error}") from error

    async def _call(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **request)
        except httpx.HTTPError as error:
            raise ApiUnavailable(f"{self._http.base_url} does not answer: {error!r}") from error
        if not response.is_success:
            raise _problem(response)
        return response


class PredecessorsApi(ApiClient):
    """For what a worker left that has ended. It cannot register again: asking on would be asking for ever."""

    async def _call(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            return await super()._call(method, path, **request)
        except ApiUnknown as problem:
            raise NobodyKnows(str(problem)) from problem


def _problem(response: httpx.Response) -> ApiUnavailable | ApiRefused:
    status, error = response.status_code, _error(response)
    said = f"{status} {error.message if error else response.reason_phrase}"
    if status in (401, 403):
        kind = ApiUnknown if error else ApiUnavailable
        return kind(f"{said}; check OPS_API_TOKEN", _retry_after_s(response))
    # Those that are not ours come from a proxy or from another server on that port: it knows nothing of operations.
    stranger = error is None and status in (404, 405, 409)
    if status in (408, 429) or not 400 <= status < 500 or stranger:
        return ApiUnavailable(said, _retry_after_s(response))
    return ApiRefused(status, error)


def _error(response: httpx.Response) -> ErrorDetail | None:
    try:
        return ErrorBody.model_validate_json(response.content).error
    except ValidationError:
        return None


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds; the form with a date would need two clocks to agree, and counts as absent."""
    value: Any = response.headers.get("Retry-After", "")
    return min(float(value), MAX_RETRY_AFTER_S) if value.isdecimal() else 0.0
