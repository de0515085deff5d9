"""Asks a worker whether a job is right, before it is inserted and outside any transaction."""

import asyncio
import logging

import httpx

from ops_backend.store.validation import Question
from ops_contract.agents import VALIDATED_MAX_BYTES, Validate, Validated

log = logging.getLogger(__name__)

# A worker gives up before: it answers 503 then.
ASK_S = 20.0


class Validator:
    def __init__(self, http: httpx.AsyncClient, timeout_s: float = ASK_S) -> None:
        self._http = http
        self._timeout_s = timeout_s

    async def ask(self, question: Question) -> Validated | None:
        """None when the worker does not say: the attempt will, at its start."""
        message = Validate(incarnation=question.incarnation, job=question.job)
        headers = {"Authorization": f"Bearer {question.secret}", "Content-Type": "application/json"}
        try:
            async with (
                # httpx only bounds each wait for a piece of it.
                asyncio.timeout(self._timeout_s),
                self._http.stream(
                    "POST",
                    f"{question.url}/validate",
                    content=message.model_dump_json(),
                    headers=headers,
                    timeout=self._timeout_s,
                ) as answer,
            ):
                return Validated.model_validate_json(await _read(answer.raise_for_status()))
        except (httpx.HTTPError, ValueError, TimeoutError) as error:
            log.warning("the worker at %s did not validate a job, its start will: %r", question.url, error)
            return None


async def _read(answer: httpx.Response) -> bytes:
    """Raises ValueError for more than users' code may say, and for what Postgres cannot store."""
    found = bytearray()
    async for piece in answer.aiter_bytes():
        found += piece
        if len(found) > VALIDATED_MAX_BYTES:
            raise ValueError(f"it said more than {VALIDATED_MAX_BYTES} bytes")
    if b"\\u0000" in found:
        raise ValueError("it said something with a NUL")
    return bytes(found)
