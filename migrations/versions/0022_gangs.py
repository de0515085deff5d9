"""An attempt may be held by several workers, each with several slots.

Revision ID: 0022
Revises: 0021
"""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("slots", sa.Column("port", sa.Integer(), nullable=True))
    op.add_column("holds", sa.Column("first_rank", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.add_column("holds", sa.Column("ranks", sa.Integer(), server_default=sa.text("1"), nullable=False))
    op.add_column("holds", sa.Column("outcome", sa.Text(), nullable=True))
    op.create_index(
        "ix_operations_gangs",
        "operations",
        [sa.text("priority DESC"), "created_at"],
        postgresql_where=sa.text("status = 'pending' AND (job->'execution'->>'devices')::int > 1"),
    )


def downgrade() -> None:
    raise NotImplementedError("there is no way back; restore a backup")
