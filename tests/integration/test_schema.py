"""The database's own word on the contract."""

import asyncio
import re
from enum import StrEnum
from uuid import uuid4

import pytest
from alembic import command
from alembic.script import ScriptDirectory

from helpers.databases import Databases, connect
from ops_backend.database import alembic_config, is_known, newest_revision
from ops_contract.audit import Action
from ops_contract.lifecycle import CheckpointStatus, CheckpointType, Event, Kind, Outcome, Phase, Status
from ops_contract.webhooks import DeliveryState, WebhookFormat

WORDS: dict[str, type[StrEnum]] = {
    "ck_operations_status": Status,
    "ck_operations_kind": Kind,
    "ck_attempts_outcome": Outcome,
    "ck_checkpoints_checkpoint_type": CheckpointType,
    "ck_checkpoints_status": CheckpointStatus,
    "ck_checkpoints_phase": Phase,
    "ck_events_name": Event,
    "ck_events_from_status": Status,
    "ck_events_to_status": Status,
    "ck_webhooks_format": WebhookFormat,
    "ck_deliveries_state": DeliveryState,
    "ck_audit_action": Action,
}


def test_the_tables_are_what_the_migrations_make(database_url: str) -> None:
    command.check(alembic_config(database_url))


def test_the_newest_file_is_the_head_of_the_migrations() -> None:
    """So that a start with nothing to migrate need not ask Alembic."""
    known = [found.revision for found in ScriptDirectory.from_config(alembic_config("")).walk_revisions()]

    assert newest_revision() == known[0]
    assert all(map(is_known, known))
    assert not is_known("9999")


@pytest.mark.parametrize("constraint", WORDS)
async def test_check_constraints_equal_the_enums(database_url: str, constraint: str) -> None:
    connection = await connect(database_url)
    sql = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = $1"
    definition = await connection.fetchval(sql, constraint)
    await connection.close()
    assert set(re.findall(r"'([\w.]+)'::text", definition)) == {word.value for word in WORDS[constraint]}


async def test_metrics_of_before_keep_their_order_and_come_before_what_their_holds_still_send(
    databases: Databases,
) -> None:
    url = await databases.empty()
    await asyncio.to_thread(command.upgrade, alembic_config(url), "0013")
    connection = await connect(url)
    await connection.execute("SET session_replication_role = replica")  # rows of which only the metrics matter
    insert = (
        "INSERT INTO metrics (operation_id, name, attempt, first_step, steps, values) VALUES ($1, $2, $3, $4, $5, $6)"
    )
    id = uuid4()
    for name, attempt, step in [("loss", 1, 0), ("loss", 1, 9), ("val", 1, 5), ("loss", 2, 7)]:
        await connection.execute(insert, id, name, attempt, step, [step], [0.5])

    await asyncio.to_thread(command.upgrade, alembic_config(url), "head")

    rows = await connection.fetch("SELECT attempt, seq, name, first_step FROM metrics ORDER BY attempt, seq")
    await connection.close()
    assert [tuple(row) for row in rows] == [(1, -2, "loss", 0), (1, -1, "val", 5), (1, 0, "loss", 9), (2, 0, "loss", 7)]


async def test_ends_of_before_are_told_to_no_webhook_and_later_ones_are(databases: Databases) -> None:
    url = await databases.empty()
    await asyncio.to_thread(command.upgrade, alembic_config(url), "0014")
    connection = await connect(url)
    await connection.execute("SET session_replication_role = replica")  # rows of which only the events matter
    insert = """
        INSERT INTO events (operation_id, seq, attempt, name, from_status, to_status, detail)
        VALUES ($1, $2, 1, 'complete', 'running', 'completed', '{}')
    """
    id = uuid4()
    await connection.execute(insert, id, 1)
    await asyncio.to_thread(command.upgrade, alembic_config(url), "head")
    await connection.execute(insert, id, 2)

    rows = await connection.fetch("SELECT seq, announced FROM events ORDER BY seq")
    await connection.close()
    assert [tuple(row) for row in rows] == [(1, True), (2, False)]
