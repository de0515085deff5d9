"""Asks a worker whether a job is right, before it is inserted and outside any transaction."""

import logging

import httpx

from ops_backend.store.validation import Question
from ops_backend.worker_calls import post
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
        url = f"{question.url}/validate"
        try:
            answer = await post(self._http, url, question.secret, message, self._timeout_s, VALIDATED_MAX_BYTES)
            if not answer.is_success or b"\\u0000" in answer.body:  # which Postgres cannot store
                raise ValueError(f"status {answer.status}: {answer.body[:200]!r}")
            return Validated.model_validate_json(answer.body)
        except (httpx.HTTPError, ValueError) as error:
            log.warning("the worker at %s did not validate a job, its start will: %r", question.url, error)
            return None
