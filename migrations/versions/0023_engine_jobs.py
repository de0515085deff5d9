"""Jobs of schedulers that start workers for pending operations.

Revision ID: 0023
Revises: 0021
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "engine_jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("engine", sa.Text(), nullable=False),
        sa.Column("external_id", sa.Text(), nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("request", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("state", sa.Text(), server_default=sa.text("'intended'"), nullable=False),
        sa.Column("engine_state", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("submitted_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("warned_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("ended_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('intended', 'submitted', 'running', 'ended')", name=op.f("ck_engine_jobs_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_engine_jobs")),
        sa.UniqueConstraint("name", name=op.f("uq_engine_jobs_name")),
    )
    op.create_index("ix_engine_jobs_newest", "engine_jobs", ["operation_id", sa.literal_column("created_at DESC")])
    op.create_index(
        "uq_engine_jobs_open",
        "engine_jobs",
        ["operation_id"],
        unique=True,
        postgresql_where=sa.text("state != 'ended'"),
    )


def downgrade() -> None:
    raise NotImplementedError("there is no way back; restore a backup")
