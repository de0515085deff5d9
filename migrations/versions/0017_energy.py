"""joules: windows, what they add up to, and the devices of workers"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

USES = "'startup', 'restore', 'train', 'evaluate', 'save', 'finish', 'unattributed'"


def upgrade() -> None:
    op.add_column("workers", sa.Column("devices", postgresql.JSONB(), server_default=sa.text("'[]'"), nullable=False))
    op.add_column(
        "attempts", sa.Column("starts_at_evaluation", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )
    op.execute("""
        UPDATE attempts a SET starts_at_evaluation = true FROM checkpoints c
         WHERE c.id = a.checkpoint_id AND c.phase = 'evaluate'
    """)
    op.create_table(
        "energy_windows",
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("incarnation", sa.Uuid(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("index", sa.BigInteger(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("quality", sa.Text(), nullable=False),
        sa.Column("use", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=True),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("until_step", sa.BigInteger(), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.Column("duration_us", sa.BigInteger(), nullable=False),
        sa.Column("energy_uj", sa.BigInteger(), nullable=True),
        sa.Column("error_uj", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("baseline_w", sa.Double(), nullable=True),
        sa.Column("state", postgresql.JSONB(), nullable=True),
        sa.CheckConstraint(
            "(energy_uj IS NULL) = (reason IS NOT NULL)", name=op.f("ck_energy_windows_unknown_has_its_reason")
        ),
        sa.CheckConstraint(f"use IN ({USES})", name=op.f("ck_energy_windows_use")),
        sa.ForeignKeyConstraint(
            ["operation_id", "attempt"],
            ["attempts.operation_id", "attempts.number"],
            name=op.f("fk_energy_windows_operation_id_attempt"),
        ),
        sa.PrimaryKeyConstraint(
            "operation_id", "attempt", "incarnation", "device", "index", name=op.f("pk_energy_windows")
        ),
    )
    op.create_index(
        "ix_energy_windows_training",
        "energy_windows",
        ["operation_id", "attempt", "until_step"],
        postgresql_where=sa.text("use IN ('train', 'evaluate')"),
    )
    op.create_table(
        "energy_sums",
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("incarnation", sa.Uuid(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("quality", sa.Text(), nullable=False),
        sa.Column("use", sa.Text(), nullable=False),
        sa.Column("windows", sa.BigInteger(), nullable=False),
        sa.Column("unknown", sa.BigInteger(), nullable=False),
        sa.Column("without_error", sa.BigInteger(), nullable=False),
        sa.Column("energy_uj", sa.BigInteger(), nullable=False),
        sa.Column("error_uj", sa.BigInteger(), nullable=False),
        sa.Column("duration_us", sa.BigInteger(), nullable=False),
        sa.Column("steps", sa.BigInteger(), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.CheckConstraint(f"use IN ({USES})", name=op.f("ck_energy_sums_use")),
        sa.ForeignKeyConstraint(
            ["operation_id", "attempt"],
            ["attempts.operation_id", "attempts.number"],
            name=op.f("fk_energy_sums_operation_id_attempt"),
        ),
        sa.PrimaryKeyConstraint(
            "operation_id",
            "attempt",
            "incarnation",
            "device",
            "source",
            "quality",
            "use",
            name=op.f("pk_energy_sums"),
        ),
    )
