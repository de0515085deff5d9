"""whether a workload's config is checked by code too"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workloads", sa.Column("validates", sa.Boolean(), server_default=sa.text("false"), nullable=False))
