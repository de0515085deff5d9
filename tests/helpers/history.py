"""The history checker: every line of "Always true" in the database and the files, as a list of what is violated."""

import json
from collections import defaultdict
from collections.abc import Collection
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncpg

from ops_contract.agents import CheckpointRef
from ops_contract.lifecycle import TERMINAL, Event, allowed
from relight.manifest import CheckpointCorrupt, CheckpointMissing
from relight.training.checkpoint import restore

Rows = list[Any]


# Who wrote an event: its own xmin is that of the announcement to webhooks, once there was one.
KEEP_WRITERS = """
    CREATE SCHEMA history;
    CREATE TABLE history.written (operation_id uuid, seq bigint);
    CREATE INDEX ON history.written (operation_id, seq);
    CREATE FUNCTION history.note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO history.written VALUES (NEW.operation_id, NEW.seq); RETURN NULL; END
    $$;
    CREATE TRIGGER note AFTER INSERT ON events FOR EACH ROW EXECUTE FUNCTION history.note();
"""
_EVENTS = """(SELECT operation_id, attempt, name, pg_xact_commit_timestamp(w.xmin) AS committed_at
                FROM events JOIN history.written w USING (operation_id, seq))"""
# What ends an attempt. It and every report of the attempt lock the same hold, so their commits have an order.
LATE = f"""
    SELECT r.operation_id, r.attempt, r.name, r.first
      FROM (SELECT operation_id, attempt, name, first_step AS first, xmin AS written FROM metrics
             UNION ALL SELECT operation_id, attempt, 'output', start, xmin FROM logs) r
      JOIN {_EVENTS} e USING (operation_id, attempt)
     WHERE e.name IN ('complete', 'fail', 'retry', 'preempt', 'stop', 'lost', 'refuse', 'checkpoint_corrupt')
       AND pg_xact_commit_timestamp(r.written) > e.committed_at
"""

# Events of one operation lock it, so their commits have an order too.
OVERLAPS = f"""
    SELECT c.operation_id, c.attempt FROM {_EVENTS} c
      JOIN {_EVENTS} e ON e.operation_id = c.operation_id AND e.attempt = c.attempt - 1
     WHERE c.name = 'claim'
       AND e.name IN ('complete', 'fail', 'retry', 'preempt', 'stop', 'lost', 'refuse', 'checkpoint_corrupt')
       AND c.committed_at < e.committed_at
"""
# In the order in which it was stored, offsets grow by at least what the rows have.
PRINTED_OVER = """
    SELECT * FROM (
        SELECT operation_id, start, attempt,
               lag(start + octet_length(data)) OVER earlier AS free, lag(attempt) OVER earlier AS before
          FROM logs WINDOW earlier AS (PARTITION BY operation_id ORDER BY stored)
    ) l WHERE start < free OR attempt < before
"""
# `now()` is when a transaction began: an API that is stopped between the claim's lock and the claim dates it back.
STOPPED_S = 15


async def violations(database: asyncpg.Connection, storage: Path, damaged: Collection[str] = ()) -> list[str]:
    """Empty when all is well. To be called when every operation has ended and no report is on its way.

    `damaged` are the paths of checkpoints that were spoilt from outside: these need not load, and may be marked.
    Needs `track_commit_timestamp = on`, and KEEP_WRITERS from the beginning.
    """
    operations = await database.fetch("SELECT * FROM operations ORDER BY created_at")
    attempts = await database.fetch("SELECT * FROM attempts ORDER BY operation_id, number")
    holds = await database.fetch("SELECT * FROM holds ORDER BY operation_id, attempt")
    events = await database.fetch("SELECT * FROM events ORDER BY operation_id, seq")
    checkpoints = await database.fetch("SELECT * FROM checkpoints WHERE path <> ALL ($1)", list(damaged))
    metrics = await database.fetch("SELECT * FROM metrics ORDER BY operation_id, name, attempt, first_step")
    found = [*_held_by_the_dead(operations, holds, attempts), *_overlaps(attempts), *half_gangs(operations, holds)]
    for operation in operations:
        found += _not_a_path(operation, [e for e in events if e["operation_id"] == operation["id"]])
    planned = await database.fetch("SELECT * FROM planned")
    found += _counted_twice(attempts, metrics) + _without_children(operations, planned)
    found += [f"a report was accepted after its attempt had ended: {dict(row)}" for row in await database.fetch(LATE)]
    found += [
        f"an attempt was claimed before the one before had ended: {dict(r)}" for r in await database.fetch(OVERLAPS)
    ]
    found += [f"output lies over what was there: {dict(row)}" for row in await database.fetch(PRINTED_OVER)]
    for row in checkpoints:
        if row["status"] == "corrupt":
            found.append(f"checkpoint {row['path']} is marked corrupt, but nobody had spoilt it")
        elif row["status"] == "committed" and (problem := _does_not_load(row, storage)):
            found.append(problem)
    return found


def _held_by_the_dead(operations: Rows, holds: Rows, attempts: Rows) -> list[str]:
    ended = {o["id"] for o in operations if o["status"] in TERMINAL}
    stuck = [f"operation {o['id']} is stuck {o['status']}" for o in operations if o["id"] not in ended]
    slots = [f"a slot is held by {h['operation_id']}, which has ended" for h in holds if h["ended_at"] is None]
    return stuck + slots + [f"attempt {a['number']} is open" for a in attempts if a["ended_at"] is None]


def half_gangs(operations: Rows, holds: Rows) -> list[str]:
    """The members of every attempt have all its ranks, each once; of what is no gang one has the only one."""
    size = {o["id"]: json.loads(o["job"])["execution"]["devices"] if o["kind"] == "training" else 1 for o in operations}
    ranks = defaultdict(list)
    for hold in holds:
        mine = range(hold["first_rank"], hold["first_rank"] + hold["ranks"])
        ranks[hold["operation_id"], hold["attempt"]] += mine
    return [
        f"attempt {attempt} of {id} was held with ranks {sorted(found)} of {size[id]}"
        for (id, attempt), found in ranks.items()
        if sorted(found) != list(range(size[id]))
    ]


def _without_children(operations: Rows, planned: Rows) -> list[str]:
    """A study that completed has what it planned last, and every child was planned by its study."""
    status = {o["id"]: o["status"] for o in operations}
    children = {(o["parent_id"], o["child_key"]): o["status"] for o in operations if o["parent_id"]}
    newest = defaultdict(int)
    for row in planned:
        newest[row["parent_id"]] = max(newest[row["parent_id"]], row["attempt"])
    wanted = {(row["parent_id"], row["child_key"]): row["attempt"] for row in planned}
    return [
        f"study {study} completed, but its child {key[:8]} is {children.get((study, key))}"
        for (study, key), attempt in wanted.items()
        if attempt == newest[study] and status[study] == "completed" and children.get((study, key)) != "completed"
    ] + [f"a child {key[:8]} of {study} that it never planned" for study, key in children if (study, key) not in wanted]


def _overlaps(attempts: Rows) -> list[str]:
    return [
        f"attempt {b['number']} of {b['operation_id']} began before attempt {a['number']} had ended"
        for a, b in pairwise(attempts)
        if a["operation_id"] == b["operation_id"]
        and (a["ended_at"] is None or a["ended_at"] > b["claimed_at"] + timedelta(seconds=STOPPED_S))
    ]


def _not_a_path(operation: Any, events: Rows) -> list[str]:
    id, found = operation["id"], []
    if [e["seq"] for e in events] != list(range(1, len(events) + 1)):
        found.append(f"events of {id} are not numbered without a gap")
    before = None
    for event in events:
        if event["from_status"] != before:
            found.append(f"event {event['seq']} of {id} begins at {event['from_status']}, but it was {before}")
        if not allowed(event["from_status"], Event(event["name"]), event["to_status"]):
            found.append(f"event {event['seq']} of {id} is not in the table: {event['name']}")
        before = event["to_status"]
    if before != operation["status"]:
        found.append(f"{id} is {operation['status']}, but its events end at {before}")
    return found


def _counted_twice(attempts: Rows, metrics: Rows) -> list[str]:
    """Of the lineage, each step of a metric of every step is there once; none is missing."""
    starts = defaultdict(dict)
    for attempt in attempts:
        starts[attempt["operation_id"]][attempt["number"]] = attempt["start_step"]
    steps = defaultdict(list)
    for row in metrics:
        later = [s for n, s in starts[row["operation_id"]].items() if n > row["attempt"]]
        steps[row["operation_id"], row["name"]] += [s for s in row["steps"] if s < min(later, default=s + 1)]
    return [
        f"steps of {name} of {id} are missing or there twice"
        for (id, name), counted in steps.items()
        if name in ("loss", "learning_rate") and sorted(counted) != [starts[id][1] + n for n in range(len(counted))]
    ]


def _does_not_load(row: Any, storage: Path) -> str | None:
    fields = {name: row[name] for name in CheckpointRef.model_fields if name != "checkpoint_id"}
    try:
        restore(storage, CheckpointRef(checkpoint_id=row["id"], **fields))
    except (CheckpointCorrupt, CheckpointMissing) as error:
        return f"committed checkpoint {row['path']} does not load: {error}"
    return None
