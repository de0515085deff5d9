"""forks"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("operations", sa.Column("forked_from_checkpoint_id", sa.Uuid(), nullable=True))
    op.create_foreign_key(
        "fk_operations_forked_from_checkpoint_id", "operations", "checkpoints", ["forked_from_checkpoint_id"], ["id"]
    )
    op.create_index(
        "ix_operations_forked_from",
        "operations",
        ["forked_from_checkpoint_id"],
        unique=False,
        postgresql_where=sa.text("forked_from_checkpoint_id IS NOT NULL"),
    )
