"""Measurements of LLM inference are operations too.

Revision ID: 0021
Revises: 0020
"""

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_constraint(op.f("ck_operations_kind"), "operations", type_="check")
    op.create_check_constraint(
        op.f("ck_operations_kind"), "operations", "kind IN ('training', 'measurement', 'command', 'study')"
    )


def downgrade() -> None:
    raise NotImplementedError("there is no way back; restore a backup")
