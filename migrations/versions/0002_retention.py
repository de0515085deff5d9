"""retention: the monitored value of a checkpoint, and what finds and deletes rows by their state"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("checkpoints", sa.Column("monitored", sa.Double(), nullable=True))
    op.create_index("ix_checkpoints_pinned", "checkpoints", ["id"], postgresql_where=sa.text("pinned_at IS NOT NULL"))
    op.create_index("ix_checkpoints_deleting", "checkpoints", ["id"], postgresql_where=sa.text("status = 'deleting'"))
    op.create_index(
        "ix_operations_resume_choice",
        "operations",
        ["resume_checkpoint_id"],
        postgresql_where=sa.text("resume_checkpoint_id IS NOT NULL"),
    )
    op.create_index(
        "ix_attempts_checkpoint", "attempts", ["checkpoint_id"], postgresql_where=sa.text("checkpoint_id IS NOT NULL")
    )
    op.drop_constraint("fk_attempts_checkpoint_id", "attempts", type_="foreignkey")
    op.create_foreign_key(
        "fk_attempts_checkpoint_id", "attempts", "checkpoints", ["checkpoint_id"], ["id"], ondelete="SET NULL"
    )
    # jsonb does not keep the order of keys, and the first metric is the default one.
    op.alter_column("workloads", "reports", existing_type=postgresql.JSONB(), type_=sa.JSON(), existing_nullable=False)
