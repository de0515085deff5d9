"""attempts by start"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_attempts_started",
        "attempts",
        [sa.text("started_at DESC")],
        unique=False,
        postgresql_where=sa.text("started_at IS NOT NULL"),
    )
