"""deletions, and replays by their parent"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "deletions",
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("deleted_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("swept_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("operation_id", name=op.f("pk_deletions")),
    )
    op.create_index(
        "ix_deletions_unswept",
        "deletions",
        ["operation_id"],
        unique=False,
        postgresql_where=sa.text("swept_at IS NULL"),
    )
    op.create_index(
        "ix_operations_replay_of",
        "operations",
        ["replay_of"],
        unique=False,
        postgresql_where=sa.text("replay_of IS NOT NULL"),
    )
