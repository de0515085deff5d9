"""What a machine makes up from the API's own description: every answer is one that it describes, and none is a 5xx.

SCHEMATHESIS_SEED plays a run again; a failure prints it, and the request as a curl.
"""

import os
import random
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import FlakyStrategyDefinition
from hypothesis.stateful import run_state_machine_as_test
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from helpers.service import Service
from helpers.store import credential_of, shown_by

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
TIMEOUT_S = 60.0
OPERATIONS = 40  # that are known, of every case whose path has the id of one every second one is sent to such a one
INCARNATION = UUID(int=170)
WORKER = {
    "incarnation": str(INCARNATION),
    "credential": credential_of(INCARNATION),
    "secret": "s" * 43,
    "name": "w",
    "host": "h",
    "url": "http://127.0.0.1:1",
    "slots": [{"index": 0, "device": "cuda", "device_uuid": "GPU-1", "cores": 1}],
    "workloads": [{"name": "toy", "config_schema": {"type": "object"}, "reports": {"val_loss": "min"}}],
    "user_code": True,
}


@pytest.fixture
def service(database_url: str, tmp_path: Path) -> Iterator[Service]:
    """An API that has operations and a worker to speak of; none of them runs."""
    service = Service(tmp_path, database_url)
    service.storage.mkdir()
    try:
        service.start(workers=0)
        service.http.post("/workers", json=WORKER).raise_for_status()
        service.http.post(
            f"/workers/{WORKER['incarnation']}/heartbeat", json={"draining": True}, headers=shown_by(INCARNATION)
        ).raise_for_status()
        yield service
    finally:
        service.stop()


class Run:
    """Asks as each of `callers` in turn, most often as who may, and judges the answers."""

    def __init__(self, service: Service) -> None:
        self.seed = int(os.environ.get("SCHEMATHESIS_SEED") or secrets.randbelow(2**32))
        self.statuses: Counter[int] = Counter()
        self.failures: list[str] = []
        self._service = service
        known, wrong = bearer(service.token), bearer("wrong")
        read, operate, worker = (bearer(self._made(scope)) for scope in ("read", "operate", "worker"))
        agent = shown_by(INCARNATION)
        self._callers = cycle([known, read, known, {}, known, operate, known, wrong, known, worker, known, agent])
        self.log = service.server.log
        self._ids = cycle([self._submitted() for _ in range(OPERATIONS)])
        self._turn = cycle([True, False])
        self.schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json", timeout=TIMEOUT_S)

    def plain(self, examples: int, calls: int | None = None) -> None:
        """Requests as they are described, and others, to every call, or to so many that the seed picks."""
        operations = [result.ok() for result in self.schema.get_all_operations()]
        for operation in random.Random(self.seed).sample(operations, calls or len(operations)):
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                self._examples(operation, mode, examples)

    def stateful(self, requests: int) -> None:
        """Sequences, in which calls take what answers gave. A stream of what is there would not end."""
        run, until = self, self.requests + requests

        class Sequence(self.schema.exclude(path_regex="/stream$").as_state_machine()):  # type: ignore[misc]
            def call(self, case: Case, **kwargs: Any) -> Response:
                return run._call(case)

            def validate_response(self, response: Response, case: Case, **kwargs: Any) -> None:
                pass

        for again in range(requests):
            # Hypothesis wants the same draws to lead to the same place; what an API answers depends on what was before.
            with suppress(FlakyStrategyDefinition):
                run_state_machine_as_test(
                    seed(self.seed + again)(Sequence),
                    settings=settings(_SETTINGS, max_examples=10, stateful_step_count=10),
                )
            if self.requests >= until:
                return

    @property
    def requests(self) -> int:
        return self.statuses.total()

    def _examples(self, operation: APIOperation, mode: GenerationMode, examples: int) -> None:
        if mode is GenerationMode.NEGATIVE and not (operation.path_parameters or operation.query or operation.body):
            return  # there is nothing to get wrong

        @seed(self.seed)
        @settings(_SETTINGS, max_examples=examples)
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case) -> None:
            if "/operations/{id}" in case.path and not case.path.endswith("/stream") and next(self._turn):
                case.path_parameters["id"] = next(self._ids)
            self._call(case)

        ask()

    def _call(self, case: Case) -> Response:
        response = case.call(headers=next(self._callers), timeout=TIMEOUT_S)
        self.statuses[response.status_code] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except FailureGroup as failure:
            self.failures.append(f"{case.operation.label}: {failure}")
        return response

    def _made(self, scope: str) -> str:
        made = self._service.http.post("/tokens", json={"name": f"of the scope {scope}", "scope": scope})
        return str(made.raise_for_status().json()["token"])

    def _submitted(self) -> str:
        return str(self._service.http.post("/operations", json={"workload": "toy"}).raise_for_status().json()["id"])


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# Failures are kept, not raised: to shrink one would take minutes of real requests, and the curl of it does as well.
_SETTINGS = settings(database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), print_blob=False)


@pytest.fixture
def run(service: Service) -> Iterator[Run]:
    run = Run(service)
    print(f"SCHEMATHESIS_SEED={run.seed}")
    yield run
    print(f"{run.requests} requests: {dict(sorted(run.statuses.items()))}")
    assert service.server.running, f"the API {service.server.ending}"


def test_a_sample_of_made_up_requests_finds_nothing(run: Run) -> None:
    run.plain(examples=3, calls=15)
    run.stateful(requests=40)

    judge(run, {401, 403, 404, 422})


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_made_up_requests_find_nothing(run: Run) -> None:
    run.stateful(requests=3000)
    while run.requests < 10_000:
        run.plain(examples=80)
        run.seed += 1

    judge(run, {200, 201, 202, 204, 401, 403, 404, 409, 422})


def judge(run: Run, statuses: set[int]) -> None:
    """`statuses` have to have come, or these were no requests to speak of."""
    assert not run.failures, "\n\n".join(run.failures[:5])
    assert statuses <= set(run.statuses)
    assert "Traceback" not in run.log.read_text()
