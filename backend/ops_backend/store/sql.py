"""Fragments that several statements share. Lineage is decided here and nowhere else."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from sqlalchemy import TextClause, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import JSON, BigInteger, Boolean, Double, Integer, Text, TypeEngine, Uuid

from ops_contract.wire import Wire

M = TypeVar("M", bound=Wire)

# asyncpg sends every parameter with a type; these are the ones whose Python value does not tell it.
_TYPES: Mapping[str, TypeEngine[Any]] = {
    "action": Text(),
    "address": Text(),
    "after": Integer(),
    "after_s": Double(),
    "after_step": BigInteger(),
    "answer": Text(),
    "attempt": Integer(),
    "attempts": ARRAY(Integer),
    "cancel_reason": Text(),
    "checkpoint_id": Uuid(),
    "children": JSON(),
    "claim_s": Double(),
    "content": JSON(),
    "config_schema": JSON(),
    "checkpoint_step": BigInteger(),
    "cores": Integer(),
    "cursor_at": Text(),
    "cursor_id": Uuid(),
    "detail": JSONB(),
    "drain": Text(),
    "device": Text(),
    "devices": JSONB(),
    "device_uuid": Text(),
    "device_uuids": ARRAY(Text),
    "earlier_attempt": Integer(),
    "end_at": Text(),
    "end_id": Uuid(),
    "environment": JSONB(),
    "engine": Text(),
    "engine_state": Text(),
    "error": JSONB(),
    "exactness": JSONB(),
    "external_id": Text(),
    "failures": Integer(),
    "first_step": BigInteger(),
    "first_steps": ARRAY(BigInteger),
    "for_all": Boolean(),
    "force": Boolean(),
    "gave_up": JSONB(),
    "http_status": Integer(),
    "idempotency_key": Text(),
    "incarnation": Uuid(),
    "ids": ARRAY(Uuid()),
    "job": JSONB(),
    "kind": Text(),
    "label": Text(),
    "label_key": Text(),
    "label_value": Text(),
    "labels": JSONB(),
    "lasts_s": Double(),
    "lease_s": Double(),
    "last_seq": BigInteger(),
    "last_step": BigInteger(),
    "last_steps": ARRAY(BigInteger),
    "message": Text(),
    "max_bytes": BigInteger(),
    "max_points": Integer(),
    "name": Text(),
    "names": ARRAY(Text),
    "next_seq": BigInteger(),
    "operation_id": Uuid(),
    "outcome": Text(),
    "parent_id": Uuid(),
    "page_points": BigInteger(),
    "port": Integer(),
    "paths": ARRAY(Text),
    "own": Boolean(),
    "permanent": Boolean(),
    "plans": Boolean(),
    "progress": JSONB(none_as_null=True),
    "q": Text(),
    "ranks": Integer(),
    "reason": Text(),
    "replay": JSONB(),
    "replay_of": Uuid(),
    "replays": Boolean(),
    "monitored": Double(),
    "older_than_s": Double(),
    "reports": JSON(),
    "request": JSONB(),
    "retry_in_s": Double(),
    "searched": BigInteger(),
    "seq": BigInteger(),
    "seqs": ARRAY(BigInteger),
    "since": Text(),
    "size_bytes": BigInteger(),
    "start": BigInteger(),
    "state": Text(),
    "step": BigInteger(),
    "epoch": BigInteger(),
    "steps": ARRAY(BigInteger),
    "stored": BigInteger(),
    "target": Text(),
    "token_id": Uuid(),
    "tries": Integer(),
    "until_attempts": ARRAY(Integer),
    "until_seqs": ARRAY(BigInteger),
    "user_agent": Text(),
    "user_code": Boolean(),
    "values": ARRAY(Double),
    "versions": JSONB(),
    "webhook_id": Uuid(),
    "warned": Boolean(),
    "was": Text(),
    "was_engine_state": Text(),
    "was_warned": Boolean(),
    "who": Text(),
    "windows": JSONB(),
    "workload": Text(),
    "workloads": ARRAY(Text),
}


def statement(sql: str) -> TextClause:
    """A text statement whose parameters carry their types."""
    clause = text(sql)
    typed = [bindparam(name, type_=_TYPES[name]) for name in clause.compile().params if name in _TYPES]
    return clause.bindparams(*typed)


def plain(model: Wire) -> dict[str, Any]:
    """For a jsonb column: as it travels, with non-finite numbers as strings (`mode="json"` leaves them floats)."""
    found: dict[str, Any] = json.loads(model.model_dump_json())
    return found


def of_row(model: type[M], row: Mapping[Any, Any]) -> M:
    """Of a row that may have more columns than the model has fields."""
    return model.model_validate({name: row[name] for name in model.model_fields})


def in_lineage(checkpoint: str) -> str:
    """True for a checkpoint row on the operation's lineage: no later attempt started before it."""
    return f"""
        NOT EXISTS (SELECT FROM attempts later
                     WHERE later.operation_id = {checkpoint}.operation_id
                       AND later.number > {checkpoint}.attempt AND later.start_step < {checkpoint}.step)"""


def continues(operation: str) -> str:
    """True for a committed row `c` that the operation goes on from: its own on the lineage, or its fork point.

    `operation` has id and forked_from_checkpoint_id.
    """
    return f"""
        c.status = 'committed' AND (c.operation_id = {operation}.id AND {in_lineage("c")}
                                    OR c.id = {operation}.forked_from_checkpoint_id)"""


# What evaluates a step comes after what updates it; of equals the newest is taken.
NEWEST_FIRST = "c.step DESC, c.phase = 'evaluate' DESC, c.attempt DESC, c.created_at DESC"

# Locks every hold of an attempt in one order, so that two members that finish together do not deadlock; `locked` are
# the live ones. Those that have ended are locked too: what their transactions wrote while this one waited is not in its
# snapshot, but in the rows that it locks.
# The statements count on `bool_or` to read all of it before the operation is locked: holds, then operations.
LOCK_HOLDS = """
    every AS MATERIALIZED (
        SELECT incarnation, last_seq, lease_expires_at, checkpoint_step, first_rank, outcome, ended_at
          FROM holds
         WHERE operation_id = :id AND attempt = :attempt
         ORDER BY incarnation
           FOR UPDATE
    ), locked AS MATERIALIZED (SELECT * FROM every WHERE ended_at IS NULL)"""


def by_member(whose: str) -> str:
    """Of an event's detail, after LOCK_HOLDS: which worker of several ended the attempt. `whose` is of a hold."""
    return f"""coalesce((SELECT jsonb_build_object('member', w.name) FROM every JOIN workers w USING (incarnation)
                          WHERE {whose} AND (SELECT count(*) FROM every) > 1
                          ORDER BY every.lease_expires_at LIMIT 1), '{{}}')"""


def moved_at(operation: str) -> str:
    """When this operation moved last: where it waits, since when. Notes are no moves."""
    return f"""(SELECT e.at FROM events e
                 WHERE e.operation_id = {operation}.id AND e.from_status IS DISTINCT FROM e.to_status
                 ORDER BY e.seq DESC LIMIT 1)"""


# Of a pending operation `o`. One with a single event has been so since it was made: no look-up for each of those that
# wait, and one by one all the same, for a join would read all events of all time.
PENDING_SINCE = f"CASE WHEN o.event_seq = 1 THEN o.created_at ELSE {moved_at('o')} END"


# Of a worker `w`: a heartbeat within a lease is its sign of life.
IS_LIVE = "w.last_seen_at > now() - make_interval(secs => :lease_s)"
TAKES_WORK = f"NOT w.draining AND w.drain IS NULL AND {IS_LIVE}"


def record(event: str, detail: str = "CAST(:detail AS jsonb)") -> str:
    """The event row of a move; `moved` yields id, event_seq, attempt, from_status and status."""
    return f"""
        INSERT INTO events (operation_id, seq, attempt, name, from_status, to_status, detail)
        SELECT id, event_seq, attempt, {event}, from_status, status, {detail} FROM moved"""
