"""A claim looks at wishes, and a list with a filter at what matches.

Revision ID: 0024
Revises: 0023
"""

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

WISH = """((CASE WHEN status = 'pending' THEN
    CASE WHEN kind IN ('study', 'training') THEN left(kind, 1) ELSE '' END
    || ' ' || coalesce(job->'resources'->>'cores', '') || ' ' || coalesce(job->'resources'->>'nodes', '')
    || ' ' || coalesce(job->'execution'->>'accelerator', '') || ' ' || coalesce(job->'execution'->>'devices', '')
    || ' ' || coalesce(job->'execution'->>'threads', '')
    || CASE WHEN coalesce(job->'env', '{}') = '{}' THEN ' ' ELSE ' env ' END
    || CASE WHEN workload = 'command' OR workload LIKE '%:%' THEN ':' ELSE workload END
END) COLLATE "C")"""
PENDING = sa.text("status = 'pending'")
NEWEST = [sa.text("created_at DESC"), sa.text("id DESC")]


def upgrade() -> None:
    op.drop_index("ix_operations_gangs", "operations")
    op.drop_index("ix_operations_queue", "operations")
    queue = [sa.text("priority DESC"), "created_at", "id"]
    op.create_index("ix_operations_queue", "operations", queue, postgresql_where=PENDING)
    op.create_index(
        "ix_operations_wish", "operations", [sa.text(WISH), *queue], postgresql_where=sa.text(f"{WISH} IS NOT NULL")
    )
    op.create_index(
        "ix_operations_by_status",
        "operations",
        ["status", *NEWEST],
        postgresql_where=sa.text("status != 'completed'"),
    )
    op.create_index("ix_operations_by_workload", "operations", ["workload", *NEWEST])
    op.create_index("ix_operations_by_user", "operations", ["submitted_by", *NEWEST])
    op.create_index("ix_operations_labels", "operations", ["labels"], postgresql_using="gin")


def downgrade() -> None:
    raise NotImplementedError("there is no way back; restore a backup")
