"""drain: what an operator wishes of a worker"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("drain", sa.Text(), nullable=True))
    op.create_check_constraint(op.f("ck_workers_drain"), "workers", "drain IN ('finish', 'preempt')")
