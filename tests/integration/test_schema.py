"""The database's own word on the contract."""

import re
from enum import StrEnum

import pytest
from alembic import command

from helpers.databases import connect
from ops_backend.database import alembic_config
from ops_contract.lifecycle import CheckpointStatus, CheckpointType, Event, Kind, Outcome, Phase, Status

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
}


def test_the_tables_are_what_the_migrations_make(database_url: str) -> None:
    command.check(alembic_config(database_url))


@pytest.mark.parametrize("constraint", WORDS)
async def test_check_constraints_equal_the_enums(database_url: str, constraint: str) -> None:
    connection = await connect(database_url)
    sql = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = $1"
    definition = await connection.fetchval(sql, constraint)
    await connection.close()
    assert set(re.findall(r"'(\w+)'::text", definition)) == {word.value for word in WORDS[constraint]}
