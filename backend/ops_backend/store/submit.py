"""submit: – → pending, once per idempotency key."""

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast
from uuid import UUID, uuid4

import jsonschema
from pydantic import ValidationError
from referencing import Registry
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.placement import capacity
from ops_backend.store.sql import plain, record, statement
from ops_contract.agents import Validated
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.jobs import COMMAND, Accelerator, Code, Execution, Job, JobSpec, Resources, Setup
from ops_contract.lifecycle import Kind
from ops_contract.measurements import MEASUREMENT, MeasurementConfig
from ops_contract.problems import offer, problems_of, unknown_field
from ops_contract.resolving import Unresolvable, check_plain_knobs, resolved_execution

# Why workers that may still be started could never hold such a job, or None where they could.
Elastic = Callable[[Execution, Resources], str | None]


@dataclass(frozen=True)
class Fleet:
    """Who may run a job: workers seen within `lease_s`, and those that may be started; of these None: none ever is."""

    lease_s: float
    elastic: Elastic | None = None


@dataclass(frozen=True)
class Submission:
    """Who wants a new operation, under which idempotency key, and the bytes that the key stands for."""

    submitted_by: str
    key: str | None
    body: bytes


FIND_REPLAY = statement("""
    SELECT id, body_sha256 FROM operations WHERE submitted_by = :submitted_by AND idempotency_key = :idempotency_key
""")

FIND_WORKLOAD = statement("SELECT config_schema, reports FROM workloads WHERE name = :name")
KEEP_SNAPSHOT = statement("SELECT sha256 FROM snapshots WHERE sha256 = :sha256 FOR KEY SHARE")
KNOWN_WORKLOADS = statement("SELECT name FROM workloads ORDER BY name")

EVER_OFFERED = statement("SELECT EXISTS (SELECT FROM slots WHERE device = :device)")

MOST_CORES = statement("SELECT max(cores) FROM slots WHERE device = coalesce(CAST(:device AS text), device)")

# A key that another transaction has just taken yields no row here; the caller then reads that one.
SUBMIT = statement(f"""
    WITH moved AS (
        INSERT INTO operations (id, name, kind, workload, job, code_sha256, labels, priority, max_retries,
                                submitted_by, idempotency_key, body_sha256, phase, status, event_seq)
        VALUES (:id, :name, :kind, :workload, :job, :code_sha256, :labels, :priority, :max_retries,
                :submitted_by, :idempotency_key, :body_sha256,
                CASE :kind WHEN 'study' THEN 'plan' END, 'pending', 1)
        ON CONFLICT (submitted_by, idempotency_key) DO NOTHING
        RETURNING id, event_seq, attempt, NULL::text AS from_status, status
    )
    {record("'submit'", "'{}'")}
    RETURNING operation_id
""")


async def once(
    session: AsyncSession, submission: Submission, make: Callable[[], Awaitable[UUID | None]]
) -> tuple[UUID, bool]:
    """The operation of this key, and whether `make` has just made it. `make` gives None when another was first."""
    found = await replay(session, submission)
    if found is None:
        made = await make()
        if made is not None:
            return made, True
        found = await replay(session, submission)
    if found is None:
        raise OpsError(ErrorCode.UNAVAILABLE, "a concurrent request with this key has just gone; try again")
    return found, False


async def replay(session: AsyncSession, submission: Submission) -> UUID | None:
    """The operation that this key made before. Raises 409 when its body was another one.

    It comes before validation: what was accepted once is accepted again, whatever the schema says by now.
    """
    if submission.key is None:
        return None
    values = {"submitted_by": submission.submitted_by, "idempotency_key": submission.key}
    row = (await session.execute(FIND_REPLAY, values)).one_or_none()
    if row is None:
        return None
    if row.body_sha256 != body_sha256(submission.body):
        raise OpsError(
            ErrorCode.IDEMPOTENCY_CONFLICT,
            "this Idempotency-Key was used with another body; use a new key for a new operation",
            operation_id=str(row.id),
        )
    found: UUID = row.id
    return found


async def submit_if_new(
    session: AsyncSession, spec: JobSpec, submission: Submission, fleet: Fleet, told: Validated | None = None
) -> UUID | None:
    """Insert the operation; None when a concurrent request with the same key was first.

    Raises 422 for an unknown workload, a config that its schema refuses, a metric that it does not report, a GPU
    that nobody has, or more devices than the live workers could give, unless others may be started that could.
    """
    job = await resolved_job(session, spec, fleet, told)
    submitted: UUID | None = await session.scalar(SUBMIT, new_operation(spec, job, submission))
    return submitted


def new_operation(spec: JobSpec, job: Job, submission: Submission) -> dict[str, Any]:
    """The columns that come from its submitter."""
    id = uuid4()
    return {
        "id": id,
        "name": spec.name or f"{_what(job)}-{str(id)[:8]}",
        "kind": job.kind,
        "workload": job.workload,
        "job": plain(job),
        "code_sha256": job.code.sha256 if job.code else None,
        "labels": spec.labels,
        "priority": spec.priority,
        "max_retries": spec.max_retries,
        "submitted_by": submission.submitted_by,
        "idempotency_key": submission.key,
        "body_sha256": body_sha256(submission.body),
    }


def _what(job: Job) -> str:
    """A word for what it runs: `train` of `python train.py` and of `pkg.train:Mine`, `grid-digits` of a study."""
    if job.study is not None:
        return f"{job.study.type}-{_what(job.model_copy(update={'study': None}))}"
    words = [PurePosixPath(word) for word in job.command or []]
    script = next((word.stem for word in words[1:] if word.suffix in (".py", ".sh")), None)
    return (script or (words[0].name if words else job.workload.partition(":")[0].rpartition(".")[2]))[:100]


def body_sha256(body: bytes) -> str:
    """Of the parsed body, so that white space and the order of keys do not make it another one."""
    with suppress(ValueError):  # not JSON: then its own bytes tell it apart
        body = json.dumps(json.loads(body), sort_keys=True).encode()
    return hashlib.sha256(body).hexdigest()


async def resolved_job(
    session: AsyncSession, spec: JobSpec, fleet: Fleet, told: Validated | None = None, path: str = ""
) -> Job:
    """With every default. Raises 422; `path` is where in the body the submitter wrote it, with its dot.

    Of the user's own workload only a worker knows them: without `told` they stay open until it starts.
    """
    # Those of a study are its children's.
    never = fleet.elastic(spec.execution, spec.resources) if fleet.elastic else None
    must_be_there = fleet.elastic is None or never is not None
    if must_be_there:
        await _check_accelerator(session, spec.execution.accelerator, f"{path}execution", never)
        await _check_cores(session, spec, f"{path}resources", never)
    job = await _resolved(session, spec, path, told)
    if must_be_there:
        await _check_room(session, job, fleet.lease_s, path, never)
    return job


async def _check_room(session: AsyncSession, job: Job, lease_s: float, path: str, never: str | None) -> None:
    """Raises 422 for a gang that the slots of the live workers could never hold, however free they are.

    `never` is why no others could be started for it. Without it and without a live worker nobody knows. A child of a
    study, a resume and a replay are not asked: they wait.
    """
    devices, nodes = job.execution.devices, job.resources.nodes
    if job.kind is not Kind.TRAINING or devices == 1:
        return
    there = await capacity(session, job, lease_s)
    if there.enough or not (there.anybody or never):
        return
    if nodes is None:
        problem = f"{devices} are more than the {there.slots} slots for it that live workers have, taken ones included"
    else:
        each = f"{devices // nodes} each on {nodes} nodes"
        problem = f"{devices} cannot be had: {each} are asked for, and {there.nodes} nodes of live workers have so many"
    raise invalid([(f"{path}execution.devices", f"{problem}{_also(never)}; ask for less, or start workers first")])


def _also(never: str | None) -> str:
    return f"; {never}" if never else ""


async def _resolved(session: AsyncSession, spec: JobSpec, path: str, told: Validated | None) -> Job:
    await _check_code(session, spec.code, f"{path}code")
    setup = {name: getattr(spec, name) for name in Setup.model_fields}
    setup |= {"kind": spec.kind, "study": spec.study}
    if spec.study is not None and (spec.workload is None or ":" in spec.workload):
        return _study_job(spec, told, path, setup)
    if spec.workload is None:
        execution = _plain_execution(spec.execution, Kind.COMMAND, f"{path}execution")
        return Job(workload=COMMAND, config={}, execution=_never_stalled(execution), **setup)
    if ":" in spec.workload:
        config, execution = _as_told(spec, told, path)
        return Job(workload=spec.workload, config=config, execution=execution, **setup)
    workload = (await session.execute(FIND_WORKLOAD, {"name": spec.workload})).one_or_none()
    if workload is None:
        raise _unknown_workload(spec.workload, list(await session.scalars(KNOWN_WORKLOADS)))
    if spec.study is not None:
        return _study_job(spec, told, path, setup)
    if spec.workload == MEASUREMENT:
        execution = _plain_execution(spec.execution, Kind.MEASUREMENT, f"{path}execution")
        config = _measurement_config(spec.config, f"{path}config.")
        return Job(workload=MEASUREMENT, config=config, execution=execution, **setup)
    if told is not None:
        refuse_problems(told, path)
    return Job(
        workload=spec.workload,
        config=_resolved_config(spec.config, workload.config_schema, f"{path}config"),
        execution=_resolved_execution(spec.execution, workload.reports, f"{path}execution"),
        **setup,
    )


def _study_job(spec: JobSpec, told: Validated | None, path: str, setup: dict[str, Any]) -> Job:
    """As it was written: each child is resolved for itself, and what follows from the base must not stay under it."""
    if told is not None:
        refuse_problems(told, path)
    return Job(workload=spec.workload or COMMAND, config=spec.config, execution=spec.execution, **setup)


def invalid(problems: list[tuple[str, str]]) -> OpsError:
    """422 for (field, problem) pairs, the first one in words."""
    field, problem = problems[0]
    errors = [{"field": field, "problem": problem} for field, problem in problems]
    return OpsError(ErrorCode.INVALID, f"{field}: {problem}", errors=errors)


async def _check_accelerator(session: AsyncSession, accelerator: Accelerator, path: str, never: str | None) -> None:
    """Raises 422 for a GPU that no worker has ever offered."""
    if accelerator in (Accelerator.AUTO, Accelerator.CPU):
        return
    if not await session.scalar(EVER_OFFERED, {"device": accelerator}):
        problem = f"no worker has ever offered a {accelerator} device{_also(never)}"
        raise invalid([(f"{path}.accelerator", f"{problem}; start a worker with one first, or use auto")])


async def _check_cores(session: AsyncSession, spec: JobSpec, path: str, never: str | None) -> None:
    """Raises 422 for more than a slot of the device that is asked for has ever had."""
    cores, device = spec.resources.cores, spec.execution.accelerator
    if cores is None:
        return
    offered = await session.scalar(MOST_CORES, {"device": None if device is Accelerator.AUTO else device})
    if offered is None or offered < cores:
        most = f"the most so far was {offered}; ask for that" if offered else "none has offered any; leave it out"
        problem = f"no worker has ever offered a slot of {cores}: {most}, or start one first{_also(never)}"
        raise invalid([(f"{path}.cores", problem)])


async def _check_code(session: AsyncSession, code: Code | None, path: str) -> None:
    """The row is kept from being swept until it is referred to. Raises 422 for a snapshot that is not here."""
    if code is not None and await session.scalar(KEEP_SNAPSHOT, {"sha256": code.sha256}) is None:
        raise invalid([(f"{path}.sha256", "no such snapshot: upload it first (PUT /snapshots/SHA256)")])


def _plain_execution(given: Execution, kind: Kind, path: str) -> Execution:
    """Raises 422 for what only the training engine heeds."""
    try:
        check_plain_knobs(given, kind)
    except Unresolvable as error:
        raise invalid([(f"{path}.{field}", problem) for field, problem in error.problems]) from error
    return given


def _never_stalled(given: Execution) -> Execution:
    """Unless it was asked for: nobody knows how often a command ought to say something."""
    return given if "stall_timeout_s" in given.model_fields_set else given.model_copy(update={"stall_timeout_s": None})


def _measurement_config(given: dict[str, Any], path: str) -> dict[str, Any]:
    """With every default. Raises 422 naming the fields that are wrong."""
    try:
        return plain(MeasurementConfig.model_validate(given))
    except ValidationError as error:
        raise invalid(problems_of(error, MeasurementConfig, path)) from error


def _unknown_workload(name: str, known: list[str]) -> OpsError:
    if name == MEASUREMENT:
        hint = "install its packages where one runs (`pip install 'relight[llm]'`), and start that anew"
    else:
        hint = offer(name, known) if known else "none is known yet: start a worker first (`ops worker`)"
    return OpsError(ErrorCode.UNKNOWN_WORKLOAD, f"no worker has offered the workload {name!r}; {hint}", known=known)


def _resolved_config(given: dict[str, Any], schema: dict[str, Any], path: str) -> dict[str, Any]:
    """With the schema's defaults. Raises 422 naming the fields that it refuses."""
    try:
        defaults = {k: p["default"] for k, p in schema.get("properties", {}).items() if "default" in p}
        config = {**defaults, **given}
        # The registry is empty: without one a $ref is fetched, from any URL or file that a worker thought of.
        validator = jsonschema.Draft202012Validator(schema, registry=Registry())
        errors = sorted(validator.iter_errors(config), key=lambda e: list(e.absolute_path))
    except Exception as error:  # whatever jsonschema raises of a schema that is none
        problem = f"the schema that a worker registered cannot be applied ({type(error).__name__}): correct its Config"
        raise invalid([(path, problem)]) from error
    if errors:
        raise invalid([problem for error in errors for problem in _config_problems(error, path)])
    return config


def _as_told(spec: JobSpec, told: Validated | None, path: str) -> tuple[dict[str, Any], Execution]:
    """Config and execution as a worker that has the workload understands them. Raises 422 for what it refuses."""
    if told is None:
        return spec.config, spec.execution
    refuse_problems(told, path)
    return told.config, _resolved_execution(spec.execution, told.reports, f"{path}execution")


def refuse_problems(told: Validated, path: str = "") -> None:
    """Raises 422 when a worker found any."""
    if told.problems:
        raise invalid([(f"{path}{problem.field}", problem.problem) for problem in told.problems])


def _config_problems(error: jsonschema.ValidationError, path: str) -> list[tuple[str, str]]:
    """One for each unknown field, which jsonschema names only in its message."""
    place = ".".join([path, *map(str, error.absolute_path)])
    if error.validator != "additionalProperties" or error.validator_value is not False:
        return [(place, error.message)]
    schema, given = cast(dict[str, Any], error.schema), cast(dict[str, Any], error.instance)
    known = schema.get("properties", {})
    return [(f"{place}.{name}", unknown_field(name, known)) for name in given if name not in known]


def _resolved_execution(given: Execution, reports: Mapping[str, str], path: str) -> Execution:
    try:
        return resolved_execution(given, reports)
    except Unresolvable as error:
        raise invalid([(f"{path}.{field}", problem) for field, problem in error.problems]) from error
