"""Asks a worker whether a job is right, before it is inserted and outside any transaction."""

import logging

import httpx

from ops_backend.store.validation import Question
from ops_contract.agents import Validate, Validated

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
            answer = await self._http.post(
                f"{question.url}/validate",
                content=message.model_dump_json(),
                headers=headers,
                timeout=self._timeout_s,
            )
            return Validated.model_validate_json(answer.raise_for_status().content)
        except (httpx.HTTPError, ValueError) as error:
            log.warning("the worker at %s did not validate a job, its start will: %r", question.url, error)
            return None
