"""what attempts print"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "logs",
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("stored", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("operation_id", "start", name=op.f("pk_logs")),
        sa.UniqueConstraint("operation_id", "stored", name=op.f("uq_logs_operation_id_stored")),
        sa.ForeignKeyConstraint(
            ["operation_id", "attempt"],
            ["attempts.operation_id", "attempts.number"],
            name=op.f("fk_logs_operation_id_attempt"),
        ),
    )
